"""How model, gradients and optimizer lie on the ranks: what the loop asks of FSDP2 (fsdp.py) and DeepSpeed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Saving(Protocol):
    """A checkpoint that is being written."""

    def wait(self) -> None:
        """Return when this rank's part is on disk. Raises what the writing raised."""
        ...


class Weights(Mapping[str, Tensor]):
    """A sharded model's weights, each made whole when it is asked for: every rank must ask for the same ones in turn.

    So no host ever holds them all, unless the caller does.
    """

    def __init__(self, names: Collection[str], whole: Callable[[str], Tensor], *, has_values: bool) -> None:
        """`whole`: a collective. Without `has_values` the tensors are on the meta device, else in host memory."""
        self._names, self._whole = names, whole
        self._device = torch.device("cpu" if has_values else "meta")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._whole(name).detach().to(self._device)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would make it whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Strategy(Protocol):
    """All that training changes. Every rank has one, and each method but `wait` is a collective."""

    model: PreTrainedModel  # call it for a forward pass
    step: int  # optimizer steps done
    device: torch.device  # where inputs belong; offloaded weights lie elsewhere

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add up the gradients of `loss`, over micro-batches and over ranks: sums, no means.

        `last`: this is the step's last micro-batch.
        """
        ...

    def update(self, learning_rate: float, max_grad_norm: float, check: Callable[[float], None]) -> float:
        """Clip, call `check` with the gradient norm before clipping, which may raise, and step; returns that norm."""
        ...

    def save(self, directory: Path) -> Saving:
        """Begin to write this rank's part to `directory`; at most one is being written at a time."""
        ...

    def load(self, directory: Path) -> None:
        """Restore model, optimizer and step in place from all ranks' parts, merged into one directory."""
        ...

    def weights(self) -> Weights:
        """The whole weights, fp32 where they are trained; values on rank 0 only."""
        ...
