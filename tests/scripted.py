"""An Engine without a model: token k of a completion follows from (prompt, seed, k) alone, as the seam demands."""

import random
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from itertools import cycle

from alpaca_ray.serve.engine import (
    Delta,
    EngineError,
    FinishReason,
    Health,
    TokenLogprob,
    TokenRequest,
    room_for_completion,
)

END = 2  # the tiny model's end of sequence


class ScriptedEngine:
    """Says `script`, or where there is none, tokens drawn from `vocabulary`.

    `chunks`: numbers of tokens a delta, in turn. `deaths`: the engine dies before the delta of that number, counted
    over all its requests. It finishes within the last delta, or after it where `finishes_apart`.
    """

    def __init__(
        self,
        script: Sequence[int] | None = None,
        *,
        vocabulary: Sequence[int] = range(3, 259),
        chunks: Sequence[int] = (1,),
        deaths: Sequence[int] = (),
        finishes_apart: bool = False,
        max_length: int = 256,
    ) -> None:
        self._script, self._vocabulary, self._max_length = script, vocabulary, max_length
        self._chunks, self._finishes_apart = chunks, finishes_apart
        self._deaths, self._num_deltas = Counter(deaths), 0
        self.requests: list[TokenRequest] = []

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        tokens, reason = self._completion(request)
        rest, sizes = tokens[len(request.emitted) :], cycle(self._chunks)
        prompt = self._prompt_logprobs(request) if request.echoes_logprobs else ()
        while True:
            self._die_if_due()
            size = next(sizes)
            now, rest = rest[:size], rest[size:]
            is_last = not rest and not (self._finishes_apart and now)
            yield Delta(tuple(now), reason if is_last else None, self._logprobs(request, now), prompt)
            if is_last:
                return
            prompt = ()

    async def health(self) -> Health:
        return Health(0, 0)

    def _die_if_due(self) -> None:
        self._num_deltas += 1
        if self._deaths[self._num_deltas]:
            raise EngineError("died")

    def _completion(self, request: TokenRequest) -> tuple[list[int], FinishReason]:
        room = room_for_completion(request, self._max_length)
        if self._script is not None:
            tokens = list(self._script)[:room]
        else:
            seed = f"{request.prompt_token_ids}{request.sampling.seed}"
            tokens = [random.Random(f"{seed}{k}").choice(self._vocabulary) for k in range(room)]
        if END in tokens:
            return tokens[: tokens.index(END)], "stop"
        return tokens, "stop" if len(tokens) < room else "length"

    def _logprobs(self, request: TokenRequest, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        wanted = request.sampling.num_logprobs
        return () if wanted is None else tuple(told(token, wanted) for token in tokens)

    def _prompt_logprobs(self, request: TokenRequest) -> tuple[TokenLogprob, ...]:
        first, *others = request.prompt_token_ids
        return (TokenLogprob(first, None), *(told(token, request.sampling.num_logprobs or 0) for token in others))


def told(token: int, num_top: int) -> TokenLogprob:
    """A log-probability that shows which token it belongs to."""
    return TokenLogprob(token, -float(token), tuple((3 + i, -float(i + 1)) for i in range(num_top)))
