"""Which example is held out, and which comes at which step.

Pure functions: a resumed run needs no saved position, and any world size agrees.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

from alpaca_ray.config import UserError
from alpaca_ray.schema import Example


def split(examples: Sequence[Example], heldout_fraction: float) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples), at least one of each and both in the order of their ids.

    The hash of an id decides, so neither the order of the dataset nor the run's seed matters. Raises UserError for
    fewer than two examples.
    """
    if len(examples) < 2:
        raise UserError(f"the dataset has {len(examples)} examples: it takes one to train on and one to hold out")
    by_hash = sorted(examples, key=lambda e: hashlib.sha256(e.id.encode()).digest())
    num_heldout = min(max(1, round(heldout_fraction * len(examples))), len(examples) - 1)
    heldout, training = by_hash[:num_heldout], by_hash[num_heldout:]
    return sorted(training, key=lambda e: e.id), sorted(heldout, key=lambda e: e.id)


def steps_per_epoch(num_examples: int, global_batch_size: int) -> int:
    """The last batch of an epoch is short where the division leaves a rest; it is used, not dropped or filled up."""
    return math.ceil(num_examples / global_batch_size)


def batch_ids(num_examples: int, global_batch_size: int, seed: int, step: int) -> list[int]:
    """Positions of the examples of the global batch at `step`, which counts from 0 over all epochs.

    Each epoch goes through a new permutation of all examples, each exactly once. The loss is a mean over a batch's
    target tokens, so a short last batch makes a whole step of its own, as in Alpaca's run.
    """
    epoch, batch = divmod(step, steps_per_epoch(num_examples, global_batch_size))
    first = batch * global_batch_size
    return list(_permutation(num_examples, seed, epoch)[first : first + global_batch_size])


@lru_cache(maxsize=2)
def _permutation(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Sorted by hash: the same in every version of every library, which random.shuffle does not promise.
    def key(position: int) -> bytes:
        return hashlib.sha256(f"{seed}/{epoch}/{position}".encode()).digest()

    return tuple(sorted(range(num_examples), key=key))
