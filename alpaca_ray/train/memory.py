"""What a rank needs in memory, term by term: weights and optimizer from shapes, activations from a trace.

The trace runs the real forward pass on fake tensors, which have shapes and no values, and adds up what autograd keeps.
So it holds for any architecture, and follows when transformers or our attention change. A 7B takes about 2 s.

T: tokens of a micro-batch, N: targets among them, V: vocabulary, P: parameters, W: ranks.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from alpaca_ray.config import TrainConfig
from alpaca_ray.train import attention, lora
from alpaca_ray.train.model import TARGETS_AT_ONCE, decoder_layers, give_loss

FP32 = 4
ADAM = 2 * FP32  # both moments
ON_GPU = "estimate"  # the name that attention as a GPU does it is registered by
TRACED = ("micro_batch_size", "max_length", "packing", "compute_dtype", "lora")
TARGET_SHARE = 0.5  # of tokens; Alpaca's answers are about as long as its prompts


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest, early in a backward pass. `host`: what offloading moves there."""

    parameters: int  # this rank's shards, fp32; frozen ones in the compute dtype
    gradients: int  # of the trained shards, from earlier micro-batches
    optimizer: int  # AdamW's moments
    gathered: int  # weights in the compute dtype: the root group, a layer, and the next one on its way
    activations: int  # that autograd keeps
    transient: int  # the larger of: logits with their gradient; a layer's gradients before they are reduced
    host: int = 0

    @property
    def device(self) -> int:
        """All that lies where it is computed."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.activations + self.transient


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps for one micro-batch, in all decoder layers, in the largest, and outside of them."""

    layers: int
    largest_layer: int
    layer_inputs: int  # all that is left of the layers where they are computed again
    outside: int


def per_rank(config: TrainConfig, shapes: PreTrainedConfig, world_size: int, kept: Activations) -> Memory:
    """The memory of each of `world_size` ranks; the first, which has the largest shards.

    `kept`: as `activations` has it for this config; not all of its fields matter there.
    """
    model = without_values(config, shapes)
    shards = (_zero if config.strategy == "deepspeed" else _fsdp)(model, config, world_size)
    reduced = _reduced(model, config)
    inside = kept.layers
    if config.activation_checkpointing:
        inside, reduced = kept.layer_inputs, reduced + kept.largest_layer
    num_targets = round(config.micro_batch_size * config.max_length * TARGET_SHARE)
    transient = max(logits(config, shapes.vocab_size, num_targets), reduced)
    return Memory(**shards, activations=inside + kept.outside, transient=transient)


def logits(config: TrainConfig, vocab_size: int, num_targets: int) -> int:
    """fp32 log-probabilities and their gradient, and the logits in the compute dtype, of the targets at once."""
    width = 2 * FP32 + (0 if _compute_bytes(config) == FP32 else _compute_bytes(config))
    return min(num_targets, TARGETS_AT_ONCE) * vocab_size * width


def activations(config: TrainConfig, shapes: PreTrainedConfig, device_type: str) -> Activations:
    """Trace one forward pass of a full micro-batch; TRACED names the fields of the config that matter."""
    num_rows, length = config.micro_batch_size, config.max_length
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _fake(config, shapes, device_type)
        rows = torch.zeros((1, num_rows * length) if config.packing else (num_rows, length), dtype=torch.long)
        places = torch.arange(0, rows.numel(), round(1 / TARGET_SHARE))
        inputs: dict[str, Any] = {"input_ids": rows, "places": places, "targets": torch.zeros_like(places)}
        if config.packing:
            inputs |= {"position_ids": rows, "cu_seq_lens_q": _Lengths([length] * num_rows), "max_length_q": length}
        else:
            inputs |= {"attention_mask": torch.ones_like(rows)}
        with _counted(model) as counts:
            model(**inputs, use_cache=False)
    inside = [counts[layer] for layer in decoder_layers(model)]
    width = rows.numel() * shapes.hidden_size * _compute_bytes(config)
    return Activations(sum(inside), max(inside), width * len(inside), counts[model])


class _Lengths(list[int]):
    """Document boundaries as attention reads them. A fake tensor has no values to read."""

    def diff(self) -> "_Lengths":
        return self

    def tolist(self) -> list[int]:
        return self


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[dict[nn.Module, int]]:
    """Bytes that autograd keeps for a backward pass, by the decoder layer that made them, else by the model."""
    counts: dict[nn.Module, int] = defaultdict(int)
    seen: dict[int, Tensor] = {}  # keeps them alive: no address is used twice
    where: list[nn.Module] = [model]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if not is_weight and tensor.shape[-1:] != (model.config.vocab_size,) and storage._cdata not in seen:
            seen[storage._cdata] = tensor
            counts[where[-1]] += storage.nbytes()
        return tensor

    hooks = []
    for layer in decoder_layers(model):
        hooks.append(layer.register_forward_pre_hook(lambda module, _: where.append(module)))
        hooks.append(layer.register_forward_hook(lambda *_: where.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield counts
    for hook in hooks:
        hook.remove()


def _fake(config: TrainConfig, shapes: PreTrainedConfig, device_type: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(shapes, dtype=getattr(torch, config.compute_dtype))  # type: ignore[no-untyped-call]
    attention.install(model)
    if device_type == "cuda":
        AttentionInterface.register(ON_GPU, _flash)
        AttentionMaskInterface.register(ON_GPU, lambda *_, **__: None)
        model.set_attn_implementation(ON_GPU)
    if config.lora is not None:
        lora.apply(model, config.lora, frozen_dtype=getattr(torch, config.compute_dtype))
    return give_loss(model.train())


def _flash(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
    # Keeps what FlashAttention (Dao 2023) keeps on a GPU: its inputs, its output and a number a row of each head.
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


def without_values(config: TrainConfig, shapes: PreTrainedConfig) -> PreTrainedModel:
    """The model to be trained on the meta device: which parameters there are, and which of them are trained."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shapes, dtype=torch.float32)  # type: ignore[no-untyped-call]
    if config.lora is not None:
        lora.apply(model, config.lora, frozen_dtype=getattr(torch, config.compute_dtype))
    return model


def _fsdp(model: PreTrainedModel, config: TrainConfig, world_size: int) -> dict[str, int]:
    """FSDP2: fp32 shards; a layer whole while it computes, the next one on its way, the root group throughout."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    layers = [list(layer.parameters()) for layer in decoder_layers(model)]
    inside = {id(p) for layer in layers for p in layer}
    root = [p for p in parameters if id(p) not in inside]
    shards = {
        "parameters": sum(_shard_numel(p, world_size) * p.element_size() for p in parameters),
        "gradients": sum(_shard_numel(p, world_size) * FP32 for p in trained),
        "optimizer": sum(_shard_numel(p, world_size) * ADAM for p in trained),
    }
    gathered = (_numel(root) + 2 * max(map(_numel, layers))) * _compute_bytes(config)
    if not config.cpu_offload:
        return shards | {"gathered": gathered}
    return dict.fromkeys(shards, 0) | {"gathered": gathered, "host": sum(shards.values())}


def _reduced(model: PreTrainedModel, config: TrainConfig) -> int:
    """Gradients of the root group and of a layer as they are computed, and the layer's again in fp32 to be reduced."""
    layers = [_trained(layer.parameters()) for layer in decoder_layers(model)]
    largest = max(map(_numel, layers))
    root = _numel(_trained(model.parameters())) - sum(map(_numel, layers))
    return (root + largest) * _compute_bytes(config) + largest * FP32


def _zero(model: PreTrainedModel, config: TrainConfig, world_size: int) -> dict[str, int]:
    """ZeRO (Rajbhandari et al. 2020, section 5): stage 1 shards the optimizer and its fp32 masters, 2 the gradients
    too, 3 the weights that compute too.
    """
    width, stage = _compute_bytes(config), config.zero_stage
    num, num_trained = _numel(model.parameters()), _numel(_trained(model.parameters()))
    optimizer = -(-num_trained // world_size) * (ADAM + FP32)  # the masters with it
    largest = max(_numel(layer.parameters()) for layer in decoder_layers(model))
    return {
        "parameters": num * width // (world_size if stage == 3 else 1),
        "gradients": num_trained * width // (world_size if stage >= 2 else 1),
        "optimizer": 0 if config.cpu_offload else optimizer,
        "gathered": 2 * largest * width if stage == 3 else 0,
        "host": optimizer if config.cpu_offload else 0,
    }


def _shard_numel(parameter: Tensor, world_size: int) -> int:
    # FSDP2 cuts the first dimension into equal parts, the last filled up.
    rows = -(-parameter.shape[0] // world_size)
    return rows * (parameter.numel() // parameter.shape[0])


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _compute_bytes(config: TrainConfig) -> int:
    dtype: torch.dtype = getattr(torch, config.compute_dtype)
    return dtype.itemsize
