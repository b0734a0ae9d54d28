"""The rows of a micro-batch as tensors.

B: rows, T: tokens of a row, N: targets.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded
from alpaca_ray.train.packing import MicroBatch

PADDING_ID = 0  # any id will do: it stands behind the row, where no token looks, and is no target
# The part of a rank that has no example left: it must still take part in every collective of forward and backward.
NO_EXAMPLE = Encoded("", [PADDING_ID, PADDING_ID], [IGNORE_INDEX, IGNORE_INDEX])


def collate(rows: MicroBatch, packing: bool, device: torch.device) -> dict[str, Any]:
    """The arguments for the summed loss of a micro-batch; see model.give_loss."""
    documents = _documents(rows)
    arguments = _packed(documents) if packing else {"input_ids": _padded(documents)}
    width = arguments["input_ids"].shape[1]
    starts = accumulate((len(e.input_ids) for e in documents), initial=0) if packing else range(0, 1 << 62, width)
    # A target is foretold by the token before it. No document's first token is one, so none is foretold by another's.
    wanted = [
        (start + t - 1, e.labels[t])
        for start, e in zip(starts, documents, strict=False)
        for t in range(1, len(e.labels))
        if e.labels[t] != IGNORE_INDEX
    ]
    places, targets = torch.tensor(wanted or [(0, IGNORE_INDEX)]).unbind(1)  # (N,); without any a loss of 0
    arguments |= {"places": places, "targets": targets, "use_cache": False}
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def num_row_tokens(rows: MicroBatch, packing: bool) -> int:
    """B x T of what `collate` makes of them: the tokens that a pass computes."""
    lengths = [len(e.input_ids) for e in _documents(rows)]
    return sum(lengths) if packing else max(lengths) * len(lengths)


def _documents(rows: MicroBatch) -> Sequence[Encoded]:
    return [e for row in rows for e in row.documents] or [NO_EXAMPLE]


def _packed(documents: Sequence[Encoded]) -> dict[str, Any]:
    """One row, (1, T), in which the rows lie one behind the other, so that none is padded; see attention.attend."""
    lengths = [len(e.input_ids) for e in documents]
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    input_ids = torch.tensor([[token for e in documents for token in e.input_ids]])
    return {
        "input_ids": input_ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        # All ones: else transformers makes a mask of T x T from the position ids.
        "attention_mask": torch.ones_like(input_ids),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def _padded(documents: Sequence[Encoded]) -> Tensor:
    """(B, T), padded on the right to the longest. It needs no mask: what comes later is seen by nobody."""
    width = max(len(e.input_ids) for e in documents)
    return torch.tensor([e.input_ids + [PADDING_ID] * (width - len(e.input_ids)) for e in documents])
