"""Trackers: what they are given, what is kept from them, and that none of them can stop a run."""

import importlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from alpaca_ray.config import UserError
from alpaca_ray.train.trackers import HIDDEN, Trackers, check, hide

LENGTH_BYTES, CHECKSUM_BYTES = 8, 4  # of a record in an event file


class Kept:
    """A tracker that keeps what it is given, and fails when it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.config: Mapping[str, Any] = {}
        self.steps: dict[int, dict[str, float]] = {}
        self.closed = 0
        self._fails_at = fails_at

    def make(self, _run_name: str, config: Mapping[str, Any], _directory: Path) -> "Kept":
        self.config = config
        return self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise ConnectionError("no answer from https://user:pass@tracker.example/api?key=abc")
        self.steps[step] = dict(values)

    def close(self) -> None:
        self.closed += 1


def start(directory: Path, config: Mapping[str, Any] | None = None, **kept: Kept) -> Trackers:
    # The package of tensorboard is there whatever is tested: the names of the others would be refused without theirs.
    makers = {"tensorboard": next(iter(kept.values())).make}
    return Trackers.start(["tensorboard"], "run", config or {}, directory, makers)


def test_each_step_reaches_the_tracker_without_what_is_no_number(tmp_path: Path) -> None:
    kept = Kept()
    started = start(tmp_path, kept=kept)
    started.log(1, {"loss": 2.0, "mfu": None, "grad_norm": math.nan, "heldout_loss": math.inf})
    started.log(2, {"loss": 1.0})
    started.close()

    assert kept.steps == {1: {"loss": 2.0}, 2: {"loss": 1.0}}
    assert kept.closed == 1


def test_a_tracker_that_fails_is_switched_off_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(fails_at=2)
    started = start(tmp_path, kept=kept)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            started.log(step, {"loss": 1.0})
        started.close()

    assert kept.steps == {1: {"loss": 1.0}}
    assert kept.closed == 0
    assert len(caplog.messages) == 1
    assert "tensorboard is switched off: ConnectionError" in caplog.messages[0]
    assert "pass" not in caplog.messages[0]
    assert "abc" not in caplog.messages[0]


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> Kept:
        raise RuntimeError("not logged in")

    with caplog.at_level(logging.WARNING):
        started = Trackers.start(["tensorboard"], "run", {}, tmp_path, {"tensorboard": refuse})
        started.log(1, {"loss": 1.0})
        started.close()

    assert caplog.messages == ["tensorboard is switched off: RuntimeError: not logged in"]


def test_one_that_fails_leaves_the_others_on(tmp_path: Path) -> None:
    bad, good = Kept(fails_at=1), Kept()
    started = Trackers({"wandb": bad, "mlflow": good})
    for step in (1, 2):
        started.log(step, {"loss": 1.0})
    started.close()

    assert sorted(good.steps) == [1, 2]
    assert (bad.closed, good.closed) == (0, 1)


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"train\.trackers names wandb.*pip install no_such_package"):
        check(["tensorboard", "wandb"], {"tensorboard": "tensorboardX", "wandb": "no_such_package"})
    check(["tensorboard"])  # comes with ray[train]


@pytest.mark.parametrize("name", ["api_key", "OPENAI_API_KEY", "password", "hub_token", "credentials", "secret"])
def test_secrets_are_hidden_by_their_names(tmp_path: Path, name: str) -> None:
    kept = Kept()
    start(tmp_path, {"provider": {name: "hunter2"}, "lora": None}, kept=kept)
    assert kept.config == {"provider": {name: HIDDEN}, "lora": None}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("s3://me:hunter2@bucket/model", f"s3://{HIDDEN}@bucket/model"),
        (["https://host/m?sig=hunter2&n=1"], [f"https://host/m?{HIDDEN}&{HIDDEN}"]),
    ],
)
def test_secrets_are_hidden_in_addresses(value: object, shown: object) -> None:
    assert hide(value) == shown


def test_nothing_else_is_hidden() -> None:
    config = {"base_model": "huggyllama/llama-7b", "max_new_tokens": 5, "num_keys": 1, "target_tokens": [1, 2]}
    assert hide(config) == config


def events(directory: Path) -> list[Any]:
    """What the event files hold, in their order."""
    event = importlib.import_module("tensorboardX.proto.event_pb2").Event  # it has no type hints
    found = []
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:LENGTH_BYTES], "little")
            start = LENGTH_BYTES + CHECKSUM_BYTES
            found.append(event.FromString(data[start : start + length]))
            data = data[start + length + CHECKSUM_BYTES :]
    return found


def test_tensorboard_gets_every_step_and_the_config(tmp_path: Path) -> None:
    started = Trackers.start(["tensorboard"], "run", {"seed": 3, "placement": {"num_cpus": 2}}, tmp_path)
    for step in (5, 6):
        started.log(step, {"loss": 1.0 / step, "num_workers": 2})
    started.close()

    seen = events(tmp_path)
    scalars = {(e.step, v.tag): v.simple_value for e in seen for v in e.summary.value if v.HasField("simple_value")}
    texts = [t.decode() for e in seen for v in e.summary.value for t in v.tensor.string_val]
    assert {step for step, _ in scalars} == {5, 6}
    assert scalars[5, "train/loss"] == pytest.approx(0.2)
    assert len(texts) == 1
    assert "placement.num_cpus: 2" in texts[0]
    assert "seed: 3" in texts[0]
