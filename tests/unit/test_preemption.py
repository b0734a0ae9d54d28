"""What a cloud says before it takes a spot machine back, and what is made of it."""

import pytest

from alpaca_ray.cluster.preemption import (
    POLL_EVERY_S,
    Notice,
    aws_notice,
    fetch_by_http,
    google_notice,
    wait_for_notice,
)
from tests.metadata import MetadataServer

DEADLINE_S = 1_800_000_000.0


def test_aws_says_when() -> None:
    with MetadataServer() as server:
        assert aws_notice(fetch_by_http, 0.0, server.url) is None
        server.take_back(DEADLINE_S)
        assert aws_notice(fetch_by_http, 0.0, server.url) == Notice(DEADLINE_S)


def test_google_gives_half_a_minute() -> None:
    with MetadataServer() as server:
        assert google_notice(fetch_by_http, DEADLINE_S - 30, server.url) is None
        server.take_back(DEADLINE_S)
        assert google_notice(fetch_by_http, DEADLINE_S - 30, server.url) == Notice(DEADLINE_S)


def test_silence_and_nonsense_are_asked_again() -> None:
    answers: list[Exception | Notice | None] = [OSError("no route"), ValueError("no JSON"), None, Notice(9.0)]
    pauses: list[float] = []

    def ask(now_s: float) -> Notice | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert wait_for_notice(ask, lambda: 0.0, pauses.append) == Notice(9.0)
    assert pauses == [POLL_EVERY_S] * 3


def test_a_machine_without_a_metadata_server_raises_what_is_asked_again() -> None:
    with MetadataServer() as server:
        url = server.url
    with pytest.raises(OSError, match="refused"):
        aws_notice(fetch_by_http, 0.0, url)
