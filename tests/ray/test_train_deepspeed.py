"""ZeRO through the train stage on real workers: killed on two of them, gone on with by one."""

from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from transformers import AutoModelForCausalLM

from alpaca_ray.train import metrics, trainer
from tests.plain import fine_tune
from tests.ray.test_train import KillOnce, begin, encoded


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train looks after its workers every 2 s; a test of seconds has no such patience."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")


def test_a_killed_run_goes_on_with_another_number_of_workers(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "deepspeed", "zero_stage": 3, "max_failures": 0}
    stage = begin(tmp_path, tiny_model, **options)
    with pytest.raises(ray.train.TrainingFailedError):
        trainer.train(stage, on_step=KillOnce(tmp_path, 5))
    again = begin(tmp_path, tiny_model, **options, num_workers=1)
    trainer.train(again)

    seen = metrics.read(again.run)
    expected = fine_tune(tiny_model, encoded(again.run), again.config.train)
    assert [row.step for row in seen] == [1, 2, 3, 4, 5, 6]
    assert [row.num_workers for row in seen] == [2, 2, 2, 2, 1, 1]
    assert [row.loss for row in seen] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [row.grad_norm for row in seen] == pytest.approx([norm for _, norm in expected], rel=1e-4)

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model, again.run.path("train/model")))
    assert all(p.isfinite().all() for p in after.parameters())
    assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
