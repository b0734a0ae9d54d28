"""The estimate against the bytes of real tensors, what it refuses, and what the command prints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from alpaca_ray import cli
from alpaca_ray.config import LoraConfig, TrainConfig, UserError
from alpaca_ray.settings import load_config, recipe_names
from alpaca_ray.train import estimate, memory, model
from alpaca_ray.train.collate import collate
from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded
from alpaca_ray.train.estimate import GIB
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.memory import Memory
from alpaca_ray.train.packing import PackedRow

WORLD_SIZE = 8
LENGTH = 128


@pytest.fixture(scope="module", autouse=True)
def first_of_eight() -> Iterator[None]:
    """This process is rank 0 of eight; the others are made up, and collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(shapes).save_pretrained(directory)
    return directory


def local_bytes(tensors: list[Tensor]) -> int:
    here = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in here)


def measured(config: TrainConfig) -> dict[str, int]:
    """Bytes of the tensors that one real step of the real strategy holds on this rank."""
    state = Fsdp(model.load(config), config, model.make_mesh("cpu", WORLD_SIZE))
    state.model.train()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if not is_weight and tensor.shape[-1:] != (1000,):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    half = LENGTH // 2
    rows = [
        PackedRow((Encoded(f"{i}", [5] * (LENGTH - i), [IGNORE_INDEX] * (half - i) + [5] * half),))
        for i in range(config.micro_batch_size)
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = state.model(**collate(rows, config.packing, torch.device("cpu")))
    activations = sum(t.untyped_storage().nbytes() for t in kept.values())
    state.backward(loss, last=True)
    trained = [p for p in state.model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    state.optimizer.step()
    moments = [s[name] for s in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "parameters": local_bytes(list(state.model.parameters())),
        "gradients": local_bytes(gradients),
        "optimizer": local_bytes(moments),
        "activations": activations,
    }


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"activation_checkpointing": True},
        {"lora": {"rank": 8}},
        {"compute_dtype": "bfloat16", "micro_batch_size": 1},
        {"packing": False, "micro_batch_size": 4},
    ],
)
def test_it_is_within_a_tenth_of_real_tensors(llama: Path, values: dict[str, Any]) -> None:
    defaults = {"base_model": str(llama), "compute_dtype": "float32", "micro_batch_size": 2, "max_length": LENGTH}
    config = TrainConfig.model_validate(defaults | values)
    real = measured(config)
    shapes = estimate.shapes_of(str(llama))
    told = memory.per_rank(config, shapes, WORLD_SIZE, memory.activations(config, shapes, "cpu"))

    assert {name: getattr(told, name) for name in real} == pytest.approx(real, rel=0.1)
    assert sum(getattr(told, name) for name in real) == pytest.approx(sum(real.values()), rel=0.1)


def need(**values: Any) -> Memory:
    config = TrainConfig.model_validate({"base_model": "huggyllama/llama-7b", "micro_batch_size": 2} | values)
    kept = memory.activations(config, small(), "cuda")
    return memory.per_rank(config, small(), values.get("num_workers", 8), kept)


def small() -> PreTrainedConfig:
    shapes = estimate.shapes_of("huggyllama/llama-7b")
    shapes.num_hidden_layers = 4
    return shapes


def test_what_saves_memory_saves_it_where_it_says() -> None:
    plain = need()
    twice = need(num_workers=16)
    assert twice.parameters == pytest.approx(plain.parameters / 2, rel=1e-3)
    assert twice.activations == plain.activations
    assert need(activation_checkpointing=True).activations < 0.25 * plain.activations
    assert need(micro_batch_size=1).activations == pytest.approx(plain.activations / 2, rel=0.05)
    offloaded = need(cpu_offload=True)
    assert offloaded.parameters == offloaded.optimizer == 0
    assert offloaded.host == plain.parameters + plain.gradients + plain.optimizer
    adapted = need(lora=LoraConfig())
    assert adapted.optimizer < 0.05 * plain.optimizer
    assert adapted.parameters == pytest.approx(plain.parameters / 2, rel=0.05)  # the base in bf16
    one, two, three = (need(strategy="deepspeed", zero_stage=stage) for stage in (1, 2, 3))
    assert one.device > two.device > three.device
    assert one.optimizer == two.optimizer == three.optimizer


def test_a_launch_that_cannot_fit_is_refused_with_what_would() -> None:
    config = TrainConfig(base_model="huggyllama/llama-7b", num_workers=2)
    fits = need(micro_batch_size=4, num_workers=2).device / (1 - estimate.RESERVED_SHARE)
    estimate.refuse_unfit(config, small(), int(fits) + GIB)
    with pytest.raises(UserError, match=r"2 workers needs .* GiB on each GPU") as refused:
        estimate.refuse_unfit(config, small(), int(fits) - GIB)
    for remedy in (
        "activation_checkpointing true",
        "micro_batch_size 1",
        "cpu_offload true",
        "num_workers 4",
        "lora rank 16",
    ):
        assert f"train.{remedy}" in str(refused.value)
    with pytest.raises(UserError, match="Choose a larger GPU or a smaller model"):
        estimate.refuse_unfit(config, small(), GIB // 2)


def test_where_no_change_is_enough_they_are_taken_together() -> None:
    config = TrainConfig(base_model="huggyllama/llama-7b", lora=LoraConfig(), num_workers=1)
    both = need(lora=LoraConfig(), num_workers=1, micro_batch_size=1, activation_checkpointing=True, cpu_offload=True)
    told = list(estimate.what_fits(config, small(), 1, both.device))
    assert len(told) == 1
    assert told[0].startswith("train.activation_checkpointing true, train.micro_batch_size 1, train.cpu_offload true (")


def test_the_published_recipe_on_eight_a100(capsys: pytest.CaptureFixture[str]) -> None:
    """Arithmetic on paper: 21.6M tokens are 8.7e17 operations, 12 minutes on 8 A100 at half their peak."""
    assert (
        cli.main(["estimate", "--recipe=alpaca_7b", "--gpu=a100-80gb", "--mfu=0.5", "--train.heldout-fraction=0.001"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "6.74B parameters, all trained, on 8 x a100-80gb, FSDP2" in printed
    assert "0 h 12 min" in printed
    for word in ("fits", "cost", "$", "MFU 50% of 312 TFLOP/s", "read 2026-", "tokens each, 3 epochs"):
        assert word in printed


def test_one_that_does_not_fit_says_so_by_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "--recipe=alpaca_7b", "--gpu=rtx4090-24gb"]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "train.activation_checkpointing true" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe=alpaca_7b", "--gpu=a100-80g"], "did you mean 'a100-80gb'"),
        (["--recipe=alpaca_7b", "--mfu=40"], "--mfu is a share"),
        (["--recipe=alpaca_7b", "--train.sede=1"], "did you mean '--train.seed'"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", *options]) == 2
    assert message in capsys.readouterr().err


def test_other_commands_take_no_overrides() -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--train.seed=1"])


def test_the_recipes_are_the_published_ones_and_fit_their_gpus() -> None:
    seven, thirteen = (load_config([f"--recipe=alpaca_{size}"]).train for size in ("7b", "13b"))
    assert (seven.learning_rate, seven.num_epochs) == (2e-5, 3)
    assert (thirteen.learning_rate, thirteen.num_epochs) == (1e-5, 5)
    for train in (seven, thirteen):
        assert (train.global_batch_size, train.max_length, train.warmup_ratio, train.weight_decay) == (
            128,
            512,
            0.03,
            0,
        )
    assert {"alpaca_7b", "alpaca_13b", "lora_7b_1gpu", "tiny_cpu"} <= set(recipe_names())
    for recipe, gpu in (("alpaca_13b", "a100-80gb"), ("lora_7b_1gpu", "a10g-24gb")):
        config = load_config([f"--recipe={recipe}"])
        result = estimate.estimate(config, estimate.gpu_named(gpu), estimate.Basis())
        assert result.fits, recipe


def test_the_gpu_table_names_the_source_of_each_price() -> None:
    for gpu in estimate.gpus().values():
        assert (gpu.usd_per_hour is None) == (gpu.read is None) == (gpu.source == "")
