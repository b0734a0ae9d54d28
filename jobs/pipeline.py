"""All stages, each as a job: `ray job submit --working-dir . -- python jobs/pipeline.py --recipe tiny_cpu ...`."""

import os
import sys

from alpaca_ray.artifacts import open_run
from alpaca_ray.cli import run_job
from alpaca_ray.cluster.pipeline import Pipeline, StageFailed, Stopped, stopped_by_sigterm
from alpaca_ray.cluster.stage_jobs import OwnJob, RayJobs, stage_entrypoint
from alpaca_ray.config import STAGES
from alpaca_ray.inputs import INPUTS
from alpaca_ray.settings import load_config


def main() -> None:
    """Exits 0 only when all stages are done. Stopped, it stops its stage; killed, the next one follows that."""
    config = load_config(sys.argv[1:])
    own = OwnJob.read(os.environ)
    run = open_run(config.storage_path, config.name)
    commands = {stage: stage_entrypoint(stage, sys.argv, sys.orig_argv[0]) for stage in STAGES}
    pipeline = Pipeline(run, config, RayJobs(own.runtime_env), commands, INPUTS)
    if own.left_out:
        pipeline.say(
            f"pipeline: not handed on to the stages: env_vars {', '.join(own.left_out)}. Ray keeps their values"
        )
    with stopped_by_sigterm(pipeline.stop):
        try:
            pipeline.make_all()
        except StageFailed as error:
            sys.exit(f"error: {error}")  # exit code 1
        except Stopped:
            sys.exit("pipeline: stopped, and the stage's job with it; submitted again, it goes on from there")


if __name__ == "__main__":
    run_job(main)
