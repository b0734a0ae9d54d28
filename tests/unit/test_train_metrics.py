"""The rows of metrics.jsonl, the progress line, and the count of operations behind the MFU."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import TrainConfig
from alpaca_ray.train import metrics
from alpaca_ray.train.encoding import ENCODED_SCHEMA, Encoded
from alpaca_ray.train.examples import Examples
from alpaca_ray.train.metrics import MetricsLog, Row


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(pyarrow.fs.LocalFileSystem(), str(tmp_path))


def row(step: int) -> Row:
    return Row(step, 2.0, 1e-5, 1.0, 10, 20.0, 90.0)


def test_a_resumed_run_writes_no_step_twice(run: RunDirectory) -> None:
    first = MetricsLog(run, first_step=0, num_steps=6)
    for step in (1, 2, 3, 4, 5):
        first.add(row(step))
    first.write()
    second = MetricsLog(run, first_step=4, num_steps=6)
    for step in (5, 6):
        second.add(row(step))
    second.write()
    assert metrics.read(run) == [row(step) for step in range(1, 7)]


def test_what_was_not_measured_is_not_written(run: RunDirectory) -> None:
    written = replace(row(1), heldout_loss=0.0)  # zero is a value
    log = MetricsLog(run, 0, 1)
    log.add(written)
    log.write()
    [line] = [json.loads(line) for line in run.read_bytes(metrics.PATH).decode().splitlines()]
    assert line["heldout_loss"] == 0.0
    assert "mfu" not in line
    assert metrics.read(run) == [written]


def test_rows_are_kept_on_disk_now_and_then(run: RunDirectory) -> None:
    now = 0.0
    log = MetricsLog(run, 0, 100, now_s=lambda: now)
    log.add(row(1))
    now = metrics.WRITE_EVERY_S / 2
    log.add(row(2))
    assert [r.step for r in metrics.read(run)] == [1]
    now = metrics.WRITE_EVERY_S
    log.add(row(3))
    assert [r.step for r in metrics.read(run)] == [1, 2, 3]


def test_the_progress_line_says_how_long_it_takes() -> None:
    slow = replace(row(9), step_time_s=900.0)  # one slow step does not move the middle
    recent = [row(8), slow, replace(row(10), heldout_loss=1.5, mfu=0.5)]
    assert metrics.progress([row(10)], 90) == "step 10/90: loss 2.0000, 20 tokens/s, 2:00:00 left"
    assert metrics.progress(recent, 90).endswith("loss 2.0000, held-out 1.5000, 20 tokens/s, MFU 50.0%, 2:00:00 left")


@pytest.mark.parametrize("tied", [True, False])
def test_the_operations_are_those_that_torch_counts(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    length = 32
    ids = torch.randint(0, 512, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    # The counter sees attention over the whole square; half of it is masked.
    attention = 6 * config.num_hidden_layers * config.hidden_size * length
    expected = counter.get_total_flops() / length - attention
    assert metrics.flops_per_token(model, length) == pytest.approx(expected, rel=0.02)


def test_utilization_is_a_share_of_all_devices() -> None:
    config = TrainConfig(base_model="x", peak_tflops=2.0)
    assert metrics.utilization(row(1), 1e11, 2, config) == pytest.approx(20 * 1e11 / 4e12)
    assert metrics.utilization(row(1), 1e11, 2, TrainConfig(base_model="x")) is None


def test_examples_are_read_from_the_table_as_they_were_written() -> None:
    rows = [Encoded("a", [1, 2, 3], [-100, 2, 3]), Encoded("b", [4], [-100])]
    examples = Examples(pa.Table.from_pylist([vars(r) for r in rows], schema=ENCODED_SCHEMA))
    assert list(examples) == rows
    assert examples[0:1] == rows[:1]
    assert len(examples) == 2
    assert examples.mean_length == (9 + 1) / 4
    assert examples.read_s > 0
