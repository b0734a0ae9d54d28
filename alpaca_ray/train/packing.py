"""Which examples of a step share a row, and which rows a rank computes together.

Only the layout is decided here: a step trains on the examples that order.py names, and neither its loss nor its
gradient depends on what follows.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from alpaca_ray.config import TrainConfig
from alpaca_ray.train.encoding import Encoded


@dataclass(frozen=True)
class PackedRow:
    """Documents that lie one behind the other in a row; none sees another. Without any it is an empty row."""

    documents: tuple[Encoded, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Its length: there is no padding between documents."""
        return sum(len(document.input_ids) for document in self.documents)


MicroBatch = Sequence[PackedRow]  # one forward and backward pass


def pack(examples: Sequence[Encoded], max_length: int) -> list[PackedRow]:
    """Best-fit decreasing (Johnson 1974): the longest first, each into the fullest row that has room for it.

    The same rows whatever the order of `examples`. Raises ValueError for one that is longer than `max_length` tokens.
    """
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (tokens left, position in `rows`), sorted
    for example in longest_first(examples):
        length = len(example.input_ids)
        if length > max_length:
            raise ValueError(f"example {example.id} has {length} tokens, and a row takes {max_length}")
        fit = bisect_left(room, (length, 0))
        if fit == len(room):
            rows.append([])
            left, position = max_length, len(rows) - 1
        else:
            left, position = room.pop(fit)
        rows[position].append(example)
        insort(room, (left - length, position))
    return [PackedRow(tuple(row)) for row in rows]


def spread(examples: Sequence[Encoded], num_rows: int, max_length: int) -> list[PackedRow] | None:
    """Rows of nearly one length: the longest first, each into the shortest row. None if one gets too long."""
    rows: list[list[Encoded]] = [[] for _ in range(num_rows)]
    lengths = [0] * num_rows
    for example in longest_first(examples):
        shortest = lengths.index(min(lengths))
        rows[shortest].append(example)
        lengths[shortest] += len(example.input_ids)
    return [PackedRow(tuple(row)) for row in rows] if max(lengths) <= max_length else None


def longest_first(examples: Sequence[Encoded]) -> list[Encoded]:
    """Sorted by length, then by what tells examples apart, so that the order they come in does not matter."""
    return sorted(examples, key=lambda e: (-len(e.input_ids), e.id, e.input_ids))


def micro_batches(batch: Sequence[Encoded], config: TrainConfig, world_size: int) -> list[list[MicroBatch]]:
    """The micro-batches of each rank, equally many for all, the last ones perhaps without rows.

    Each forward and backward is a collective, and a rank that left one out would hang the others.
    """
    shares = (
        _packed_shares(batch, config.max_length, world_size) if config.packing else _padded_shares(batch, world_size)
    )
    longest_share = max(len(share) for share in shares)
    starts = range(0, longest_share, config.micro_batch_size)
    return [[share[i : i + config.micro_batch_size] for i in starts] for share in shares]


def _packed_shares(batch: Sequence[Encoded], max_length: int, world_size: int) -> list[list[PackedRow]]:
    # As many rows for each rank, of about one length: a rank that is done waits for the last. Rows have no padding,
    # so that a row more costs nothing.
    packed = pack(batch, max_length)
    per_rank = -(-len(packed) // world_size)
    rows = packed if world_size == 1 else spread(batch, per_rank * world_size, max_length) or packed
    shares: list[list[PackedRow]] = [[] for _ in range(world_size)]
    for row in sorted(rows, key=lambda row: -row.num_tokens):
        open_shares = [share for share in shares if len(share) < per_rank]
        min(open_shares, key=lambda share: sum(r.num_tokens for r in share)).append(row)
    return shares


def _padded_shares(batch: Sequence[Encoded], world_size: int) -> list[list[PackedRow]]:
    # In the order of the batch, as in Alpaca's run: sorted by length, short answers would be means of their own.
    return [[PackedRow((example,)) for example in batch[rank::world_size]] for rank in range(world_size)]
