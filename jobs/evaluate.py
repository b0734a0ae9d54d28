"""Compare the base and the trained model: `python jobs/evaluate.py --recipe tiny_cpu`."""

import sys

from alpaca_ray.artifacts import begin_stage, open_run
from alpaca_ray.cli import announce, run_job
from alpaca_ray.cluster.sole_driver import make_alone
from alpaca_ray.evaluate import dataset
from alpaca_ray.settings import load_config


def main() -> None:
    """Exits 0 only when the stage is done."""
    config = load_config(sys.argv[1:])
    run = open_run(config.storage_path, config.name)
    stage = begin_stage(run, config, "evaluate", dataset.inputs(run, config.evaluate))
    if stage.manifest is None:
        make_alone(stage, dataset.evaluate)
    announce(stage)


if __name__ == "__main__":
    run_job(main)
