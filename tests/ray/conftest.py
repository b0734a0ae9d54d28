"""One real local Ray cluster for the tests of this folder, with a token, a temp dir and ports of its own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    """ray.init() in this process: 4 logical CPUs, no dashboard. Worker processes find `tests` and `alpaca_ray`."""
    # A short path: the Unix sockets below it may have 107 characters at most.
    home = Path(tempfile.mkdtemp(prefix="ar", dir="/tmp"))
    root = str(Path(__file__).parents[2])
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    (home / "token").write_text("test-" * 8)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import ray

    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=str(home / "t"), logging_level="warning")
    yield
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    shutil.rmtree(home, ignore_errors=True)
