"""Deltas that travel together say what they said one by one."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_ray.serve.coalesce import MAX_TOGETHER, coalesced
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
def test_nothing_is_lost_and_the_first_token_waits_for_nobody(pieces: list[str]) -> None:
    deltas = sent(pieces)

    assert joined(deltas) == joined(said(pieces))
    assert deltas[0].token_ids == (0,)
    assert all(len(delta.token_ids) <= MAX_TOGETHER for delta in deltas)


def test_most_tokens_of_a_long_sentence_travel_together() -> None:
    assert len(sent([" word"] * 81)) == 11


def test_the_end_of_a_sentence_waits_for_nobody() -> None:
    deltas = sent(["One", " two", ".", " Three", " four"])

    assert [delta.text for delta in deltas] == ["One", " two. Three", " four"]


def test_an_error_comes_through() -> None:
    async def until_it_breaks() -> None:
        deltas = said(["a", "b", "c"])[:2]
        async for _ in coalesced(stream(deltas, EngineError("gone"))):
            pass

    with pytest.raises(EngineError):
        asyncio.run(until_it_breaks())
