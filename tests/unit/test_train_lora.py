"""Adapters change nothing at first, learn alone, and merge into a plain model that computes the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from alpaca_ray import models
from alpaca_ray.config import LoraConfig, TrainConfig, UserError
from alpaca_ray.models import load_model
from alpaca_ray.train import export, lora, model
from alpaca_ray.train.fsdp import Fsdp

IDS = torch.arange(3, 60)[None]  # (1, T)


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_for(tiny_model: Path, compute_dtype: str = "float32", **adapters: object) -> TrainConfig:
    values = {"base_model": str(tiny_model), "compute_dtype": compute_dtype, "lora": {"rank": 4} | adapters}
    return TrainConfig.model_validate(values)


def trained(config: TrainConfig, steps: int = 4) -> Fsdp:
    state = Fsdp(model.load(config), config, model.make_mesh("cpu", 1))
    for _ in range(steps):
        logits = state.model(IDS).logits
        state.backward(torch.nn.functional.cross_entropy(logits[0, :-1].float(), IDS[0, 1:]), last=True)
        state.update(1e-2, 1.0, lambda norm: None)
    return state


def test_at_first_the_model_computes_what_it_did(tiny_model: Path) -> None:
    plain = load_model(str(tiny_model), "float32")
    with torch.no_grad():
        before = plain(IDS).logits
        lora.apply(plain, LoraConfig())
        assert torch.equal(plain(IDS).logits, before)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_only_adapters_learn_and_they_are_fp32(tiny_model: Path, compute_dtype: str) -> None:
    config = config_for(tiny_model, compute_dtype)
    before = {name: p.detach().clone() for name, p in model.load(config).named_parameters()}
    after = trained(config).weights()

    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    adapters = {name for name in before if name.endswith(("lora_a", "lora_b"))}
    assert changed == adapters
    assert len(adapters) == 2 * 7 * 2  # A and B, seven linear layers, two decoder layers
    assert {before[name].dtype for name in adapters} == {torch.float32}
    assert {before[name].dtype for name in before.keys() - adapters} == {getattr(torch, compute_dtype)}


def test_merged_it_is_a_plain_model_with_the_same_logits(tiny_model: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model)
    state = trained(config)
    with torch.no_grad():
        expected = state.model(IDS).logits
    export.write_trained(state, config, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert not [m for m in plain.modules() if isinstance(m, lora.LoraLinear)]
    base = load_model(str(tiny_model), "float32")
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plain(IDS).logits, base(IDS).logits, atol=1e-2)  # it did learn


def test_what_is_merged_has_the_names_and_shapes_of_the_plain_model(tiny_model: Path) -> None:
    config = config_for(tiny_model)
    assert config.lora is not None
    weights = trained(config).weights()
    merged, plain = lora.Merged(weights, config.lora), load_model(str(tiny_model), "float32").state_dict()
    assert {name: weight.shape for name, weight in merged.items()} == {name: w.shape for name, w in plain.items()}
    assert len(merged) == len(plain)

    name = "model.layers.1.mlp.up_proj.weight"
    a, b = weights[name.replace("weight", "lora_a")], weights[name.replace("weight", "lora_b")]
    torch.testing.assert_close(merged[name], weights[name] + 8.0 * b @ a)  # alpha 32 / rank 4
    assert name.replace("weight", "lora_a") not in merged


def test_every_rank_begins_with_the_same_adapters_and_each_layer_with_its_own(tiny_model: Path) -> None:
    def adapters(seed: int, targets: list[str]) -> dict[str, torch.Tensor]:
        plain = load_model(str(tiny_model), "float32")
        lora.apply(plain, LoraConfig(target_modules=targets), seed)
        return {name: p for name, p in plain.named_parameters() if name.endswith("lora_a")}

    one, again, other = adapters(0, ["q_proj", "up_proj"]), adapters(0, ["up_proj"]), adapters(1, ["up_proj"])
    assert all(torch.equal(one[name], again[name]) for name in again)
    assert not any(torch.equal(again[name], other[name]) for name in again)
    first, second = again.values()
    assert not torch.equal(first, second)


def test_on_the_meta_device_there_are_shapes_only(tiny_model: Path) -> None:
    plain = export.skeleton(models.load_config(str(tiny_model)), "float32")
    lora.apply(plain, LoraConfig(rank=2))
    shapes = {tuple(p.shape) for name, p in plain.named_parameters() if name.endswith("q_proj.lora_a")}
    assert shapes == {(2, 32)}
    assert all(p.is_meta for p in plain.parameters())


def test_a_target_that_is_no_layer_is_refused_with_the_nearest(tiny_model: Path) -> None:
    plain = load_model(str(tiny_model), "float32")
    with pytest.raises(UserError, match=r"no linear layer 'qproj'; did you mean 'q_proj'\?; it has down_proj"):
        lora.apply(plain, LoraConfig(target_modules=["qproj"]))
    assert all(p.requires_grad for p in plain.parameters())
