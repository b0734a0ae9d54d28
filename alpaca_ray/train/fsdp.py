"""FSDP2 (Zhao et al. 2023): fp32 masters sharded over all ranks, gathered layer by layer to compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from alpaca_ray.config import TrainConfig
from alpaca_ray.train import checkpoint
from alpaca_ray.train.model import decoder_layers, make_optimizer, wrap_layers
from alpaca_ray.train.strategy import Weights


class Fsdp:
    """The strategy of strategy.py; `model` is sharded in place.

    A rank but the first may bring a model without weights (`model.load(config, with_weights=False)`): it gets its
    part from rank 0, and no other host ever holds the whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        mesh: DeviceMesh,
        make_optimizer: Callable[[PreTrainedModel, TrainConfig], torch.optim.Optimizer] = make_optimizer,
    ) -> None:
        wrap_layers(model, config)
        shard(model, config, mesh)
        self.model, self.step = model, 0
        self.device = torch.device(mesh.device_type)
        self.optimizer = make_optimizer(model, config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See Strategy.backward. FSDP averages gradients over the ranks, hence the scale."""
        torch.autograd.backward(loss * dist.get_world_size())

    def update(self, learning_rate: float, max_grad_norm: float, check: Callable[[float], None]) -> float:
        """See Strategy.update."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        grad_norm = float(_full(norm))  # where parameters are sharded, each rank has its part of the squares
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

    def weights(self) -> Weights:
        """See Strategy.weights."""
        shards = get_model_state_dict(self.model)
        # Offloaded shards lie in host memory; the ranks' fast network joins devices.
        return Weights(
            shards, lambda name: _full(cast(Tensor, shards[name]).to(self.device)), has_values=dist.get_rank() == 0
        )


def shard(model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh) -> None:
    """Shard in place: one group for each decoder layer, one for the rest.

    The rest (embedding, last norm, head) stays in one group, because tied embeddings are one parameter of two
    modules. Gradients are reduced in fp32 whatever the compute dtype. One rank that computes in fp32 keeps the plain
    model: FSDP2 would copy all weights and gradients in each pass (135M on a CPU: a tenth of a step).
    """
    if mesh.size() == 1 and config.compute_dtype == "float32" and not config.cpu_offload:
        model.to(mesh.device_type)  # type: ignore[arg-type]
        return
    weights = _whole_weights(model)
    offloads = config.cpu_offload and mesh.device_type != "cpu"
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.compute_dtype), reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if offloads else OffloadPolicy()
    for module in [*decoder_layers(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    if weights is not None:
        _receive(model, weights, torch.device("cpu" if offloads else mesh.device_type))


def _whole_weights(model: PreTrainedModel) -> dict[str, Any] | None:
    """Rank 0's weights and an empty dict elsewhere, or None where every rank has loaded them itself."""
    is_empty = torch.tensor(any(p.is_meta for p in model.parameters()), dtype=torch.int32)
    dist.all_reduce(is_empty)
    if not is_empty:
        return None
    return dict(model.state_dict()) if dist.get_rank() == 0 else {}


def _full(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _receive(model: PreTrainedModel, weights: dict[str, Any], device: torch.device) -> None:
    if dist.get_rank() != 0:
        model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    for buffer in model.buffers():  # such as rotary frequencies, which no state dict holds
        dist.broadcast(buffer, src=0)
