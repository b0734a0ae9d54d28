"""The model for training: fp32 master weights, a forward pass that gives the loss, and the optimizer.

B: rows of a micro-batch, T: tokens of a row, N: targets, C: width of the model, V: vocabulary.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from alpaca_ray import models
from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.train import attention, lora
from alpaca_ray.train.encoding import IGNORE_INDEX

TARGETS_AT_ONCE = 1024  # 131 MB of fp32 logits at Llama's vocabulary of 32,000
# What some architectures do to the logits after the head: their own forward pass must make them.
ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def load(config: TrainConfig, *, with_weights: bool = True) -> PreTrainedModel:
    """Load on the CPU; without weights on the meta device, for a rank that is to get its part from rank 0.

    transformers loads the dtype that a checkpoint was saved in; AdamW's small steps would be lost in bf16 weights,
    so the masters are fp32 on purpose. Raises UserError if there is no such model, and what prepare raises.
    """
    load_model = models.load_model if with_weights else _without_weights
    return prepare(load_model(config.base_model, "float32"), config)


def _without_weights(base_model: str, dtype: str) -> PreTrainedModel:
    model_config = models.load_config(base_model)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, made)


def prepare(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """Its attention, adapters and loss, in place. Raises UserError if it cannot be packed or has not the layers that
    LoRA is to change.
    """
    model.config.use_cache = False
    attention.install(model)
    if config.packing and model.config._attn_implementation != attention.NAME:
        raise UserError(
            f"train.packing needs a model whose attention can be set, and {type(model).__name__}'s cannot: "
            "its documents would see each other. Set train.packing to false"
        )
    if config.lora is not None:
        lora.apply(model, config.lora, config.seed, frozen_dtype=getattr(torch, config.compute_dtype))
    return give_loss(model)


def give_loss(model: PreTrainedModel, targets_at_once: int = TARGETS_AT_ONCE) -> PreTrainedModel:
    """Let `model(..., places=, targets=)` give the summed loss; without `targets` a call is what it was.

    In one forward pass of the root module, whose hooks gather its shards: FSDP2 and ZeRO-3 know no other place.
    `places`: positions of the N tokens before the targets in the flattened rows; `targets`: (N,), IGNORE_INDEX
    counts nothing.
    """
    whole, head = model.forward, model.get_output_embeddings()  # type: ignore[no-untyped-call]
    makes_own_logits = any(getattr(model.config, name, None) not in (None, 1) for name in ON_LOGITS)

    def forward(*args: Any, places: Tensor | None = None, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None or places is None:
            return whole(*args, **kwargs)
        if makes_own_logits:
            logits = whole(*args, **kwargs).logits.flatten(0, 1)[places]  # (N, V)
            return cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        hidden = model.base_model(*args, **kwargs).last_hidden_state  # (B, T, C)
        return sum_of_losses(head, hidden.flatten(0, 1)[places], targets, targets_at_once)

    model.forward = forward
    return model


def sum_of_losses(head: torch.nn.Module, hidden: Tensor, targets: Tensor, at_once: int) -> Tensor:
    """Cross-entropy in fp32 of N targets, summed; `hidden`: (N, C). Never more than `at_once` x V logits.

    torch's own chunked linear_cross_entropy gives a sum in the dtype of `hidden`: in bf16 that is 1e-3 off.
    """
    if len(targets) <= at_once:
        return _loss(head, hidden, targets)
    parts = zip(torch.split(hidden, at_once), torch.split(targets, at_once), strict=True)
    losses = [checkpoint(_loss, head, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts]
    return torch.stack(losses).sum()


def _loss(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)  # (N, V)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def make_mesh(device_type: str, world_size: int) -> DeviceMesh:
    """One dimension over all ranks; `device_type` is "cpu" or "cuda"."""
    return init_device_mesh(device_type, (world_size,))


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that transformers itself never splits over devices. Raises UserError if the model names none."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(model).__name__} cannot be sharded: its _no_split_modules ({sorted(names)}) names no module "
            "of it, so its decoder layers are unknown. Choose a base model of a decoder architecture, such as Llama"
        )
    return layers


def wrap_layers(model: PreTrainedModel, config: TrainConfig) -> None:
    """Compile each decoder layer and recompute its activations, as the config says, in place; before it is sharded.

    The hooks that gather a layer's shards stay outside. So does recomputing outside what is compiled: dynamo gives
    up a checkpoint that has a graph break within, which attention is, and transformers' own would compile nothing.
    """
    if not (config.compile or config.activation_checkpointing):
        return
    for layer in decoder_layers(model):
        if config.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)  # a micro-batch's length is its own
        if config.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW at torch's betas and epsilon, which are Alpaca's; norms and biases do not decay, as in the HF Trainer."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # fused: on a CPU a twelfth of the time (135M parameters: 0.08 s instead of 0.9 s)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)
