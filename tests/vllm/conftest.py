"""What the tests of vLLM's engine share. Each engine is a process, half a minute to start: make test-vllm."""

from pathlib import Path

import pytest

from alpaca_ray.config import ServeArgs, WatermarkConfig

KEY_ENV, KEY = "ALPACA_RAY_TEST_WATERMARK_KEY", 3_141_592_653_589_793_238
MAX_LENGTH = 256
HEAD_DIM = 32  # the smallest that vLLM's attention for the CPU has


def args_for(model: Path | str, is_marked: bool) -> ServeArgs:
    """Sixteen rows in float32; where it is marked, with the key that lies in KEY_ENV."""
    watermark = WatermarkConfig(enabled=is_marked, key_env=KEY_ENV)
    return ServeArgs(model=str(model), dtype="float32", max_length=MAX_LENGTH, watermark=watermark)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of the one of tests/conftest.py."""
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", head_dim=HEAD_DIM)
