"""One driver a stage at a time on a cluster: a second one would pay for the same answers and train the same model."""

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from alpaca_ray.artifacts import Stage, done
from alpaca_ray.cluster.stage_jobs import JOB_CONFIG

NAMESPACE = "alpaca_ray"
POLL_S = 0.5
ANSWER_S = 10.0
SAY_AFTER_S = 5.0  # Ray ends what a dead driver left within 1 s or 2

log = logging.getLogger("alpaca_ray")


class _Holder:
    """Its name is taken for as long as its driver lives."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def owner(self) -> str:
        return self._owner


def make_alone(stage: Stage, make: Callable[[Stage], None]) -> None:
    """Make the stage, unless another driver of this cluster does: then wait for its end, and do what it left.

    Ray's job table cannot tell: after its head has started again it may call a driver FAILED that lives.
    """
    if not ray.is_initialized():
        ray.init()
    holder = _hold(stage)
    stage.manifest = done(stage.run, stage.config, stage.name, stage.inputs)
    if stage.manifest is None:
        make(stage)
    del holder  # without a handle Ray ends it, as it does when this driver dies


def _hold(stage: Stage) -> Any:
    """The actor, on the node of this driver, so that they die together."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name, since_s, has_said = f"{stage.name} of {stage.run.uri or stage.run.root}", time.monotonic(), False
    holder = ray.remote(_Holder).options(name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=node)
    while True:
        try:
            return holder.remote(_own_job())
        except ray.exceptions.ActorAlreadyExistsError:
            if not has_said and time.monotonic() - since_s > SAY_AFTER_S:
                log.info("%s is being made by %s of this cluster: waiting for its end", name, _owner(name))
                has_said = True
            time.sleep(POLL_S)


def _own_job() -> str:
    metadata = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata", {})
    return f"job {metadata['job_submission_id']}" if "job_submission_id" in metadata else "a driver"


def _owner(name: str) -> str:
    try:
        return str(ray.get(ray.get_actor(name, NAMESPACE).owner.remote(), timeout=ANSWER_S))
    except (ValueError, ray.exceptions.RayError):  # it has just ended, or its node is busy
        return "another driver"
