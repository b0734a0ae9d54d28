"""Deltas of a completion, held back until their text may be shown."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from alpaca_ray.serve.sentences import MAX_CHARS, MIN_CHARS, next_end
from alpaca_ray.serve.text import TextDelta


class Hold:
    """Takes deltas as they come and gives them back by sentences.

    Counts, token ids and log-probabilities speak of their text, so they wait for all of it. A delta without text
    speaks of the text behind it, and waits for that.
    """

    def __init__(self, min_chars: int = MIN_CHARS, max_chars: int = MAX_CHARS) -> None:
        self._min_chars, self._max_chars = min_chars, max_chars
        self._text = ""
        self.shown = 0  # characters given back
        self._ends: deque[int] = deque()  # of whole sentences that are held
        self._deltas: deque[tuple[TextDelta, int]] = deque()  # with the end of their text
        self._textless: list[TextDelta] = []
        self.num_prompt_tokens = 0
        self.is_finished = False

    def push(self, delta: TextDelta) -> None:
        """The next delta of the model."""
        assert not self.is_finished
        self.num_prompt_tokens = delta.num_prompt_tokens
        self.is_finished = delta.finish_reason is not None
        self._text += delta.text
        self._textless.append(delta)
        if delta.text or self.is_finished:
            self._deltas.extend((waiting, len(self._text)) for waiting in self._textless)
            self._textless.clear()
        self._find_ends()

    @property
    def ends(self) -> Sequence[int]:
        """Where the held sentences end, in characters from the beginning, the unfinished last one left out."""
        return tuple(self._ends)

    @property
    def is_over(self) -> bool:
        """Whether the model is done and all was given back."""
        return self.is_finished and not self._deltas

    def text_until(self, end: int) -> str:
        """All text from the beginning, what was given back included."""
        return self._text[:end]

    def is_blank(self, end: int) -> bool:
        """Whether nothing but space is held before `end`."""
        return not self._text[self.shown : end].strip()

    def release(self, end: int) -> TextDelta | None:
        """What is held before `end`, as one delta; None if that is nothing."""
        while self._ends and self._ends[0] <= end:
            self._ends.popleft()
        released: list[TextDelta] = []
        while self._deltas and self._deltas[0][1] <= end:
            delta, self.shown = self._deltas.popleft()
            released.append(delta)
        if self.shown < end:
            released.append(self._split(end))
        return joined(released) if released else None

    def _find_ends(self) -> None:
        start = self._ends[-1] if self._ends else self.shown
        while (end := next_end(self._text, start, self._min_chars, self._max_chars)) is not None:
            self._ends.append(end)
            start = end
        if self.is_finished and (start < len(self._text) or not self._ends):
            self._ends.append(len(self._text))

    def _split(self, end: int) -> TextDelta:
        """The text of the first held delta with text, as far as `end`, bare; the rest keeps all that it says."""
        at = next(i for i, (delta, _) in enumerate(self._deltas) if delta.text)
        delta, delta_end = self._deltas[at]
        cut = len(delta.text) - (delta_end - end)
        self._deltas[at] = (replace(delta, text=delta.text[cut:]), delta_end)
        self.shown = end
        return TextDelta(delta.text[:cut], delta.num_prompt_tokens, 0)


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """What they say together, as one."""
    return TextDelta(
        text="".join(delta.text for delta in deltas),
        num_prompt_tokens=deltas[-1].num_prompt_tokens,
        num_tokens=sum(delta.num_tokens for delta in deltas),
        finish_reason=deltas[-1].finish_reason,
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        prompt=next((delta.prompt for delta in deltas if delta.prompt is not None), None),
    )
