"""alpaca_ray: from 175 seed tasks to a served instruction-following model, on one Ray cluster."""

__version__ = "0.1.0"
