"""The loss on examples that are not trained on, over all ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from alpaca_ray.config import TrainConfig
from alpaca_ray.train.collate import collate
from alpaca_ray.train.encoding import Encoded
from alpaca_ray.train.packing import micro_batches
from alpaca_ray.train.strategy import Strategy


def heldout_loss(state: Strategy, examples: Sequence[Encoded], config: TrainConfig) -> float:
    """Nats per target token, the mean over all examples, the same on every rank. Collective; leaves the state as is."""
    summed = torch.zeros((), dtype=torch.float64, device=state.device)
    state.model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            for rows in micro_batches(examples, config, dist.get_world_size())[dist.get_rank()]:
                summed += state.model(**collate(rows, config.packing, state.device))
    finally:
        state.model.train()
    dist.all_reduce(summed)
    return float(summed) / sum(example.num_targets for example in examples)
