"""Generate the instruction dataset: `python jobs/generate.py --recipe tiny_cpu --storage-path runs`.

With `--dry-run`: ask a few requests, and print what the whole would ask for, cost and take.
"""

import sys

from alpaca_ray.artifacts import Stage, begin_stage, open_run
from alpaca_ray.cli import announce, run_job
from alpaca_ray.cluster.sole_driver import make_alone
from alpaca_ray.generate import dataset
from alpaca_ray.settings import load_config


def main() -> None:
    """Exits 0 only when the stage is done, or its cost estimated."""
    options = [option for option in sys.argv[1:] if option != "--dry-run"]
    config = load_config(options)
    run = open_run(config.storage_path, config.name)
    if len(options) < len(sys.argv[1:]):
        print(dataset.dry_run(Stage("generate", config, run, dataset.inputs(config.generate))), flush=True)
        return
    stage = begin_stage(run, config, "generate", dataset.inputs(config.generate))
    if stage.manifest is None:
        make_alone(stage, dataset.generate)
    announce(stage)


if __name__ == "__main__":
    run_job(main)
