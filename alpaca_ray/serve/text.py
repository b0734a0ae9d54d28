"""Text in, text out, over a token engine: tokenising, incremental detokenising, stop strings.

It stands beside the engine, not in the HTTP ingress: transformers' AutoTokenizer imports torch (394 MB and 5 s a
process, measured), and the model's files need to lie only where the engine runs.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from alpaca_ray.serve.engine import Engine, FinishReason, Health, SamplingParams, TokenRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character


class PromptError(ValueError):
    """A prompt that this model cannot be given. The text says why and what to do."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class TextRequest:
    """Plain text to go on with, or a conversation to answer. `stop`: strings that end the text before them."""

    prompt: str | tuple[Message, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """The next text, "" while it is held back, and the tokens it took. `num_prompt_tokens` is the whole prompt's."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: FinishReason | None = None


class TextModel(Protocol):
    """What the HTTP API needs: `TokenizedModel` in this process, or one behind a Ray Serve handle."""

    def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """Raises PromptError or ContextLengthError before the first delta, EngineError at any point."""
        ...

    async def health(self) -> Health:
        """Raises EngineError if no request can succeed any more."""
        ...


class TokenizedModel:
    """A TextModel from an engine and its tokenizer."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: "PreTrainedTokenizerBase",
        prompt_format: Literal["chat_template", "plain"] = "chat_template",
    ) -> None:
        self._engine, self._tokenizer, self._prompt_format = engine, tokenizer, prompt_format

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`. A stop string drops the request from the engine at once."""
        ids = self._encode(request.prompt)
        end = self._tokenizer.eos_token_id
        tokens = TokenRequest(tuple(ids), request.sampling, frozenset() if end is None else frozenset([end]))
        detokenizer, matcher = Detokenizer(self._tokenizer, ids), StopMatcher(request.stop)
        async with aclosing(self._engine.generate(tokens)) as deltas:
            async for delta in deltas:
                last = delta.finish_reason is not None
                text, stopped = matcher.push(detokenizer.push(delta.token_ids, last), last)
                reason: FinishReason | None = "stop" if stopped else delta.finish_reason
                yield TextDelta(text, len(ids), len(delta.token_ids), reason)
                if stopped:
                    return

    async def health(self) -> Health:
        """See `TextModel`."""
        return await self._engine.health()

    def _encode(self, prompt: str | tuple[Message, ...]) -> list[int]:
        if isinstance(prompt, str):
            ids = self._tokenizer(prompt)["input_ids"]
        elif self._prompt_format == "plain":
            ids = self._tokenizer("\n".join(message.content for message in prompt))["input_ids"]
        else:
            # Templates carry their own beginning-of-sequence token.
            ids = self._tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"]
        if not ids:
            raise PromptError("the prompt is empty: give at least one character")
        return [int(i) for i in ids]

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


class Detokenizer:
    """Token ids to text, piece by piece; the pieces together are the text of all ids at once.

    A token's text depends on its neighbours (a leading space, a character cut in two), so text is the difference of
    two decodings that share a few tokens before it, as in Hugging Face's text-generation-inference.
    """

    CONTEXT = 6  # tokens of the prompt that the first piece is decoded with

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_token_ids[-self.CONTEXT :])
        self._start, self._shown = 0, len(self._ids)  # text of ids[:shown] is out; ids[start:] are decoded

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """The text that is certain now. An incomplete character is held back until the `last` push."""
        self._ids += token_ids
        before = self._decode(self._ids[self._start : self._shown])
        after = self._decode(self._ids[self._start :])
        if after.endswith(REPLACEMENT) and not last:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopMatcher:
    """Cuts a growing text before the first stop string; holds back an end that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str, last: bool = False) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string ended it. `last`: nothing follows, hold nothing."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
