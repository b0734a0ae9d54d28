"""The loop in a group of one process: the loss, the steps, what it refuses, checkpoints and the exported model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.models import load_tokenizer
from alpaca_ray.schema import Example
from alpaca_ray.train import export, model
from alpaca_ray.train.collate import collate
from alpaca_ray.train.encoding import Encoded, encode
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.loop import (
    NotFinite,
    StepMetrics,
    learning_rate,
    refuse_not_finite,
    total_steps,
    train,
)
from alpaca_ray.train.order import batch_ids
from alpaca_ray.train.packing import PackedRow
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
    assert [row.useful_share for row in seen] == pytest.approx([1.0] * 6)
    assert seen[-1].loss < seen[0].loss


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro", [1, 3])
def test_layout_and_activation_checkpointing_change_no_loss(
    tiny_model: Path, rows: list[Encoded], expected: list[tuple[float, float]], packing: bool, micro: int
) -> None:
    config = config_for(tiny_model, packing=packing, micro_batch_size=micro, activation_checkpointing=True)
    seen = run(build(config), rows, config)

    assert [row.loss for row in seen] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert all(row.useful_share == pytest.approx(1.0) for row in seen) == (packing or micro == 1)


@pytest.fixture
def graphs_only() -> Iterator[None]:
    """torch.compile traces and counts, and then runs what it has traced as it is: no C++ compiler."""
    counters.clear()
    torch.compiler.set_default_backend("eager")
    yield
    torch.compiler.set_default_backend(None)
    torch.compiler.reset()


@pytest.mark.usefixtures("graphs_only")
def test_recomputed_layers_are_compiled(
    tiny_model: Path, rows: list[Encoded], expected: list[tuple[float, float]]
) -> None:
    """dynamo leaves what it cannot trace as it was, and says nothing."""
    config = config_for(tiny_model, compile=True, activation_checkpointing=True)
    seen = run(build(config), rows, config)
    assert [row.loss for row in seen] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert counters["stats"]["calls_captured"] > 40  # of about 60 operations around attention


def test_alpacas_loss_is_the_mean_of_its_micro_batches_means(tiny_model: Path, rows: list[Encoded]) -> None:
    config = config_for(tiny_model, loss_normalization="micro_batch", packing=False, micro_batch_size=3, num_epochs=1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = [rows[i] for i in batch_ids(len(rows), 4, config.seed, 0)]
    means = [
        sum(plain(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss * e.num_targets for e in part)
        / sum(e.num_targets for e in part)
        for part in (batch[:3], batch[3:])
    ]
    loss = (means[0] + means[1]) / 2
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])

    seen = run(build(config), rows, config)
    assert seen[0].loss == pytest.approx(loss.item(), rel=1e-6)
    assert seen[0].grad_norm == pytest.approx(norm.item(), rel=1e-5)
    by_token = run(build(config_for(tiny_model, num_epochs=1)), rows, config_for(tiny_model, num_epochs=1))
    assert abs(seen[0].grad_norm / by_token[0].grad_norm - 1) > 1e-3  # so the two can be told apart


def test_adapters_are_trained_and_nothing_else(tiny_model: Path, rows: list[Encoded]) -> None:
    config = config_for(tiny_model, lora={"rank": 2})
    state = build(config)
    before = {name: weight.clone() for name, weight in state.weights().items()}
    seen = run(state, rows, config)
    changed = {name for name, weight in state.weights().items() if not torch.equal(weight, before[name])}

    assert seen[-1].loss < seen[0].loss
    assert changed == {name for name in before if "lora" in name}


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


def test_the_export_halves_in_bf16(tiny_model: Path, tmp_path: Path) -> None:
    state = build(config_for(tiny_model))
    weights, tokenizer = state.weights(), load_tokenizer(str(tiny_model))
    for dtype in ("float32", "bfloat16"):
        export.write(weights, state.model.config, tokenizer, dtype, tmp_path / dtype)

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    hashes = {export.directory_hash(tmp_path / dtype) for dtype in ("float32", "bfloat16")}
    assert len(hashes) == 2
    assert export.directory_hash(tmp_path / "float32") in hashes


def test_the_shards_are_decoder_layers(tiny_model: Path) -> None:
    state = build(config_for(tiny_model, compute_dtype="bfloat16"))
    groups = [name for name, module in state.model.named_modules() if isinstance(module, FSDPModule)]
    assert groups == ["", "model.layers.0", "model.layers.1"]
    weights = dict(state.model.named_parameters(remove_duplicate=False))
    assert weights["model.embed_tokens.weight"] is weights["lm_head.weight"]


def test_one_rank_in_fp32_has_nothing_to_shard(tiny_model: Path) -> None:
    state = build(config_for(tiny_model))
    assert not any(isinstance(module, FSDPModule) for module in state.model.modules())


def test_a_model_of_unknown_layers_is_refused(tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain._no_split_modules = ["NoSuchLayer"]
    with pytest.raises(UserError, match="NoSuchLayer"):
        model.decoder_layers(plain)


def test_a_model_that_cannot_be_packed_is_refused(tiny_model: Path) -> None:
    class Fixed(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return False

    config = config_for(tiny_model)
    with pytest.raises(UserError, match=r"Fixed's cannot.*train\.packing to false"):
        model.prepare(Fixed.from_pretrained(tiny_model), config)
    assert model.prepare(Fixed.from_pretrained(tiny_model), config_for(tiny_model, packing=False))


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


def test_padding_stands_behind_and_is_no_target() -> None:
    rows = [PackedRow((Encoded("a", [5, 6, 7], [-100, 6, 7]),)), PackedRow((Encoded("b", [8, 9], [-100, 9]),))]
    arguments = collate(rows, False, CPU)
    assert arguments["input_ids"][0].tolist() == [5, 6, 7]
    assert arguments["input_ids"][1, :2].tolist() == [8, 9]
    assert arguments["places"].tolist() == [0, 1, 3]
    assert arguments["targets"].tolist() == [6, 7, 9]


def test_packed_rows_have_no_padding_and_tell_where_documents_begin() -> None:
    rows = [PackedRow((Encoded("a", [5, 6, 7], [-100, 6, 7]), Encoded("b", [8, 9], [-100, 9]))), PackedRow()]
    arguments = collate(rows, True, CPU)
    assert arguments["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert arguments["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert arguments["max_length_q"] == 3
    assert arguments["places"].tolist() == [0, 1, 3]
    assert arguments["targets"].tolist() == [6, 7, 9]


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
