"""One real local Ray cluster for the tests of this folder."""

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    """ray.init() in this process: 4 logical CPUs, no dashboard, a temp dir and a token of its own."""
    import ray

    temp_dir = os.path.join(os.environ["ALPACA_RAY_TEST_HOME"], "t")
    # "local": never another cluster, such as that of the tests beside these.
    ray.init("local", num_cpus=4, include_dashboard=False, _temp_dir=temp_dir, logging_level=logging.WARNING)
    yield
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def impatient_training() -> Iterator[None]:
    """Ray Train looks after its workers every 2 s; a test of seconds has no such patience.

    And no node of these tests is drained, which costs a process at each start of the workers; tests/faults has that.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        yield
