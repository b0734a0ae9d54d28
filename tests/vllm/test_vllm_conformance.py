"""The suite of tests/unit/test_serve_conformance.py, with vLLM's engine in place of ours."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm makes an environment for it")

from alpaca_ray.serve.engine import Engine
from alpaca_ray.serve.vllm_engine import load_engine
from tests.unit.test_serve_conformance import *  # noqa: F403 - its tests and its fixtures, but for this one
from tests.vllm.conftest import args_for


@pytest.fixture(scope="module")  # type: ignore[no-redef]  # in place of the one of that suite
def engine(tiny_model: Path) -> Iterator[Engine]:
    engine = load_engine(args_for(tiny_model, is_marked=False))
    yield engine
    engine.close()
