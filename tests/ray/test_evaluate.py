"""The stage on a real cluster: two tiny random models, a run directory that has what train leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from alpaca_ray import models
from alpaca_ray.artifacts import RunDirectory, Stage, begin_stage, open_run
from alpaca_ray.config import RunConfig, UserError
from alpaca_ray.evaluate import dataset
from alpaca_ray.evaluate.loss import answer_loss
from alpaca_ray.schema import EXAMPLE_SCHEMA, Example
from tests.tiny import write_tiny_model

HELDOUT = [("h0", "Name a colour.", "", "Red."), ("h1", "Add.", "1 and 2", "3"), ("h2", "Be long.", "", "long " * 99)]
INSTRUCTIONS = [
    ("u0", "Say hello.", "", "Hello!"),
    ("u1", "Translate.", "chat", "cat"),
    ("u2", "<b>Why?</b>", "", "So."),
]
# Three of the cluster's four CPUs: the second model has room only when the first is done.
ONE_AT_A_TIME = {"num_cpus": 3}


def write_instructions(path: Path, rows: list[tuple[str, str, str, str]] = INSTRUCTIONS) -> Path:
    tasks = [
        {"id": i, "motivation_app": "", "instruction": text, "instances": [{"input": given, "output": answer}]}
        for i, text, given, answer in rows
    ]
    path.write_text("\n".join(json.dumps(task) for task in tasks))
    return path


def config_of(tmp_path: Path, **evaluate: Any) -> RunConfig:
    evaluate = {"num_instructions": 2, "max_new_tokens": 6, "batch_size": 1, "placement": ONE_AT_A_TIME} | evaluate
    return RunConfig.model_validate(
        {
            "name": "run",
            "storage_path": str(tmp_path),
            "generate": {"num_instructions": 3},
            "train": {"base_model": "another/model"},  # what counts is the manifest's
            "evaluate": {"instructions": str(write_instructions(tmp_path / "tasks.jsonl")), **evaluate},
        }
    )


def distinct_model(directory: Path, seed: int) -> Path:
    """With larger weights than a fresh model's, which would repeat the last byte of any prompt."""
    model = models.load_model(str(write_tiny_model(directory, seed)), "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(directory)
    return directory


def loss_here(model: Path) -> float | None:
    """The held-out loss, computed in this process."""
    reference, examples = str(model), [Example(*row) for row in HELDOUT]
    return answer_loss(models.load_model(reference, "float32"), models.load_tokenizer(reference), examples, 400, 2).loss


def run_after_training(tmp_path: Path) -> RunDirectory:
    """A run whose train stage is done, with two different models."""
    base, trained = (distinct_model(tmp_path / name, seed) for seed, name in enumerate(("base", "trained")))
    run = open_run(str(tmp_path), "run")
    run.upload(trained, "train/model")
    rows = [dict(zip(EXAMPLE_SCHEMA.names, row, strict=True)) for row in HELDOUT]
    run.write_table("train/heldout.parquet", pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA))
    manifest = {"config": {"base_model": str(base), "max_length": 400}, "outputs": {"model": "0123456789abcdef"}}
    run.write_json("train/manifest.json", manifest)
    return run


def begin(run: RunDirectory, config: RunConfig) -> Stage:
    return begin_stage(run, config, "evaluate", dataset.inputs(run, config.evaluate))


def test_the_stage_from_models_to_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, config = run_after_training(tmp_path), config_of(tmp_path)
    caplog.set_level("INFO", logger="alpaca_ray")
    stage = begin(run, config)
    dataset.evaluate(stage)

    scores = run.read_json("evaluate/scores.json")
    heldout, reference = scores["losses"]["heldout"], scores["losses"]["reference"]
    assert heldout["after"]["examples"] == 2
    assert heldout["after"]["skipped_too_long"] == 1  # 495 bytes of answer
    assert heldout["after"]["target_tokens"] == len("Red.") + len("3") + 2  # a byte a token, and two EOS
    assert reference["before"]["examples"] == 2
    assert heldout["before"]["loss"] == pytest.approx(loss_here(tmp_path / "base"), rel=1e-4)
    assert heldout["after"]["loss"] == pytest.approx(loss_here(tmp_path / "trained"), rel=1e-4)
    assert heldout["before"]["loss"] != pytest.approx(heldout["after"]["loss"], rel=1e-2)
    for losses in (heldout, reference):
        assert losses["difference"] == pytest.approx(losses["after"]["loss"] - losses["before"]["loss"])
        assert losses["difference_standard_error"] > 0

    responses = run.read_table("evaluate/responses").to_pylist()
    assert [row["id"] for row in responses] == ["u0", "u1"]
    assert [row["reference"] for row in responses] == ["Hello!", "cat"]
    assert all(row["base"] != row["trained"] for row in responses)
    assert all(row["base_num_tokens"] <= 6 for row in responses)

    page = run.read_bytes("evaluate/report.html").decode()
    assert "Say hello." in page
    assert "from 2 examples only" in page

    assert stage.manifest is not None
    assert stage.manifest["counts"]["heldout_loss_after"] == round(heldout["after"]["loss"], 4)
    assert stage.manifest["counts"]["responses"] == 2
    assert set(stage.manifest["outputs"]) == {"scores.json"}
    assert "evaluate: trained model, responses: 2 of 2" in caplog.text
    assert begin(run, config).manifest == stage.manifest


def test_a_model_that_is_gone_is_a_user_error_and_the_stage_is_not_done(tmp_path: Path) -> None:
    run, config = run_after_training(tmp_path), config_of(tmp_path)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"base.* is no model"):
        dataset.evaluate(begin(run, config))
    assert begin(run, config).manifest is None


def test_before_training_it_names_the_job_to_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(UserError, match=r"jobs/train\.py"):
        begin(open_run(str(tmp_path), "run"), config)


def test_a_broken_instruction_is_named_by_file_line_and_field(tmp_path: Path) -> None:
    run, config = run_after_training(tmp_path), config_of(tmp_path)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(tasks.read_text() + '\n{"id": "u3", "motivation_app": "", "instruction": "", "instances": []}')
    with pytest.raises(UserError, match=r"tasks\.jsonl, line 4, field instruction"):
        begin(run, config)
