"""How model, gradients and optimizer lie on the ranks: what the loop asks of FSDP2 (fsdp.py) and DeepSpeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel


class Saving(Protocol):
    """A checkpoint that is being written."""

    def wait(self) -> None:
        """Return when this rank's part is on disk. Raises what the writing raised."""
        ...


class Strategy(Protocol):
    """All that training changes. Every rank has one, and each method but `wait` is a collective."""

    model: PreTrainedModel  # call it for a forward pass
    step: int  # optimizer steps done

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

    def gather(self) -> dict[str, Tensor]:
        """The full fp32 weights in rank 0's host memory, an empty dict elsewhere."""
        ...
