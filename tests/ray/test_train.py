"""The train stage on two real workers: what it writes, that it agrees with plain torch, and what it refuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from alpaca_ray.artifacts import RunDirectory, Stage, open_run
from alpaca_ray.config import UserError
from alpaca_ray.models import load_tokenizer
from alpaca_ray.schema import EXAMPLE_SCHEMA, Example
from alpaca_ray.train import export, metrics, trainer
from alpaca_ray.train.encoding import Encoded, encode
from alpaca_ray.train.loop import StepMetrics
from tests import training
from tests.plain import fine_tune, sum_of_losses

ROOT = Path(__file__).parents[2]


def dataset() -> list[dict[str, Any]]:
    """2 held out, 1 too long: 11 in batches of 4, 4 and 3, so one rank gets a share of 1."""
    return [
        *training.dataset(13),
        {"id": "013", "instruction": "Say much", "input": "", "output": "word " * 500},
    ]


def begin(storage: Path, tiny_model: Path, **overrides: object) -> Stage:
    return training.begin(storage, tiny_model, dataset(), **overrides)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Stage:
    """A run that nothing interrupted."""
    stage = begin(tmp_path_factory.mktemp("done"), tiny_model)
    trainer.train(stage)
    return stage


def encoded(run: RunDirectory) -> list[Encoded]:
    return [Encoded(**row) for row in run.read_table("train/encoded.parquet").to_pylist()]


def test_two_workers_learn_what_one_plain_process_learns(done: Stage, tiny_model: Path) -> None:
    """A wrong scale of loss or gradients would show: AdamW hides it, the norm and the clipping do not."""
    seen = metrics.read(done.run)
    expected = fine_tune(tiny_model, encoded(done.run), done.config.train)

    assert [row.loss for row in seen] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [row.grad_norm for row in seen] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    assert seen[-1].loss < seen[0].loss


def test_every_example_is_accounted_for(done: Stage, tiny_model: Path) -> None:
    run, tokenizer = done.run, load_tokenizer(str(tiny_model))
    heldout, rejects = run.read_table("train/heldout.parquet"), run.read_table("train/rejects.parquet").to_pylist()
    rows = encoded(run)

    assert heldout.schema.equals(EXAMPLE_SCHEMA)
    assert [(r["id"], r["reason"]) for r in rejects] == [("013", "too_long")]
    assert sorted([*heldout["id"].to_pylist(), "013", *(row.id for row in rows)]) == [d["id"] for d in dataset()]
    assert rows == sorted(rows, key=lambda row: row.id)
    by_id = {d["id"]: Example(**d) for d in dataset()}
    assert all(row == encode(by_id[row.id], tokenizer, "alpaca", 256) for row in rows)


def test_the_manifest_and_the_checkpoints_say_what_was_done(done: Stage) -> None:
    manifest = done.run.read_json("train/manifest.json")
    rows = metrics.read(done.run)
    checkpoints = Path(done.run.path("train/checkpoints"))

    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert manifest["counts"] == {
        "examples": 11,
        "heldout": 2,
        "rejected": 1,
        "steps": 6,
        "first_loss": round(rows[0].loss, 4),
        "last_loss": round(rows[-1].loss, 4),
        "target_tokens": 2 * sum(row.num_targets for row in encoded(done.run)),
        "tokens_per_s": manifest["counts"]["tokens_per_s"],
    }
    assert manifest["outputs"] == {"model": export.directory_hash(Path(done.run.path("train/model")))}
    assert sorted(p.name for p in checkpoints.iterdir() if p.is_dir()) == ["step=000004", "step=000006"]


def test_the_job_finds_the_stage_done(done: Stage, tiny_model: Path) -> None:
    options = training.arguments(Path(done.config.storage_path), tiny_model)
    again = subprocess.run(
        [sys.executable, "jobs/train.py", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "train is done" in again.stdout


def test_a_cluster_without_room_is_an_error_in_time(tiny_model: Path, tmp_path: Path) -> None:
    stage = begin(tmp_path, tiny_model, num_workers=64, start_timeout_s=1.0)
    with pytest.raises(UserError, match=r"no room for 64 workers .* within 1 s; the cluster has 1 nodes"):
        trainer.train(stage)


class Holder:
    """An actor that does nothing but hold its room."""

    def is_there(self) -> bool:
        return True


def hold(num_cpus: int) -> Any:
    holder = ray.remote(Holder).options(
        num_cpus=num_cpus, name=f"holder of {num_cpus}", lifetime="detached", get_if_exists=True
    )
    return holder.remote()


class TakeTheRoom:
    """After a step, rank 1 takes what is free, asks for one CPU more, and dies: what it leaves goes to who waits.

    An actor waits at the node itself and gets what is freed at once. Were a place free, the run could restart there.
    """

    def __call__(self, row: StepMetrics) -> None:
        if dist.get_rank() == 1 and row.step == 3:
            ray.get(hold(2).is_there.remote())
            hold(1)
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_loses_its_room_for_good_is_an_error_in_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "4")
    stage = begin(tmp_path, tiny_model, start_timeout_s=8.0, max_failures=10)
    try:
        with pytest.raises(UserError, match=r"no room for 2 workers .* within 8 s; the cluster has 1 nodes"):
            trainer.train(stage, on_step=TakeTheRoom())
    finally:
        for name in ("holder of 2", "holder of 1"):
            ray.kill(ray.get_actor(name))


def test_the_heldout_loss_is_that_of_the_exported_model(done: Stage) -> None:
    rows = metrics.read(done.run)
    assert [row.step for row in rows if row.heldout_loss is not None] == [2, 4, 6]
    heldout = [Encoded(**row) for row in done.run.read_table("train/heldout_encoded.parquet").to_pylist()]
    plain = AutoModelForCausalLM.from_pretrained(done.run.path("train/model"))
    with torch.no_grad():
        expected = sum(float(sum_of_losses(plain, row)) for row in heldout) / sum(r.num_targets for r in heldout)
    assert rows[-1].heldout_loss == pytest.approx(expected, rel=1e-5)
    assert sorted(row.id for row in heldout) == done.run.read_table("train/heldout.parquet")["id"].to_pylist()


def test_a_dataset_of_rejects_is_refused_and_kept(tiny_model: Path, tmp_path: Path) -> None:
    stage = begin(tmp_path, tiny_model, max_length=100)
    with pytest.raises(UserError, match=r"no example is left to train on; rejected: \{'too_long': 12\}"):
        trainer.train(stage)
    assert len(stage.run.read_table("train/rejects.parquet")) == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"max_length": 4096}, "takes 2048 tokens at most"), ({"base_model": "/no/such/model"}, "is no model")],
)
def test_what_cannot_work_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    stage = begin(tmp_path, tiny_model, **overrides)
    with pytest.raises(UserError, match=message):
        trainer.train(stage)
    assert not stage.run.exists("train")


def test_training_needs_a_finished_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="generate"):
        trainer.inputs(open_run(str(tmp_path), "r"))


def test_a_diverging_run_ends_at_once_with_its_examples(tiny_model: Path, tmp_path: Path) -> None:
    stage = begin(tmp_path, tiny_model, learning_rate=1e30, num_workers=1)
    with pytest.raises(UserError, match=r"step 2: loss .*, gradient norm nan; examples \d+"):
        trainer.train(stage)
    assert [row.step for row in metrics.read(stage.run)] == [1]
