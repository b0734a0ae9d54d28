"""Deltas that travel together say what they said one by one."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_ray.serve.coalesce import MAX_TOGETHER, MIN_TOGETHER, coalesced
from alpaca_ray.serve.engine import EngineError
from alpaca_ray.serve.hold import joined
from alpaca_ray.serve.text import TextDelta

PIECES = st.lists(st.sampled_from(["", "a", " word", ".", "! ", "\n", "。", "3.14"]), min_size=1, max_size=60)


def said(pieces: list[str]) -> list[TextDelta]:
    """A delta of one token each; the last one ends the text."""
    last = len(pieces) - 1
    return [TextDelta(text, 3, 1, "length" if i == last else None, (i,)) for i, text in enumerate(pieces)]


async def stream(deltas: list[TextDelta], error: Exception | None = None) -> AsyncGenerator[TextDelta, None]:
    for delta in deltas:
        yield delta
    if error is not None:
        raise error


def sent(pieces: list[str]) -> list[TextDelta]:
    async def all_of_it() -> list[TextDelta]:
        return [delta async for delta in coalesced(stream(said(pieces)))]

    return asyncio.run(all_of_it())


@given(PIECES)
def test_nothing_is_lost_and_nothing_waits_for_ever(pieces: list[str]) -> None:
    deltas = sent(pieces)

    assert joined(deltas) == joined(said(pieces))
    assert all(len(delta.token_ids) <= MAX_TOGETHER for delta in deltas)
    assert all(len(delta.token_ids) >= MIN_TOGETHER for delta in deltas[1:-1])


def test_the_first_sentence_waits_for_nobody() -> None:
    deltas = sent(["One", " sentence", " and", " more", ".", " The", " next", " one", " is", " here", "!", " End"])

    assert [delta.text for delta in deltas] == ["One sentence and more. The", " next one is here! End"]


def test_later_sentences_travel_together() -> None:
    deltas = sent(
        [*["A", " first", " sentence", " here", ".", " x"], *(6 * [" and", " another", " one", " of", " them."])]
    )

    assert [len(delta.token_ids) for delta in deltas] == [6, MIN_TOGETHER, 6]


def test_a_text_without_an_end_travels_by_as_much_as_moderation_holds() -> None:
    deltas = sent([" word"] * 100)

    assert [len(delta.text) for delta in deltas] == [205, 195, 100]


def test_tokens_without_a_text_do_not_wait_for_ever() -> None:
    assert [len(delta.token_ids) for delta in sent([""] * 100)] == [MAX_TOGETHER, 36]


def test_an_error_comes_through() -> None:
    async def until_it_breaks() -> None:
        deltas = said(["a", "b", "c"])[:2]
        async for _ in coalesced(stream(deltas, EngineError("gone"))):
            pass

    with pytest.raises(EngineError):
        asyncio.run(until_it_breaks())
