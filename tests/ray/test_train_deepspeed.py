"""ZeRO through the train stage on real workers: killed on two of them, gone on with by one."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from alpaca_ray.train import metrics, trainer
from alpaca_ray.train.loop import StepMetrics
from tests.plain import fine_tune
from tests.ray.test_train import begin, encoded


class Kill:
    """Kills rank 1 with SIGKILL after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, row: StepMetrics) -> None:
        if dist.get_rank() == 1 and row.step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_with_another_number_of_workers(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "deepspeed", "zero_stage": 3, "max_failures": 0}
    stage = begin(tmp_path, tiny_model, **options)
    with pytest.raises(ray.train.TrainingFailedError) as failed:
        trainer.train(stage, on_step=Kill(5))
    assert "goes on from there" in failed.value.__notes__[0]
    assert not stage.run.exists("train/manifest.json")
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
