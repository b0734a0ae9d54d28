"""The loop in a group of one process: the loss, the steps, what it refuses, checkpoints and the exported model."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.fs
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.models import load_tokenizer
from alpaca_ray.prompts import alpaca_prompt
from alpaca_ray.schema import Example
from alpaca_ray.train import export, metrics, model
from alpaca_ray.train.encoding import Encoded, encode
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.loop import (
    NotFinite,
    StepMetrics,
    collate,
    learning_rate,
    micro_batches,
    refuse_not_finite,
    total_steps,
    train,
)
from tests.plain import fine_tune

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> list[Encoded]:
    tokenizer = load_tokenizer(str(tiny_model))
    demonstrations = [Example(f"{i}", f"Say {i}", "", "word " * (1 + i % 4)) for i in range(11)]
    return [r for e in demonstrations if isinstance(r := encode(e, tokenizer, "alpaca", 512), Encoded)]


def config_for(tiny_model: Path, **values: object) -> TrainConfig:
    defaults = {
        "base_model": str(tiny_model),
        "num_epochs": 2,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "compute_dtype": "float32",
    }
    return TrainConfig.model_validate(defaults | values)


def build(config: TrainConfig) -> Fsdp:
    return Fsdp(model.load(config), config, model.make_mesh("cpu", 1))


def run(state: Fsdp, rows: Sequence[Encoded], config: TrainConfig) -> list[StepMetrics]:
    seen: list[StepMetrics] = []
    train(state, rows, config, seen.append, lambda: None)
    return seen


@pytest.fixture(scope="module")
def expected(tiny_model: Path, rows: list[Encoded]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step in a plain loop."""
    return fine_tune(tiny_model, rows, config_for(tiny_model))


def test_loss_and_gradient_are_those_of_a_plain_loop(
    tiny_model: Path, rows: list[Encoded], expected: list[tuple[float, float]]
) -> None:
    config = config_for(tiny_model)
    seen = run(build(config), rows, config)

    assert [row.loss for row in seen] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [row.grad_norm for row in seen] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    assert [row.step for row in seen] == [1, 2, 3, 4, 5, 6]
    assert sum(row.target_tokens for row in seen) == 2 * sum(row.num_targets for row in rows)
    assert seen[-1].loss < seen[0].loss


def test_bf16_computes_and_fp32_remembers(
    tiny_model: Path, rows: list[Encoded], expected: list[tuple[float, float]]
) -> None:
    config = config_for(tiny_model, compute_dtype="bfloat16")
    state = build(config)
    seen = run(state, rows, config)

    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert [row.loss for row in seen] == pytest.approx([loss for loss, _ in expected], rel=1e-2)


def test_a_resumed_run_equals_the_uninterrupted_one(tiny_model: Path, rows: list[Encoded], tmp_path: Path) -> None:
    config = config_for(tiny_model, checkpoint_every_steps=4)
    state = build(config)
    whole: list[StepMetrics] = []
    train(state, rows, config, whole.append, lambda: state.save(tmp_path / f"{state.step}").wait())

    resumed = build(config)
    resumed.load(tmp_path / "4")
    assert resumed.step == 4
    rest = run(resumed, rows, config)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]
    assert [(row.step, row.loss, row.grad_norm) for row in rest] == [
        (row.step, row.loss, row.grad_norm) for row in whole[4:]
    ]


def test_the_exported_model_is_the_trained_one(tiny_model: Path, rows: list[Encoded], tmp_path: Path) -> None:
    config = config_for(tiny_model)
    state = build(config)
    run(state, rows, config)
    input_ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        trained = state.model(input_ids).logits

    export.write(state.gather(), state.model.config, load_tokenizer(str(tiny_model)), "float32", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    generation = GenerationConfig.from_pretrained(tmp_path)

    assert isinstance(plain, LlamaForCausalLM)
    with torch.no_grad():
        assert torch.equal(plain(input_ids).logits, trained)
    assert plain.config.use_cache
    assert plain.config.architectures == ["LlamaForCausalLM"]
    assert generation.eos_token_id == tokenizer.eos_token_id == plain.config.eos_token_id
    chat = [{"role": "user", "content": "Say 1"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == alpaca_prompt("Say 1")


def test_the_export_halves_in_bf16(tiny_model: Path, tmp_path: Path) -> None:
    state = build(config_for(tiny_model))
    weights, tokenizer = state.gather(), load_tokenizer(str(tiny_model))
    for dtype in ("float32", "bfloat16"):
        export.write(weights, state.model.config, tokenizer, dtype, tmp_path / dtype)

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    hashes = {export.directory_hash(tmp_path / dtype) for dtype in ("float32", "bfloat16")}
    assert len(hashes) == 2
    assert export.directory_hash(tmp_path / "float32") in hashes


def test_the_shards_are_decoder_layers(tiny_model: Path) -> None:
    state = build(config_for(tiny_model))
    groups = [name for name, module in state.model.named_modules() if isinstance(module, FSDPModule)]
    assert groups == ["", "model.layers.0", "model.layers.1"]
    weights = dict(state.model.named_parameters(remove_duplicate=False))
    assert weights["model.embed_tokens.weight"] is weights["lm_head.weight"]


def test_a_model_of_unknown_layers_is_refused(tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain._no_split_modules = ["NoSuchLayer"]
    with pytest.raises(UserError, match="NoSuchLayer"):
        model.decoder_layers(plain)


def test_a_loss_that_is_no_number_stops_the_run_before_the_step(tiny_model: Path, rows: list[Encoded]) -> None:
    config = config_for(tiny_model)
    state = build(config)
    with torch.no_grad():
        next(state.model.parameters()).mul_(float("nan"))
    with pytest.raises(NotFinite, match=r"step 1: loss nan.* examples \d+, \d+, \d+, \d+\."):
        run(state, rows, config)
    assert state.step == 0


@pytest.mark.parametrize(("loss", "norm"), [(float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_an_infinite_gradient_is_refused_too(rows: list[Encoded], loss: float, norm: float) -> None:
    with pytest.raises(NotFinite, match="step 7"):
        refuse_not_finite(loss, norm, 7, rows[:1])


@given(num=st.integers(1, 40), micro=st.integers(1, 5), world_size=st.integers(1, 9))
def test_ranks_share_a_batch_and_keep_in_step(num: int, micro: int, world_size: int) -> None:
    batch = [Encoded(f"{i}", [1, 2], [-100, 2]) for i in range(num)]
    shares = [micro_batches(batch, micro, rank, world_size) for rank in range(world_size)]

    assert len({len(share) for share in shares}) == 1
    assert sorted(int(row.id) for share in shares for rows in share for row in rows) == list(range(num))
    assert all(len(rows) <= micro for share in shares for rows in share)


def test_padding_is_seen_by_nobody() -> None:
    input_ids, attention_mask, labels = collate(
        [Encoded("a", [5, 6, 7], [-100, 6, 7]), Encoded("b", [8, 9], [-100, 9])], CPU
    )
    assert input_ids[0].tolist() == [5, 6, 7]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_an_empty_share_has_no_target() -> None:
    _, _, labels = collate([], CPU)
    assert labels.shape == (1, 2)
    assert set(labels.flatten().tolist()) == {-100}


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.25])
def test_the_schedule_is_transformers_one_step_ahead(tiny_model: Path, warmup_ratio: float) -> None:
    config = config_for(tiny_model, warmup_ratio=warmup_ratio)
    num_steps, warmup = 40, {0.0: 0, 0.03: 2, 0.25: 10}[warmup_ratio]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    theirs = []
    for _ in range(num_steps):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [learning_rate(step, num_steps, config) for step in range(num_steps)]

    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert all(rate > 0 for rate in ours)


def test_steps_are_counted_over_epochs(tiny_model: Path) -> None:
    assert total_steps(52_002, config_for(tiny_model, num_epochs=3, global_batch_size=128)) == 3 * 407


def metric(step: int) -> StepMetrics:
    return StepMetrics(step, 2.0, 1e-5, 1.0, 10, 20.0, 90.0)


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    directory = RunDirectory(pyarrow.fs.LocalFileSystem(), str(tmp_path))
    first = metrics.MetricsLog(directory, first_step=0, num_steps=6)
    for step in (1, 2, 3, 4, 5):
        first.add(metric(step))
    first.write()

    second = metrics.MetricsLog(directory, first_step=4, num_steps=6)
    for step in (5, 6):
        second.add(metric(step))
    second.write()

    lines = (tmp_path / "train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert metrics.read(directory) == [metric(step) for step in range(1, 7)]


def test_the_progress_line_says_how_long_it_takes() -> None:
    assert metrics.progress(metric(10), 90) == "step 10/90: loss 2.0000, 20 tokens/s, 2:00:00 left"
