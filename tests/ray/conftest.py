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
    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=temp_dir, logging_level=logging.WARNING)
    yield
    ray.shutdown()
