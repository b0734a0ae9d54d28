"""Fixtures for all tests: a tiny model, and a cache of their own so that none touches the user's."""

from pathlib import Path

import pytest

from tests.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with its tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's model cache."""
    monkeypatch.setenv("ALPACA_RAY_CACHE", str(tmp_path / "cache"))
