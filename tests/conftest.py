"""Fixtures for all tests: a tiny model, a model cache of their own, Ray settings that touch nothing of the user."""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.patience import PATIENT

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Set what Ray reads when it is imported, before any test module imports it."""
    # A short path: the Unix sockets of a Ray session lie below it and may have 107 characters at most.
    home = Path(tempfile.mkdtemp(prefix="ar", dir="/tmp"))
    (home / "token").write_text("test-" * 8)
    (home / "token").chmod(0o600)
    os.environ |= PATIENT | {
        "ALPACA_RAY_TEST_HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "alpaca_ray.serve.request_headers:proxy_middlewares",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",  # several processes share two cores
        "OPENAI_API_KEY": "good-key",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    # How long an example takes depends on what else the machine does.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with its tokenizer."""
    from tests.tiny import write_tiny_model  # torch: only for tests that need a model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's model cache."""
    monkeypatch.setenv("ALPACA_RAY_CACHE", str(tmp_path / "cache"))
