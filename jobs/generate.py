"""Generate the instruction dataset: `python jobs/generate.py --recipe tiny_cpu --storage-path runs`."""

import sys

from alpaca_ray.artifacts import begin_stage, open_run
from alpaca_ray.cli import announce, run_job
from alpaca_ray.config import load_config
from alpaca_ray.generate import dataset


def main() -> None:
    """Exits 0 only when the stage is done."""
    config = load_config(sys.argv[1:])
    run = open_run(config.storage_path, config.name)
    stage = begin_stage(run, config, "generate", dataset.inputs(config.generate))
    if stage.manifest is None:
        dataset.generate(stage)
    announce(stage)


if __name__ == "__main__":
    run_job(main)
