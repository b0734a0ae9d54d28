"""Low-rank adapters (Hu et al. 2021): the base is frozen, chosen linear layers learn a product of two thin matrices.

Our own few lines, not peft: peft wraps the model in a class of its own and renames its parameters, and then neither
the decoder layers that FSDP2 shards nor the names of the exported weights are the plain model's. Here a layer keeps
its name and its weight, and gains `lora_a` and `lora_b`.

R: rank, I and O: features into and out of a linear layer.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from alpaca_ray.config import LoraConfig, UserError, nearest

A, B, WEIGHT = ".lora_a", ".lora_b", ".weight"


class LoraLinear(nn.Linear):
    """y = x W' + (x A') B' * alpha / R. It takes over the weight and bias of a plain layer, frozen."""

    def __init__(self, plain: nn.Linear, lora: LoraConfig) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.scale = lora.alpha / lora.rank
        device = plain.weight.device
        # fp32 whatever the base is in: AdamW's small steps would be lost in bf16.
        self.lora_a = nn.Parameter(torch.empty(lora.rank, plain.in_features, device=device))  # (R, I)
        self.lora_b = nn.Parameter(torch.zeros(plain.out_features, lora.rank, device=device))  # (O, R)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        a, b = self.lora_a.to(input.dtype), self.lora_b.to(input.dtype)  # as they are where FSDP has cast them already
        return super().forward(input) + linear(linear(input, a), b) * self.scale


def apply(model: PreTrainedModel, lora: LoraConfig, seed: int = 0, frozen_dtype: torch.dtype | None = None) -> None:
    """Put adapters into the model, in place; only they require gradients. It computes what it did before, for B is 0.

    `frozen_dtype`: what the base is kept in, None: as it is. It needs no fp32 masters, since nothing changes it, so
    the dtype that it is computed in takes half the memory and loses nothing.
    Each matrix A is a function of `seed` and its name: every rank agrees, and so do other `target_modules`.
    On the meta device the shapes come out, and the values later. Raises UserError if a target names no linear layer.
    """
    targets = dict(_targets(model, lora.target_modules))
    model.requires_grad_(False)
    if frozen_dtype is not None:
        _cast(model, frozen_dtype)
    for name, plain in targets.items():
        layer = LoraLinear(plain, lora)
        if not layer.lora_a.is_meta:
            nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5), generator=_generator(seed, name))
        model.set_submodule(name, layer)


class Merged(Mapping[str, Tensor]):
    """The plain model's weights, under its own names, from those of a model with adapters; each as it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], lora: LoraConfig) -> None:
        self._weights = weights
        self._scale = lora.alpha / lora.rank

    def __getitem__(self, name: str) -> Tensor:
        """W + B A * alpha / R in fp32; the weight itself where it has no adapter."""
        if name not in self:
            raise KeyError(name)
        layer = name.removesuffix(WEIGHT)
        if layer + A not in self._weights:
            return self._weights[name]
        product = self._weights[layer + B].float() @ self._weights[layer + A].float()  # (O, I)
        return product.mul_(self._scale).add_(self._weights[name])

    def __contains__(self, name: object) -> bool:
        return name in self._weights and not str(name).endswith((A, B))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if not name.endswith((A, B)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _targets(model: PreTrainedModel, names: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    there = sorted({name.rpartition(".")[2] for name in linears} - {"lm_head"})
    for wanted in names:
        if wanted not in there:
            raise UserError(
                f"train.lora.target_modules: {type(model).__name__} has no linear layer {wanted!r}"
                f"{nearest(wanted, there)}; it has {', '.join(there)}"
            )
    yield from ((name, module) for name, module in linears.items() if name.rpartition(".")[2] in names)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    # Parameters only: `model.to(dtype)` would round the rotary frequencies, which are buffers, as well.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
