"""Attention inside each document of a packed row, one document after the other, with no mask.

A mask over the whole row costs the square of its length: at 1,500 tokens of fp32 on a CPU 6.5 times as much.

T: tokens of the row, H: query heads, K: key heads, G: query heads that share a key head, D: width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alpaca_ray.config import UserError

NAME = "documents"
# What some architectures add to attention, and attend() does not know.
UNKNOWN = ("softcap", "s_aux", "position_bias")


def install(model: PreTrainedModel) -> None:
    """Have `model` attend by `attend`, which is sdpa until a call names document boundaries."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


# Not compiled: every micro-batch has other lengths, and each would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(  # noqa: PLR0913, PLR0917 - transformers' interface
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (B, H, T, D), key and value: (B, K, T, D), returns (B, T, H, D).

    `cu_seq_lens_q` (int32): where each document of the one row begins, then T; None: whole rows. Raises UserError
    where the model attends in a way that this does not know.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unknown(module, max_length_q, kwargs)
    is_short = query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0
    if is_short and query.is_cuda:
        return _flash((query, key, value), cu_seq_lens_q, max_length_q, scaling), None
    groups = query.shape[1] // key.shape[1]
    if not is_short:
        # Heads repeated once for the row: sdpa's enable_gqa repeats them for each document, 1.4 times the time.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = [
        _folded(q, k, v, scaling)
        if is_short
        else scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        for q, k, v in zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], 1), None


def _refuse_unknown(module: torch.nn.Module, longest: int, kwargs: dict[str, Any]) -> None:
    window = kwargs.get("sliding_window")
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    unknown += ["sliding_window"] if window is not None and window < longest else []
    if unknown or not getattr(module, "is_causal", True):
        raise UserError(
            f"train.packing does not know the attention of this model ({type(module).__name__}: "
            f"{', '.join(unknown) or 'not causal'}). Set train.packing to false"
        )


def _flash(states: tuple[Tensor, ...], boundaries: Tensor, longest: int, scale: float | None) -> Tensor:
    # torch's own FlashAttention (Dao 2023) over documents of different lengths.
    q, k, v = (x[0].transpose(0, 1) for x in states)  # (T, H or K, D)
    out = varlen_attn(
        q, k, v, boundaries, boundaries, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True
    )
    assert isinstance(out, Tensor)
    return out[None]


def _folded(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """One document in bf16 on a CPU: two matrix products, the G query heads of a key head as rows of one matrix.

    Half the time of sdpa with a mask (on AVX-512). q: (1, H, T, D), k and v: (1, K, T, D), returns (1, H, T, D).
    """
    _, heads, length, width = q.shape
    groups = heads // k.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = torch.bmm(q.reshape(-1, groups * length, width), k[0].transpose(1, 2))  # (K, G T, T)
    scores = scores.float() * (width**-0.5 if scale is None else scale)
    weights = scores.view(-1, length, length).masked_fill(future, float("-inf")).softmax(-1).to(q.dtype)  # (H, T, T)
    return torch.bmm(weights.view(scores.shape), v[0]).view(1, heads, length, width)
