"""The model for training: fp32 master weights, and the optimizer that changes them."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from alpaca_ray import models
from alpaca_ray.config import TrainConfig, UserError


def load(config: TrainConfig) -> PreTrainedModel:
    """Load on the CPU. Raises UserError if there is no such model.

    transformers loads the dtype that a checkpoint was saved in; AdamW's small steps would be lost in bf16 weights,
    so the masters are fp32 on purpose.
    """
    model = models.load_model(config.base_model, "float32")
    model.config.use_cache = False
    return model


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


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW at torch's betas and epsilon, which are Alpaca's; norms and biases do not decay, as in the HF Trainer."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)
