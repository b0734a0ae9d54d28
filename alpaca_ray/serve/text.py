"""Text in, text out, over a token engine: tokenising, incremental detokenising, stop strings, log-probabilities.

It stands beside the engine, not in the HTTP ingress: transformers' AutoTokenizer imports torch (394 MB and 5 s a
process, measured), and the model's files need to lie only where the engine runs.
"""

from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from alpaca_ray.serve.detokenizer import Detokenizer, StopMatcher, TokenBytes, decode
from alpaca_ray.serve.engine import (
    Delta,
    Engine,
    FinishReason,
    Health,
    SamplingParams,
    TokenLogprob,
    TokenRequest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptError(ValueError):
    """A prompt that this model cannot be given. The text says why and what to do."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt that is token ids already; nothing is added to them."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TextRequest:
    """Plain text to go on with, or a conversation to answer. `stop`: strings that end the text before them.

    `echo`: the first delta brings the prompt too; `sampling.max_tokens` may be 0 then. `emitted` and `num_shown`: the
    tokens and the number of characters that a model which died had given; the completion goes on behind them.
    """

    prompt: str | tuple[Message, ...] | TokenPrompt
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    echo: bool = False
    emitted: tuple[int, ...] = ()
    num_shown: int = 0


@dataclass(frozen=True)
class TextLogprob:
    """A token by its bytes, its log-probability in nats, and the likeliest ones in its place, likeliest first."""

    token: bytes
    logprob: float | None  # None: the prompt's first token, which nothing foretold
    top: tuple[tuple[bytes, float], ...] = ()
    offset: int = 0  # where its text begins, in characters from the beginning of the prompt


@dataclass(frozen=True)
class PromptEcho:
    """The prompt as text, and the log-probabilities of its tokens where they were asked for."""

    text: str
    logprobs: tuple[TextLogprob, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """The next text, "" while it is held back, and how many tokens it took. `num_prompt_tokens`: the whole prompt's.

    `token_ids` are those whose text has begun to be shown; `logprobs` has one for each, where they were asked for.
    What a stop string cut off counts in `num_tokens` alone.
    """

    text: str
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: FinishReason | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TextLogprob, ...] = ()
    prompt: PromptEcho | None = None  # in the first delta, where an echo was asked for


class TextModel(Protocol):
    """What the HTTP API needs: `TokenizedModel` in this process, or one behind a Ray Serve handle."""

    def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """Raises PromptError or ContextLengthError before the first delta, EngineError at any point."""
        ...

    async def health(self) -> Health:
        """Raises EngineError if no request can succeed any more."""
        ...


async def prompt_text(model: TextModel, prompt: TokenPrompt) -> str:
    """The prompt as text, from a model that has the tokenizer. The engine is not asked. Raises PromptError."""
    nothing = TextRequest(prompt, SamplingParams(max_tokens=0), echo=True)
    async with aclosing(model.complete(nothing)) as deltas:
        return "".join([delta.prompt.text async for delta in deltas if delta.prompt is not None])


class TokenizedModel:
    """A TextModel from an engine and its tokenizer."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: "PreTrainedTokenizerBase",
        prompt_format: Literal["chat_template", "plain"] = "chat_template",
    ) -> None:
        self._engine, self._tokenizer, self._prompt_format = engine, tokenizer, prompt_format
        self._bytes = TokenBytes(tokenizer)

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`. A stop string drops the request from the engine at once."""
        ids = self._encode(request.prompt)
        text = self._text_of(request.prompt)
        writer = _Writer(self._tokenizer, self._bytes, ids, len(text), request)
        is_first = True
        async with aclosing(self._deltas(ids, request)) as deltas:
            async for delta in deltas:
                out = writer.take(delta)
                if request.echo and is_first:
                    out = replace(out, prompt=PromptEcho(text, self._echoed(delta.prompt_logprobs)))
                is_first = False
                yield out
                if out.finish_reason is not None:
                    return

    async def health(self) -> Health:
        """See `TextModel`."""
        return await self._engine.health()

    async def _deltas(self, ids: tuple[int, ...], request: TextRequest) -> AsyncGenerator[Delta, None]:
        """The engine's, where it has anything to do."""
        sampling, end = request.sampling, self._tokenizer.eos_token_id
        echoes_logprobs = request.echo and sampling.num_logprobs is not None
        if sampling.max_tokens is not None and len(request.emitted) >= sampling.max_tokens and not echoes_logprobs:
            yield Delta((), "length")
            return
        stop = frozenset[int]() if end is None else frozenset([end])
        asked = TokenRequest(ids, sampling, stop, request.emitted, echoes_logprobs)
        async with aclosing(self._engine.generate(asked)) as deltas:
            async for delta in deltas:
                yield delta

    def _encode(self, prompt: str | tuple[Message, ...] | TokenPrompt) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            ids = self._known(prompt.token_ids)
        elif isinstance(prompt, str):
            ids = self._tokenizer(prompt)["input_ids"]
        elif self._prompt_format == "plain":
            ids = self._tokenizer("\n".join(message.content for message in prompt))["input_ids"]
        else:
            # Templates carry their own beginning-of-sequence token.
            ids = self._tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"]
        if not ids:
            raise PromptError("the prompt is empty: give at least one character")
        return tuple(int(i) for i in ids)

    def _known(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        unknown = next((i for i in token_ids if not 0 <= i < len(self._tokenizer)), None)
        if unknown is not None:
            raise PromptError(f"token id {unknown} is none of this model's {len(self._tokenizer)}")
        return token_ids

    def _render(self, messages: tuple[Message, ...]) -> str:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise PromptError(
                "this model has no chat template: use /v1/completions, or serve it with prompt_format: plain"
            )
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise PromptError(f"the model's chat template refuses these messages: {error}") from None
        return str(text)

    def _text_of(self, prompt: str | tuple[Message, ...] | TokenPrompt) -> str:
        """The prompt as its sender counts characters in it. A conversation has no such text."""
        if isinstance(prompt, TokenPrompt):
            return decode(self._tokenizer, prompt.token_ids)
        return prompt if isinstance(prompt, str) else ""

    def _echoed(self, logprobs: Sequence[TokenLogprob]) -> tuple[TextLogprob, ...]:
        detokenizer, offset, echoed = Detokenizer(self._tokenizer, ()), 0, []
        for logprob in logprobs:
            echoed.append(in_bytes(self._bytes, logprob, offset))
            offset += len(detokenizer.push([logprob.token_id]))
        return tuple(echoed)


@dataclass(frozen=True)
class _Token:
    """A token whose text is not shown yet."""

    token_id: int
    start: int  # of its text, in characters of the completion
    logprob: TextLogprob | None


class _Writer:
    """An engine's deltas to deltas of text. What it lets go depends on the tokens, not on how they were cut up."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        token_bytes: TokenBytes,
        prompt_token_ids: Sequence[int],
        num_prompt_characters: int,
        request: TextRequest,
    ) -> None:
        self._detokenizer, self._matcher = Detokenizer(tokenizer, prompt_token_ids), StopMatcher(request.stop)
        self._bytes, self._offset, self._num_prompt_tokens = token_bytes, num_prompt_characters, len(prompt_token_ids)
        self._end = self._shown = 0  # characters of the completion: known, let go
        self._held: deque[_Token] = deque()
        for token_id in request.emitted:
            self._push(token_id, None)
        self._held.clear()
        # Text that tokens not among `emitted` had let go; they will let it go again.
        self._num_to_skip = max(0, request.num_shown - self._shown)

    def take(self, delta: Delta) -> TextDelta:
        """What may be shown now."""
        texts, stopped = [], False
        for i, token_id in enumerate(delta.token_ids):
            text, stopped = self._push(token_id, delta.logprobs[i] if delta.logprobs else None)
            texts.append(text)
            if stopped:
                break
        if delta.finish_reason is not None and not stopped:
            text, stopped = self._let_go(self._detokenizer.push([], last=True), last=True)
            texts.append(text)
        reason: FinishReason | None = "stop" if stopped else delta.finish_reason
        num_taken = len(self._held)
        tokens = tuple(self._ripe(everything=reason is not None and not stopped))
        return TextDelta(
            text=self._unseen("".join(texts)),
            num_prompt_tokens=self._num_prompt_tokens,
            num_tokens=num_taken if reason is not None else len(tokens),
            finish_reason=reason,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprob for token in tokens if token.logprob is not None),
        )

    def _push(self, token_id: int, logprob: TokenLogprob | None) -> tuple[str, bool]:
        told = None if logprob is None else in_bytes(self._bytes, logprob, self._offset + self._end)
        self._held.append(_Token(token_id, self._end, told))
        return self._let_go(self._detokenizer.push([token_id]))

    def _let_go(self, piece: str, last: bool = False) -> tuple[str, bool]:
        self._end += len(piece)
        text, stopped = self._matcher.push(piece, last)
        self._shown += len(text)
        return text, stopped

    def _ripe(self, everything: bool) -> Iterator[_Token]:
        """The tokens whose text has begun to be shown; at an end without a stop string, all."""
        while self._held and (everything or self._held[0].start < self._shown):
            yield self._held.popleft()

    def _unseen(self, text: str) -> str:
        num_skipped = min(self._num_to_skip, len(text))
        self._num_to_skip -= num_skipped
        return text[num_skipped:]


def in_bytes(token_bytes: TokenBytes, logprob: TokenLogprob, offset: int) -> TextLogprob:
    """The engine's log-probabilities with the bytes of each token."""
    top = tuple((token_bytes[token_id], value) for token_id, value in logprob.top)
    return TextLogprob(token_bytes[logprob.token_id], logprob.logprob, top, offset)
