"""The next token of each row from its logits, every row by its own parameters.

B rows, V vocabulary, C candidates that a row's top_k and top_p can leave.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca_ray.serve.engine import SamplingParams, TokenLogprob
from alpaca_ray.serve.grammar import Grammar

FIRST_CANDIDATES = 256  # sorting all of 49,152 tokens takes 15 times as long as finding these
CANDIDATES_GROWTH = 16


@dataclass
class RowSampling:
    """What choosing one row's next token needs. `counts`: (V,), how often each token is in the completion so far;
    None where no penalty asks for it."""

    params: SamplingParams
    seed: int
    counts: Tensor | None = None
    grammar: Grammar | None = None  # of a completion that obeys a JSON schema
    num_chosen: int = 0

    @classmethod
    def start(  # noqa: PLR0913, PLR0917 - what a row begins with
        cls,
        params: SamplingParams,
        seed: int,
        emitted: Sequence[int],
        vocab_size: int,
        device: torch.device,
        grammar: Grammar | None = None,
    ) -> "RowSampling":
        """For a completion that begins with `emitted`, where `grammar` begins too."""
        penalised = params.presence_penalty != 0 or params.frequency_penalty != 0
        row = cls(params, seed, torch.zeros(vocab_size, device=device) if penalised else None, grammar)
        for token_id in emitted:
            row.append(token_id)
        return row

    def append(self, token_id: int) -> None:
        """The completion has one more token."""
        self.num_chosen += 1
        if self.counts is not None:
            self.counts[token_id] += 1
        if self.grammar is not None:
            self.grammar.append(token_id)

    def penalties(self) -> Tensor | None:
        """What OpenAI's formula takes off the logits: (V,)."""
        if self.counts is None:
            return None
        return self.counts * self.params.frequency_penalty + (self.counts > 0) * self.params.presence_penalty


def choose(logits: Tensor, rows: Sequence[RowSampling]) -> list[int | None]:
    """The next token of each row; None where its logits are not finite. logits: (B, V), float32, is overwritten."""
    for i, row in enumerate(rows):
        if (penalties := row.penalties()) is not None:
            logits[i] -= penalties
        if row.grammar is not None:
            allowed = torch.from_numpy(row.grammar.allowed()).to(logits.device)
            logits[i].masked_fill_(~allowed, -torch.inf)
    best, token_ids = logits.max(dim=-1)  # a NaN is the largest of all
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    whole = [i for i in drawn if not _is_restricted(rows[i].params)]
    restricted = [i for i in drawn if _is_restricted(rows[i].params)]
    for indices, draw in ((whole, _draw), (restricted, _draw_restricted)):
        if indices:
            params = [rows[i].params for i in indices]
            # Less the largest, so that a temperature near 0 leaves it at 0 and takes the others to minus infinity.
            temperatures = _column([p.temperature for p in params], logits.device)
            scores = logits if len(indices) == len(rows) else logits[indices]  # a copy takes as long as the exponential
            weights = scores.sub_(best[indices, None]).div_(temperatures).exp_()
            handicaps = [exponentials(rows[i].seed, rows[i].num_chosen, logits.shape[1]) for i in indices]
            token_ids[indices] = draw(weights, torch.stack(handicaps).to(logits.device), params)
    return [
        token_id if finite else None
        for token_id, finite in zip(token_ids.tolist(), best.isfinite().tolist(), strict=True)
    ]


def exponentials(seed: int, index: int, vocab_size: int) -> Tensor:
    """A draw from Exp(1) for each token, for token `index` of a completion: (V,), on the CPU, the same everywhere.

    Nothing is carried from one index to the next, so a completion may go on anywhere.
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    # Half a step above 0 at least: an infinite handicap would hand the draw to a token of no weight.
    uniforms = torch.rand(vocab_size, generator=generator).clamp_(min=2.0**-25)
    return uniforms.log_().neg_()


def logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of each row's token and of the `num_top` likeliest ones in its place. logits: (B, V), float32."""
    of_all = logits.log_softmax(dim=-1)
    own = of_all.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (table.tolist() for table in of_all.topk(min(num_top, logits.shape[1]), dim=-1))
    return [
        TokenLogprob(token_id, logprob, tuple(zip(*top, strict=True)))
        for token_id, logprob, *top in zip(token_ids, own, ids, values, strict=True)
    ]


def _is_restricted(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None]


def _draw(weights: Tensor, handicaps: Tensor, _params: object = None) -> Tensor:
    """A token with a probability in proportion to its weight: the first of races that last `handicaps` / weight, which
    is the Gumbel-max trick (Maddison et al. 2014). weights, handicaps: (B, V), returns (B,).

    The last bits of the logits decide only where two tokens come in at nearly the same time. The inverse of the
    cumulated weights would move every token's bounds by the sum of all errors before it: of 512 tokens one was another.
    """
    return (weights / handicaps).argmax(dim=-1)


def _draw_restricted(weights: Tensor, handicaps: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The same among the top_k likeliest, then among the likeliest of these that reach top_p together
    (Holtzman et al. 2020), as transformers and vLLM do it. weights, handicaps: (B, V), returns (B,)."""
    vocab_size, device = weights.shape[1], weights.device
    top_k = _column([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], device)
    top_p = _column([p.top_p for p in params], device)
    token_ids = torch.empty(len(params), dtype=torch.long, device=device)
    rows, num_candidates = torch.arange(len(params), device=device), FIRST_CANDIDATES
    while len(rows):  # those whose candidates may be more than were looked at so far
        values, ids = weights.topk(min(num_candidates, vocab_size), dim=-1)  # likeliest first
        mass, certain = _mass(weights, values, top_k, top_p)
        kept = _kept(values, top_k, top_p * mass)
        first = _draw(values * kept, handicaps.gather(1, ids))
        token_ids[rows] = ids.gather(1, first[:, None])[:, 0]
        rest = ~certain
        rows, weights, handicaps, top_k, top_p = (t[rest] for t in (rows, weights, handicaps, top_k, top_p))
        num_candidates *= CANDIDATES_GROWTH
    return token_ids


def _mass(weights: Tensor, values: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """What top_p is a share of, the weight of all or of the top_k: (B, 1); whether the candidates suffice: (B,)."""
    vocab_size, num_candidates = weights.shape[1], values.shape[1]
    of_all = weights.sum(dim=-1, keepdim=True)
    of_top_k = (values * (torch.arange(num_candidates, device=values.device) < top_k)).sum(dim=-1, keepdim=True)
    limited = top_k < vocab_size
    certain = torch.where(limited, top_k <= num_candidates, values.sum(dim=-1, keepdim=True) >= top_p * of_all)
    return torch.where(limited, of_top_k, of_all), certain[:, 0] | (num_candidates == vocab_size)


def _kept(values: Tensor, top_k: Tensor, enough: Tensor) -> Tensor:
    """Which candidates, likeliest first, belong to the top_k and to the nucleus. (B, C)."""
    ranks = torch.arange(values.shape[1], device=values.device)
    above = values.cumsum(dim=-1) - values
    # The token that crosses top_p stays, so there is always one.
    return ((above < enough) | (ranks == 0)) & (ranks < top_k)
