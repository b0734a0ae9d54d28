"""Training on GPUs: NCCL, bf16, compiled layers, packed attention, checkpoints, and a step of a model of 1B weights.

pytest -m gpu

What needs no GPU runs on the CPU too, in a group of one and on a tiny model, so that this file cannot rot.
"""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_ray.config import TrainConfig
from alpaca_ray.train import loop, model
from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded
from alpaca_ray.train.fsdp import Fsdp
from tests.gpu.ranks import on_ranks
from tests.plain import fine_tune

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])
on_both = pytest.mark.parametrize("device", ["cpu", CUDA])
on_gpu = pytest.mark.parametrize("device", [CUDA])

VOCABULARY = 259  # of the tiny model
GLOBAL_BATCH = 8
ONE_BILLION = {  # TinyLlama's shape (Zhang et al. 2024), 1.1B weights
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
ONE_BILLION_BYTES = 24e9  # masters, gradients and AdamW 17.6 GB, and room for activations and bf16 copies
TINY = {
    **ONE_BILLION, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def rows(num: int, longest: int, vocabulary: int = VOCABULARY) -> list[Encoded]:
    """Random tokens, half of them a prompt."""
    rng = random.Random(0)
    made = []
    for i in range(num):
        ids = [rng.randrange(3, vocabulary) for _ in range(rng.randint(4, longest))]
        half = len(ids) // 2
        made.append(Encoded(f"{i:03d}", ids, [IGNORE_INDEX] * half + ids[half:]))
    return made


def config_for(directory: Path, **values: Any) -> TrainConfig:
    defaults = {
        "base_model": str(directory), "num_epochs": 2, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2,
        "max_length": 64, "learning_rate": 1e-3, "warmup_ratio": 0.0, "compute_dtype": "float32",
    }  # fmt: skip
    return TrainConfig.model_validate(defaults | values)


def build(config: TrainConfig, device: str) -> Fsdp:
    state = Fsdp(model.load(config), config, model.make_mesh(device, dist.get_world_size()))
    state.model.train()
    return state


def train(device: str, config: TrainConfig) -> dict[str, Any]:
    """The losses and gradient norms of a run, and what the masters are."""
    state, seen = build(config, device), list[loop.StepMetrics]()
    loop.train(state, rows(24, 60), config, seen.append, lambda: None)
    return {
        "losses": [row.loss for row in seen],
        "norms": [row.grad_norm for row in seen],
        "master": sorted({f"{p.dtype} {p.device.type}" for p in state.model.parameters()}),
        "world_size": dist.get_world_size(),
    }


def interrupt(device: str, config: TrainConfig, directory: Path) -> list[list[float]]:
    """Losses of the last steps: of a run that saves in the middle and goes on, and of one that starts from there."""
    examples, num_steps = rows(GLOBAL_BATCH, 60), 4
    whole = build(config, device)
    losses = [loop.train_step(whole, examples, num_steps, config).loss for _ in range(2)]
    saved = whole.save(directory)
    losses += [loop.train_step(whole, examples, num_steps, config).loss for _ in range(2)]  # while it is written
    saved.wait()
    dist.barrier()
    resumed = build(config, device)
    resumed.load(directory)
    assert resumed.step == 2
    return [losses[2:], [loop.train_step(resumed, examples, num_steps, config).loss for _ in range(2)]]


def steps_of_a_large_model(device: str, directory: Path, shape: dict[str, int]) -> list[float]:
    """Losses of three steps on one batch, with activation checkpointing in bf16."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        plain = LlamaForCausalLM(LlamaConfig(**shape))  # type: ignore[arg-type]
        plain.bfloat16().save_pretrained(directory)
    dist.barrier()
    config = config_for(
        directory, activation_checkpointing=True, compute_dtype="bfloat16", max_length=512, learning_rate=1e-4
    )
    state, examples = build(config, device), rows(GLOBAL_BATCH, shape["hidden_size"] // 4, shape["vocab_size"])
    return [loop.train_step(state, examples, 100, config).loss for _ in range(3)]


@on_both
def test_losses_and_gradients_are_those_of_plain_torch(device: str, tiny_model: Path) -> None:
    config = config_for(tiny_model)
    expected = fine_tune(tiny_model, rows(24, 60), config)
    seen = on_ranks(device, train, device, config)

    # the GPU's matrix products add up in another order than the CPU's
    assert seen["losses"] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert seen["norms"] == pytest.approx([norm for _, norm in expected], rel=1e-3)
    assert seen["world_size"] == (torch.cuda.device_count() if device == "cuda" else 1)


@on_both
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_packed_rows_have_the_losses_of_unpacked_ones(device: str, compute_dtype: str, tiny_model: Path) -> None:
    packed, padded = (
        on_ranks(device, train, device, config_for(tiny_model, compute_dtype=compute_dtype, packing=packing))
        for packing in (True, False)
    )
    assert packed["losses"] == pytest.approx(padded["losses"], rel=1e-5 if compute_dtype == "float32" else 1e-2)
    assert packed["losses"][-1] < packed["losses"][0]


@on_both
def test_bf16_computes_and_fp32_remembers(device: str, tiny_model: Path) -> None:
    exact, short = (
        on_ranks(device, train, device, config_for(tiny_model, compute_dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    assert short["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    assert short["losses"] != exact["losses"]
    assert short["master"] == [f"torch.float32 {device}"]


@on_both
def test_activation_checkpointing_changes_no_loss(device: str, tiny_model: Path) -> None:
    kept, recomputed = (
        on_ranks(device, train, device, config_for(tiny_model, activation_checkpointing=on)) for on in (False, True)
    )
    assert recomputed["losses"] == pytest.approx(kept["losses"], rel=1e-6)


@on_gpu
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_compiled_layers_have_the_same_losses(device: str, compute_dtype: str, tiny_model: Path) -> None:
    plain, compiled = (
        on_ranks(device, train, device, config_for(tiny_model, compute_dtype=compute_dtype, compile=on))
        for on in (False, True)
    )
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4 if compute_dtype == "float32" else 1e-2)


@on_gpu
def test_masters_in_host_memory_have_the_same_losses(device: str, tiny_model: Path) -> None:
    kept, offloaded = (on_ranks(device, train, device, config_for(tiny_model, cpu_offload=on)) for on in (False, True))
    assert offloaded["master"] == ["torch.float32 cpu"]
    assert offloaded["losses"] == pytest.approx(kept["losses"], rel=1e-4)


@on_both
def test_a_run_resumed_from_a_checkpoint_written_beside_training_goes_on_alike(
    device: str, tiny_model: Path, tmp_path: Path
) -> None:
    uninterrupted, resumed = on_ranks(device, interrupt, device, config_for(tiny_model), tmp_path)
    assert resumed == pytest.approx(uninterrupted, rel=1e-6)


@on_both
def test_a_large_model_takes_real_steps(device: str, tmp_path: Path) -> None:
    is_large = device == "cuda"
    if is_large and torch.cuda.get_device_properties(0).total_memory < ONE_BILLION_BYTES:
        pytest.skip("the GPU has less than 24 GB")
    losses = on_ranks(device, steps_of_a_large_model, device, tmp_path, ONE_BILLION if is_large else TINY)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
