"""Sharded checkpoints of model, optimizer and step; they load on any number of ranks.

torch's distributed checkpoint (DCP): each rank writes its own shards, rank 0 the index of all. The ranks may write
to different directories; merged into one, these are a checkpoint.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save


class Trained(Protocol):
    """What is saved."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: int


class Saved:
    """A checkpoint that is written."""

    def wait(self) -> None:
        """See Saving.wait."""


def save(state: Trained, directory: Path) -> Saved:
    """Write this rank's part to `directory`; every rank must call it."""
    dcp_save(_as_dict(state), checkpoint_id=directory)
    return Saved()


def load(state: Trained, directory: Path) -> None:
    """Restore `state` in place from a merged checkpoint; every rank must call it."""
    saved = _as_dict(state)
    dcp_load(saved, checkpoint_id=directory)
    set_state_dict(state.model, state.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    state.step = saved["step"]


def _as_dict(state: Trained) -> dict[str, Any]:
    # Keyed by parameter names, not by positions in the optimizer, so that another world size finds them.
    model, optimizer = get_state_dict(state.model, state.optimizer)
    return {"model": model, "optimizer": optimizer, "step": state.step}
