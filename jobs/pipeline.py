"""All stages, each as a job: `ray job submit --working-dir . -- python jobs/pipeline.py --recipe tiny_cpu ...`."""

import os
import sys

from alpaca_ray.artifacts import open_run
from alpaca_ray.cli import run_job
from alpaca_ray.cluster.pipeline import Pipeline, StageFailed, Stop, Stopped, stopped_by_sigterm
from alpaca_ray.config import STAGES
from alpaca_ray.inputs import INPUTS
from alpaca_ray.settings import load_config


def main() -> None:
    """Exits 0 only when all stages are done. Stopped, it stops its stage; killed, the next one follows that."""
    with stopped_by_sigterm(Stop()) as stop:
        try:
            pipeline(stop).make_all()
        except StageFailed as error:
            sys.exit(f"error: {error}")  # exit code 1
        except Stopped:
            sys.exit("pipeline: stopped, and the stage's job with it; submitted again, it goes on from there")


def pipeline(stop: Stop) -> Pipeline:
    from alpaca_ray.cluster.stage_jobs import OwnJob, RayJobs, stage_entrypoint  # Ray: slow, and a stop may come

    config = load_config(sys.argv[1:])
    own = OwnJob.read(os.environ)
    run = open_run(config.storage_path, config.name)
    if own.left_out:
        print(f"pipeline: env_vars not handed on, for Ray keeps their values: {', '.join(own.left_out)}", flush=True)
    commands = {stage: stage_entrypoint(stage, sys.argv, sys.orig_argv[0]) for stage in STAGES}
    return Pipeline(run, config, RayJobs(own.runtime_env), commands, INPUTS, stop)


if __name__ == "__main__":
    run_job(main)
