"""FSDP2 (Zhao et al. 2023): fp32 masters sharded over all ranks, gathered layer by layer to compute."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from alpaca_ray.config import TrainConfig
from alpaca_ray.train import checkpoint
from alpaca_ray.train.model import decoder_layers, make_optimizer


class Fsdp:
    """The strategy of strategy.py; `model` is sharded in place."""

    def __init__(self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh) -> None:
        shard(model, config.compute_dtype, mesh)
        self.model, self.step = model, 0
        self.optimizer: torch.optim.Optimizer = make_optimizer(model, config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See Strategy.backward. FSDP averages gradients over the ranks, hence the scale."""
        torch.autograd.backward(loss * dist.get_world_size())

    def update(self, learning_rate: float, max_grad_norm: float, check: Callable[[float], None]) -> float:
        """See Strategy.update."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        assert isinstance(norm, DTensor)  # since the parameters are: each rank has its part of the squares
        grad_norm = float(norm.full_tensor())
        check(grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return grad_norm

    def save(self, directory: Path) -> checkpoint.Saved:
        """See Strategy.save."""
        return checkpoint.save(self, directory)

    def load(self, directory: Path) -> None:
        """See Strategy.load."""
        checkpoint.load(self, directory)

    def gather(self) -> dict[str, Tensor]:
        """See Strategy.gather."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=options))


def shard(model: PreTrainedModel, compute_dtype: str, mesh: DeviceMesh) -> None:
    """Shard in place: one group for each decoder layer, one for the rest.

    The rest (embedding, last norm, head) stays in one group, because tied embeddings are one parameter of two
    modules. Gradients are reduced in fp32 whatever the compute dtype.
    """
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, compute_dtype), reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
