"""[RAY TRAIN] How long a run may be without its workers, and what it knows of the cluster when it starts them anew."""

import logging
import time
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

# The hooks of Ray Train's controller. Its public UserCallback has none for the start of a worker group.
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RestartingState, RunningState

from alpaca_ray.config import UserError

log = logging.getLogger("alpaca_ray")

LOOK_TIMEOUT_S = 5.0


class StartLimit(ControllerCallback):
    """Ends a run that has had no workers for `timeout_s`, for which Ray itself would wait for ever.

    And has Ray look at the cluster before it starts workers anew. It counts the nodes only every 20 s, so that after
    the loss of one it would ask for more workers than there is room for.
    """

    def __init__(self, wanted: str, timeout_s: float) -> None:
        self._wanted = wanted
        self._timeout_s = timeout_s
        self._without_since_s: float | None = None
        self._requester_id = ""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Learn under which name Ray Train has asked for resources, as its ScalingPolicy forms it."""
        self._requester_id = f"train-{train_run_context.run_id}"

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called at each turn of the controller. Raises UserError, which Ray does not try again."""
        if isinstance(current_state, RunningState) or current_state.is_terminal():
            self._without_since_s = None
            return
        now_s = time.monotonic()
        if self._without_since_s is None:
            self._without_since_s = now_s
        if now_s - self._without_since_s > self._timeout_s:
            raise UserError(no_room(self._wanted, self._timeout_s))
        if isinstance(current_state, RestartingState | ReschedulingState) and type(previous_state) is not type(
            current_state
        ):
            self._look()

    def _look(self) -> None:
        coordinator: Any = get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
        try:
            ray.get(
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=LOOK_TIMEOUT_S
            )
        except ray.exceptions.RayError as error:
            log.warning("starting the workers without a fresh look at the cluster: %s", error)


def no_room(wanted: str, timeout_s: float) -> str:
    """What was asked for, what there is, and what to do."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    there = {name: sum(node.get(name, 0) for node in alive) for name in ("CPU", "GPU")}
    return (
        f"no room for {wanted} within {timeout_s:.0f} s; the cluster has {len(alive)} nodes with {there}. "
        "Lower train.num_workers or train.placement, or add nodes"
    )
