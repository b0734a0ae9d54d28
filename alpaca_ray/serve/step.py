"""The middle of an engine's step: run the rows' tokens through the model, and sample from what comes out.

N logits of all rows, B rows that get a token, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca_ray.serve.decoder import Chunk, Decoder
from alpaca_ray.serve.engine import TokenLogprob
from alpaca_ray.serve.sampling import choose, logprobs
from alpaca_ray.serve.schedule import Row, Turn

# The previous tokens of B rows -> what is added to their logits: (B, V), float32.
Marks = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Choice:
    """A row's next token; `error` where there is none to choose."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a step found out about a row. `choice` None: its prompt is not through yet, or it wants no more."""

    turn: Turn
    choice: Choice | None = None
    prompt_logprobs: Sequence[TokenLogprob] = ()


def run_and_sample(decoder: Decoder, marks: Marks | None, turns: Sequence[Turn]) -> list[Outcome]:
    """An outcome for each turn. Nothing is changed but the decoder's cache, so that it may be repeated."""
    chunks = [_chunk(turn) for turn in turns]
    logits = decoder.forward(chunks)  # (N, V)
    of_turns = torch.split(logits, [chunk.num_logits for chunk in chunks])
    choosing = [i for i, turn in enumerate(turns) if turn.chooses]
    choices: dict[int, Choice] = {}
    if choosing:
        last = torch.stack([of_turns[i][-1] for i in choosing])  # (B, V)
        choices = dict(zip(choosing, _choose(last, [turns[i].row for i in choosing], marks), strict=True))
    return [Outcome(turn, choices.get(i), _echo(turn, of_turns[i])) for i, turn in enumerate(turns)]


def _chunk(turn: Turn) -> Chunk:
    row = turn.row
    token_ids = row.ids[row.num_cached : row.num_cached + turn.num_tokens]
    return Chunk(row.slot, row.num_cached, token_ids, turn.num_tokens if turn.echoes else int(turn.chooses))


def _choose(logits: Tensor, rows: Sequence[Row], marks: Marks | None) -> list[Choice]:
    """logits: (B, V), of the model as it is; overwritten where nobody needs them afterwards."""
    tells = any(row.sampling.params.num_logprobs is not None for row in rows)
    marked = logits.clone() if tells else logits
    if marks is not None:
        marked += marks([row.ids[-1] for row in rows]).to(logits.device)
    token_ids = choose(marked, [row.sampling for row in rows])
    told = _logprobs(logits, token_ids, rows)
    return [
        Choice(error="the model's logits are not finite") if token_id is None else Choice(token_id, told.get(i))
        for i, token_id in enumerate(token_ids)
    ]


def _logprobs(logits: Tensor, token_ids: Sequence[int | None], rows: Sequence[Row]) -> dict[int, TokenLogprob]:
    """By index into `rows`, of those that ask for them."""
    asked = {i: n for i, row in enumerate(rows) if (n := row.sampling.params.num_logprobs) is not None}
    found = {i: token_id for i in asked if (token_id := token_ids[i]) is not None}
    if not found:
        return {}
    told = logprobs(logits[list(found)], list(found.values()), max(asked.values()))
    return {i: TokenLogprob(t.token_id, t.logprob, t.top[: asked[i]]) for i, t in zip(found, told, strict=True)}


def _echo(turn: Turn, logits: Tensor) -> list[TokenLogprob]:
    """Of the prompt's tokens that these logits foretell, and before them the first, which nothing does."""
    if not turn.echoes:
        return []
    row, prompt = turn.row, turn.row.request.prompt_token_ids
    foretold = prompt[row.num_cached + 1 : row.num_cached + 1 + turn.num_tokens]
    first = [TokenLogprob(prompt[0], None)] if row.num_cached == 0 else []
    num_top = row.sampling.params.num_logprobs or 0
    return first + (logprobs(logits[: len(foretold)], foretold, num_top) if foretold else [])
