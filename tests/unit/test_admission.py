"""The door of the server: who gets in, how many, how much; and nothing of a request where it does not belong."""

import asyncio
import io
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import openai
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alpaca_ray.config import AdmissionConfig
from alpaca_ray.provider.limit_headers import parse_limit_headers
from alpaca_ray.provider.window import Charge
from alpaca_ray.serve import access_log
from alpaca_ray.serve.access_log import Access
from alpaca_ray.serve.admission import Admission
from alpaca_ray.serve.exposure import check_exposure, is_loopback
from alpaca_ray.serve.keys import Key, Keys, make_key, parse_keys
from alpaca_ray.serve.places import Places
from alpaca_ray.serve.quota import WINDOW_S, Exceeded, Quotas, estimate_tokens
from alpaca_ray.serve.request_headers import proxy_middlewares

DEFAULTS = AdmissionConfig()
MAX_LENGTH = 2048
LOOPBACK = ("127.0.0.1", 50_000)
ELSEWHERE = ("192.0.2.7", 50_000)
GENERATE = make_key("generator", ["generate"])
DETECT = make_key("detective", ["detect"])
LIMITED = make_key("limited", ["generate"], requests_per_minute=2, tokens_per_minute=1000)
KEYS = parse_keys("\n".join(key.line for key in (GENERATE, DETECT, LIMITED)), "here")


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@dataclass
class Answer:
    """What a client got: messages as they came."""

    status: int | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    is_complete: bool = False
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name: str) -> str | None:
        found = [value for given, value in self.headers if given == name]
        assert len(found) < 2, "one of each"
        return found[0] if found else None

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert self.status is None, "one answer"
            self.status = message["status"]
            self.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
        else:
            assert not self.is_complete
            self.chunks.append(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)
        self.arrived.set()


async def ask(
    app: ASGIApp,
    method: str = "POST",
    path: str = "/v1/completions",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    body: Sequence[bytes] = (b"{}",),
    *,
    client: tuple[str, int] | None = LOOPBACK,
    root_path: str = "",
    stalls: bool = False,
    leaves: asyncio.Event | None = None,
    answer: Answer | None = None,
) -> Answer:
    """One request. `stalls`: the last part of the body never comes; `leaves`: when the client goes away."""
    answer = answer or Answer()
    parts = [
        {"type": "http.request", "body": part, "more_body": stalls or i < len(body)} for i, part in enumerate(body, 1)
    ]
    given = list(headers.items() if isinstance(headers, Mapping) else headers)
    if not any(name == "host" for name, _ in given):
        given.append(("host", "127.0.0.1:8000"))
    scope: dict[str, Any] = {
        "type": "http", "method": method, "path": root_path + path, "root_path": root_path, "client": client,
        "query_string": b"", "state": {},
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given],
    }  # fmt: skip

    async def receive() -> Message:
        if parts:
            return parts.pop(0)
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    await app(scope, receive, answer.take)
    return answer


class App:
    """An API that says yes. `work` comes between the request and the answer."""

    def __init__(self, work: Callable[[Scope], Awaitable[None]] | None = None) -> None:
        self.work = work
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["method"] == "POST":
            message = await receive()
            assert not message["more_body"], "the body comes whole"
            self.bodies.append(message["body"])
        if self.work is not None:
            await self.work(scope)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"yes"})


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def door(
    app: ASGIApp,
    config: AdmissionConfig = DEFAULTS,
    keys: Keys | None = None,
    *,
    accesses: list[Access] | None = None,
    clock: Callable[[], float] = lambda: 1000.0,
    max_in_flight: int = 4,
) -> Admission:
    return Admission(
        app,
        Keys(None, KEYS) if keys is None else keys,
        config,
        max_in_flight=max_in_flight,
        max_length=MAX_LENGTH,
        record=access_log.log_access if accesses is None else accesses.append,
        clock=clock,
        new_id=lambda: "new-id",
    )


T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 20))


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer sk-alpaca-nobody")],
        [("authorization", GENERATE.secret)],
        [("authorization", f"Basic {GENERATE.secret}")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {GENERATE.secret}"), ("authorization", f"Bearer {GENERATE.secret}")],
        [("api-key", GENERATE.secret)],
        [("cookie", f"Bearer {GENERATE.secret}")],
    ],
)
def test_without_a_key_nothing_opens(headers: list[tuple[str, str]]) -> None:
    app, accesses = App(), list[Access]()
    for method, path in [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("PUT", "/x")]:
        answer = run(ask(door(app, accesses=accesses), method, path, headers))
        assert answer.status == 401
        assert answer.header("www-authenticate") == 'Bearer realm="alpaca_ray"'
        assert (answer.error["type"], answer.error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert not app.scopes
    assert {access.refusal for access in accesses} <= {"no_key", "wrong_key"}


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(path: str) -> None:
    assert run(ask(door(App()), "GET", path, client=ELSEWHERE)).status == 200
    assert run(ask(door(App()), "POST", path, client=ELSEWHERE)).status == 401


@pytest.mark.parametrize("root_path", ["", "/alpaca"])
@pytest.mark.parametrize(
    ("method", "path", "generate", "detect"),
    [
        ("POST", "/v1/completions", 200, 403),
        ("POST", "/v1/chat/completions", 200, 403),
        ("POST", "/v1/watermark/detect", 403, 200),
        ("GET", "/v1/models", 200, 200),
        ("POST", "/v1/anything", 200, 403),
        ("DELETE", "/v1/models/x", 200, 403),
        ("GET", "/admin/flags", 403, 403),
    ],
)
def test_a_key_opens_what_its_scopes_name(method: str, path: str, generate: int, detect: int, root_path: str) -> None:
    for secret, status in ((GENERATE.secret, generate), (DETECT.secret, detect)):
        answer = run(ask(door(App()), method, path, bearer(secret), client=ELSEWHERE, root_path=root_path))
        assert answer.status == status
        if status == 403:
            assert answer.error["code"] == "insufficient_scope"


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        (LOOPBACK, {}, 200),
        (("::1", 1), {"host": "[::1]:8000"}, 200),
        (("::ffff:127.0.0.1", 1), {"host": "localhost"}, 200),
        (ELSEWHERE, {}, 403),
        (None, {}, 403),
        (("testclient", 1), {}, 403),
        (LOOPBACK, {"x-forwarded-for": "127.0.0.1"}, 403),
        (LOOPBACK, {"forwarded": "for=127.0.0.1"}, 403),
        (LOOPBACK, {"host": "rebound.example.org"}, 403),
        (LOOPBACK, {"host": "[["}, 403),
        (LOOPBACK, {"host": ""}, 403),
        (LOOPBACK, {"origin": "https://page.example.org"}, 403),
        (LOOPBACK, {"origin": "https://ours.example.org"}, 200),
    ],
)
def test_a_server_without_keys_answers_its_own_machine(
    client: tuple[str, int] | None, headers: dict[str, str], status: int
) -> None:
    config = AdmissionConfig(cors_origins=["https://ours.example.org"])
    for method, path in [("POST", "/v1/completions"), ("GET", "/v1/models")]:
        answer = run(ask(door(App(), config, Keys(None)), method, path, headers, client=client))
        assert answer.status == status
    assert run(ask(door(App(), config, Keys(None)), "GET", "/health", headers, client=client)).status == 200


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.5", False), ("example.org", False),
        ("localhost.example.org", False), ("", False), ("::ffff:10.0.0.1", False),
    ],
)  # fmt: skip
def test_only_loopback_may_go_without_keys(host: str, is_ours: bool) -> None:
    assert is_loopback(host) is is_ours
    assert (check_exposure(host, "EveryNode", has_keys=False) is None) is is_ours
    assert check_exposure(host, "HeadOnly", has_keys=True) is None
    assert check_exposure(host, "Disabled", has_keys=False) is None


def test_past_its_requests_per_minute_a_key_waits() -> None:
    clock, accesses = Clock(), list[Access]()
    admission = door(App(), clock=clock, accesses=accesses)

    def complete() -> Answer:
        return run(ask(admission, headers=bearer(LIMITED.secret), body=[b'{"prompt": "x", "max_tokens": 1}']))

    answers = [complete() for _ in range(3)]
    clock.now_s += 59.0
    early = complete()
    clock.now_s += 1.0
    late = complete()

    assert [answer.status for answer in [*answers, early, late]] == [200, 200, 429, 429, 200]
    said = [parse_limit_headers(dict(answer.headers)) for answer in [*answers, early, late]]
    assert [(limits.limit_requests, limits.remaining_requests) for limits in said] == [
        (2, 1),
        (2, 0),
        (2, 0),
        (2, 0),
        (2, 1),
    ]
    assert [limits.reset_requests_s for limits in said] == [60.0, 60.0, 60.0, 1.0, 60.0]
    assert [limits.retry_after_s for limits in said] == [None, None, 60.0, 1.0, None]
    assert (answers[2].error["type"], answers[2].error["code"]) == ("requests", "rate_limit_exceeded")
    assert run(ask(admission, headers=bearer(GENERATE.secret))).status == 200, "the other keys' minutes are their own"
    assert [access.refusal for access in accesses] == [None, None, "rate_requests", "rate_requests", None, None]


def test_tokens_are_reserved_until_the_api_says_what_was_used() -> None:
    async def use_ten(scope: Scope) -> None:
        scope["state"]["ticket"].add_tokens(7)
        scope["state"]["ticket"].add_tokens(3)

    async def use_none(scope: Scope) -> None:
        pass

    body = json.dumps({"prompt": "x" * 400, "max_tokens": 300}).encode()
    remaining: list[int | None] = []
    for work in (use_ten, use_none):
        admission = door(App(work))
        for _ in range(2):
            answer = run(ask(admission, headers=bearer(LIMITED.secret), body=[body]))
            remaining.append(parse_limit_headers(dict(answer.headers)).remaining_tokens)
    reserved = estimate_tokens(body, MAX_LENGTH)
    assert 400 <= reserved <= 410
    assert remaining == [1000 - reserved, 1000 - 10 - reserved, 1000 - reserved, 1000 - 2 * reserved]


def test_an_error_of_the_api_costs_no_tokens_and_a_refusal_for_tokens_says_when() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    body = json.dumps({"messages": []}).encode()  # no max_tokens: all that the model can, above the limit of 1000
    failing, answering = door(fail), door(App())
    assert [run(ask(failing, headers=bearer(LIMITED.secret), body=[body])).status for _ in range(2)] == [400, 400]
    first, second = (run(ask(answering, headers=bearer(LIMITED.secret), body=[body])) for _ in range(2))
    assert (first.status, second.status) == (200, 429)
    assert (second.error["type"], second.header("retry-after")) == ("tokens", "60")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 120), st.integers(0, 120)), max_size=60),
    st.integers(1, 5),
    st.integers(1, 100),
)
def test_no_minute_ever_holds_more_than_the_limits(
    arrivals: list[tuple[float, int, int]], requests: int, tokens: int
) -> None:
    key, quotas, now_s = Key("a", b"", frozenset(), requests, tokens), Quotas(), 0.0
    let_in: list[tuple[float, int]] = []
    for gap_s, estimate, used in arrivals:
        now_s += gap_s
        taken = quotas.take(key, estimate, now_s)
        window = [(start_s, spent) for start_s, spent in let_in if start_s + WINDOW_S > now_s]
        wanted = min(estimate, tokens)
        fits = len(window) < requests and sum(spent for _, spent in window) + wanted <= tokens
        assert isinstance(taken, Charge) is fits
        if isinstance(taken, Exceeded):
            assert 0 < taken.retry_in_s <= WINDOW_S + 1e-6
            now_s += taken.retry_in_s + 1e-6  # sums of floats
            again = quotas.take(key, estimate, now_s)
            assert isinstance(again, Charge), "Retry-After is kept"
            quotas.settle(key, again, 0, 0)
        else:
            spent = min(used, wanted)
            quotas.settle(key, taken, 1, spent)
            let_in.append((now_s, spent))


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x", "max_tokens": 5}, 5),
        ({"prompt": "x"}, 16),
        ({"messages": [], "max_completion_tokens": 9}, 9),
        ({"messages": []}, MAX_LENGTH),
        ({"prompt": ["x", "y"], "max_tokens": 5, "n": 3}, 30),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        ({"prompt": [[1], [2]], "max_tokens": 5}, 10),
        ({"messages": [], "max_tokens": True, "n": -1}, MAX_LENGTH),
        ({"prompt": "x", "max_tokens": 10**30, "n": 10**30}, 128 * MAX_LENGTH),
        ([], 0),
    ],
)
def test_the_estimate_is_the_prompt_and_all_that_may_come(body: Any, tokens: int) -> None:
    raw = json.dumps(body).encode()
    assert estimate_tokens(raw, MAX_LENGTH) == len(raw) // 4 + tokens


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_an_estimate_of_anything(body: bytes) -> None:
    assert 0 <= estimate_tokens(body, MAX_LENGTH) <= len(body) // 4 + 128 * MAX_LENGTH


def test_past_the_queue_requests_are_turned_away_at_once_and_the_others_are_served_in_order() -> None:
    async def drill() -> None:
        gate, began = asyncio.Event(), list[str]()

        async def work(scope: Scope) -> None:
            if scope["method"] == "POST":
                began.append(scope["state"]["ticket"].request_id)
                await gate.wait()

        admission = door(App(work), AdmissionConfig(max_in_flight=2, max_waiting=1))
        tasks: list[asyncio.Future[Answer]] = []
        for i in range(3):
            tasks.append(
                asyncio.ensure_future(ask(admission, headers=bearer(GENERATE.secret) | {"x-request-id": f"r{i}"}))
            )
            await settled()
        assert (admission.stats().num_in_flight, admission.stats().num_waiting) == (2, 1)

        refused = await ask(admission, headers=bearer(GENERATE.secret))
        models = await ask(admission, "GET", "/v1/models", bearer(GENERATE.secret))
        gate.set()
        answers = await asyncio.gather(*tasks)

        assert refused.status == 429
        assert int(refused.header("retry-after") or 0) >= 1
        assert refused.error["code"] == "queue_full"
        assert models.status == 200, "what costs nothing does not queue"
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert began == ["r0", "r1", "r2"]
        assert admission.stats().refusals == {"queue_full": 1}
        assert (admission.stats().num_in_flight, admission.stats().num_waiting) == (0, 0)

    run(drill())


@pytest.mark.parametrize("how", ["leaves", "cancelled", "timeout"])
def test_who_stops_waiting_leaves_a_free_place_and_pays_nothing(how: str) -> None:
    async def drill() -> None:
        gate, leaves, accesses = asyncio.Event(), asyncio.Event(), list[Access]()

        async def work(_: Scope) -> None:
            await gate.wait()

        config = AdmissionConfig(max_in_flight=1, max_waiting=1, max_wait_s=0.01 if how == "timeout" else 60)
        app = App(work)
        admission = door(app, config, accesses=accesses)
        first = asyncio.ensure_future(ask(admission, headers=bearer(GENERATE.secret)))
        await settled()
        waiting = asyncio.ensure_future(ask(admission, headers=bearer(LIMITED.secret), leaves=leaves))
        await settled()
        assert admission.stats().num_waiting == 1

        if how == "leaves":
            leaves.set()
        elif how == "cancelled":
            waiting.cancel()
        await asyncio.wait([waiting])
        assert admission.stats().num_waiting == 0
        assert accesses[0].status == {"leaves": 499, "cancelled": 499, "timeout": 429}[how]
        if how == "timeout":
            assert waiting.result().header("retry-after") is not None
        gate.set()
        assert (await first).status == 200
        assert len(app.scopes) == 1, "it was never asked"
        after = await ask(admission, headers=bearer(LIMITED.secret))
        assert parse_limit_headers(dict(after.headers)).remaining_requests == 1

    run(drill())


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.lists(st.integers(0, 9), max_size=60))
def test_the_queue_never_holds_more_and_never_loses_a_turn(in_flight: int, waiting: int, steps: list[int]) -> None:
    async def walk() -> None:
        places, turns = Places(in_flight, waiting), list[asyncio.Future[None]]()
        for step in steps:
            if step > 4 or not turns:
                if places.enter():
                    turns.append(places.line_up())
                else:
                    assert len(turns) == in_flight + waiting
            else:
                places.step_out(turns.pop(step % len(turns)), held_s=1.0)
                places.leave()
            assert [turn.done() for turn in turns] == [True] * places.num_in_flight + [False] * places.num_waiting
            assert places.num_in_flight == min(len(turns), in_flight)
            assert 1 <= places.retry_after_s() <= 60

    asyncio.run(walk())


@pytest.mark.parametrize(
    ("headers", "body", "read"),
    [
        ({"content-length": "11"}, [b"x"] * 11, 0),
        ({"content-length": "9" * 500}, [b"x"], 0),
        ({}, [b"x" * 4] * 100, 3),
        ({"content-length": "1"}, [b"x" * 4] * 100, 3),
        ({"content-length": "-1"}, [b"x" * 11], 1),
        ({"transfer-encoding": "chunked"}, [b"x" * 11], 1),
    ],
)
def test_a_body_over_the_size_is_refused_without_reading_it_all(
    headers: dict[str, str], body: list[bytes], read: int
) -> None:
    app, left = App(), list(body)

    async def drill() -> None:
        admission = door(app, AdmissionConfig(max_body_bytes=10))
        answer = Answer()
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "client": LOOPBACK,
            "headers": [(n.encode(), v.encode()) for n, v in (headers | bearer(GENERATE.secret)).items()],
        }  # fmt: skip

        async def receive() -> Message:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        await admission(scope, receive, answer.take)
        assert answer.status == 413
        assert answer.error["code"] == "request_too_large"
        assert len(body) - len(left) == read
        assert admission.stats().refusals == {"body_too_large": 1}
        exact = await ask(admission, headers=bearer(GENERATE.secret), body=[b"x" * 4, b"x" * 6])
        assert exact.status == 200

    run(drill())
    assert app.bodies == [b"x" * 10]


def test_a_body_that_stops_coming_and_an_answer_that_never_comes_end() -> None:
    async def never(_: Scope) -> None:
        await asyncio.Event().wait()

    slow = door(App(), AdmissionConfig(body_timeout_s=0.01))
    endless = door(App(never), AdmissionConfig(request_timeout_s=0.01))

    stalled = run(ask(slow, headers=bearer(GENERATE.secret), stalls=True))
    late = run(ask(endless, headers=bearer(GENERATE.secret)))

    assert (stalled.status, late.status) == (408, 408)
    assert stalled.error["code"] == late.error["code"] == "request_timeout"
    assert (slow.stats().refusals, endless.stats().refusals) == ({"body_timeout": 1}, {"request_timeout": 1})
    assert (slow.stats().num_in_flight, endless.stats().num_in_flight) == (0, 0)


def test_a_stream_goes_through_piece_by_piece_and_one_that_takes_too_long_ends_with_an_error_event() -> None:
    async def drill() -> None:
        more = asyncio.Event()

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await more.wait()
            await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
            await asyncio.Event().wait()

        answer = Answer()
        admission = door(stream, AdmissionConfig(request_timeout_s=0.2))
        asking = asyncio.ensure_future(ask(admission, headers=bearer(GENERATE.secret), answer=answer))
        await answer.arrived.wait()
        await settled()
        assert answer.chunks == [b"data: 1\n\n"], "not held back"
        more.set()
        await asking

        assert answer.status == 200
        assert answer.chunks[1] == b"data: 2\n\n"
        last = answer.chunks[2].decode()
        assert last.startswith("data: ")
        assert last.endswith("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert answer.is_complete

    run(drill())


def test_the_time_to_the_first_event_is_that_of_a_streams_first_words() -> None:
    clock, accesses = Clock(), list[Access]()

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for seconds in (2.0, 3.0):
            clock.now_s += seconds
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await send({"type": "http.response.body"})

    run(ask(door(stream, accesses=accesses, clock=clock), headers=bearer(GENERATE.secret)))
    run(ask(door(App(), accesses=accesses, clock=clock), headers=bearer(GENERATE.secret)))

    assert [(access.first_event_s, access.duration_s) for access in accesses] == [(2.0, 5.0), (None, 0.0)]


def test_an_error_of_the_api_goes_through_and_frees_the_place() -> None:
    async def fail(_: Scope) -> None:
        raise TimeoutError("of the API's own")

    accesses: list[Access] = []
    admission = door(App(fail), accesses=accesses)
    with pytest.raises(TimeoutError, match="own"):
        run(ask(admission, headers=bearer(GENERATE.secret)))
    assert admission.stats().num_in_flight == 0
    assert len(accesses) == 1


def test_while_it_drains_what_has_begun_goes_on_and_nothing_new_does() -> None:
    async def drill() -> None:
        gate = asyncio.Event()

        async def work(_: Scope) -> None:
            await gate.wait()

        admission = door(App(work))
        begun = asyncio.ensure_future(ask(admission, headers=bearer(GENERATE.secret)))
        await settled()
        admission.drain()
        refused = await ask(admission, headers=bearer(GENERATE.secret))
        ready = await ask(admission, "GET", "/ready")
        gate.set()
        health = await ask(admission, "GET", "/health")

        assert (refused.status, ready.status, health.status) == (503, 503, 200)
        assert refused.header("retry-after") is not None
        assert refused.error["code"] == "server_draining"
        assert (await begun).status == 200
        assert admission.stats().is_draining

    run(drill())


PREFLIGHT = {"origin": "https://ours.example.org", "access-control-request-method": "POST"}


def test_no_web_page_may_read_answers_unless_it_is_named() -> None:
    closed, opened = door(App()), door(App(), AdmissionConfig(cors_origins=["https://ours.example.org"]))
    ours = {"origin": "https://ours.example.org"} | bearer(GENERATE.secret)
    other = {"origin": "https://other.example.org"} | bearer(GENERATE.secret)

    assert run(ask(closed, "OPTIONS", headers=PREFLIGHT)).status == 401
    assert run(ask(closed, headers=ours)).header("access-control-allow-origin") is None
    assert run(ask(opened, "OPTIONS", headers=PREFLIGHT)).status == 200
    assert run(ask(opened, headers=ours)).header("access-control-allow-origin") == "https://ours.example.org"
    assert run(ask(opened, headers=other)).header("access-control-allow-origin") is None
    assert run(ask(opened, headers={"origin": "https://ours.example.org"})).status == 401


STEERING = {
    "x-request-disconnect-disabled": "?1",
    "X-Request-Timeout-Seconds": "0",
    "serve_multiplexed_model_id": "other",
    "Serve-Multiplexed-Model-Id": "other",
    "x-session-id": "1",
    "x_session_id": "1",
    "x-serve-router-replica": "1",
}


def test_the_api_sees_neither_the_key_nor_what_steers_serve_nor_what_was_for_one_hop() -> None:
    app = App()
    hop = {"connection": "close, X-Hop", "x-hop": "1", "te": "trailers", "upgrade": "h2c", "keep-alive": "5"}
    kept = {"content-type": "application/json", "user-agent": "x", "x-stainless-lang": "python"}
    sent = STEERING | hop | kept | bearer(GENERATE.secret) | {"cookie": "a", "x-api-key": "b", "host": "h"}

    run(ask(door(app), headers=sent))

    seen = {name.decode(): value.decode() for name, value in app.scopes[0]["headers"]}
    assert seen == kept | {"host": "h", "x-request-id": "new-id"}


def test_serves_proxy_can_be_kept_from_obeying_clients() -> None:
    app = App()
    (middleware,) = proxy_middlewares()
    run(
        ask(
            middleware.cls(app, *middleware.args, **middleware.kwargs),
            headers=STEERING | {"accept": "*/*", "host": "h"},
        )
    )
    assert app.scopes[0]["headers"] == [(b"accept", b"*/*"), (b"host", b"h")]


@pytest.mark.parametrize(
    ("given_id", "used"),
    [("abc-123", "abc-123"), ("a b", "new-id"), ("x" * 65, "new-id"), ("", "new-id"), (GENERATE.secret, "new-id")],
    ids=["fine", "space", "long", "empty", "key"],
)
def test_a_request_has_one_id_in_the_api_the_answer_and_the_log(given_id: str, used: str) -> None:
    app, accesses = App(), list[Access]()
    headers = bearer(GENERATE.secret) | {"x-request-id": given_id}
    answer = run(ask(door(app, accesses=accesses), headers=headers))
    refused = run(ask(door(app, accesses=accesses), headers={"x-request-id": given_id}))
    assert answer.header("x-request-id") == refused.header("x-request-id") == used
    assert app.scopes[0]["state"]["ticket"].request_id == used
    assert [access.request_id for access in accesses] == [used, used]


def test_the_access_log_is_json_with_the_prompt_only_if_asked_for() -> None:
    stream = io.StringIO()
    logger = access_log.logger
    before = (logger.handlers[:], logger.level, logger.propagate)
    try:
        access_log.start(stream)
        for log_prompts in (False, True):
            admission = door(App(), AdmissionConfig(log_prompts=log_prompts))
            run(ask(admission, headers=bearer(GENERATE.secret), body=[b'{"prompt": "secret\nthing"}']))
            run(ask(admission, "GET", "/v1/models/secret-model", bearer(DETECT.secret)))
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["route"] for line in lines] == ["/v1/completions", "/v1/models/{model}"] * 2
    assert lines[0] == {
        "event": "request", "request_id": "new-id", "key": "generator", "method": "POST", "route": "/v1/completions",
        "status": 200, "duration_s": 0.0,
    }  # fmt: skip
    assert lines[2]["prompt"] == '{"prompt": "secret\nthing"}'
    assert "secret" not in json.dumps([lines[0], lines[1], lines[3]])


def test_websockets_are_closed_and_the_lifespan_goes_through() -> None:
    sent: list[Message] = []
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def receive() -> Message:
        raise AssertionError("nothing to read")

    async def send(message: Message) -> None:
        sent.append(message)

    for kind in ("websocket", "lifespan"):
        run(door(app)({"type": kind, "path": "/", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert seen == ["lifespan"]


def test_serve_finds_the_routes_of_the_api() -> None:
    api = Starlette(routes=[Route("/v1/models/{name:path}", App())])
    assert door(api).routes == api.routes
    assert door(App()).routes == []


CANARY_KEY = "sk-alpaca-canary-key-6pYw"
CANARY_PROMPT = "canary prompt 9f3c"
CANARIES = st.sampled_from([CANARY_KEY, CANARY_PROMPT, GENERATE.secret, LIMITED.secret])
TEXTS = st.one_of(CANARIES, st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=20))
NAMES = st.one_of(
    st.sampled_from(
        ["authorization", "x-request-id", "content-length", "content-type", "origin", "connection", "host"]
    ),
    st.sampled_from(sorted(STEERING)),
    CANARIES.map(str.lower),
)
VALUES = st.one_of(TEXTS, CANARIES.map("Bearer {}".format), TEXTS.map("bearer  {} ".format), st.just("99999999999"))
BODIES = st.one_of(
    st.binary(max_size=60),
    CANARIES.map(str.encode),
    st.builds(
        lambda prompt, more: json.dumps({"prompt": prompt} | more).encode(),
        CANARIES,
        st.dictionaries(
            st.sampled_from(["max_tokens", "n", "stream", "messages"]), st.none() | st.integers() | CANARIES
        ),
    ),
    st.just(CANARY_PROMPT.encode() * 20),
)
PATHS = st.sampled_from(
    [
        "/v1/completions",
        "/v1/watermark/detect",
        "/v1/models",
        f"/v1/models/{CANARY_KEY}",
        f"/{CANARY_PROMPT}",
        "/health",
        "",
        "//",
        "/v1/../admin",
        f"/admin/{GENERATE.secret}",
    ]
)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["POST", "GET", "PUT", "OPTIONS", "HEAD", "X" + CANARY_KEY]),
    path=PATHS,
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=5),
    body=st.lists(BODIES, min_size=1, max_size=3),
    client=st.sampled_from([LOOPBACK, ELSEWHERE, None]),
    has_keys=st.booleans(),
)
def test_no_canary_comes_out_and_no_fault_of_ours(
    *,
    method: str,
    path: str,
    headers: list[tuple[str, str]],
    body: list[bytes],
    client: tuple[str, int] | None,
    has_keys: bool,
) -> None:
    log, accesses = io.StringIO(), list[Access]()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    try:
        app = App()
        config = AdmissionConfig(max_body_bytes=300)
        admission = door(app, config, Keys(None, KEYS) if has_keys else Keys(None), accesses=accesses)
        try:
            answer = asyncio.run(ask(admission, method, path, headers, body, client=client))
        finally:
            for access in accesses:
                access_log.log_access(access)
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)

    assert answer.status is not None
    assert answer.status < 500
    assert len(accesses) == 1
    shown = " ".join(
        [
            log.getvalue(),
            repr(answer.headers),
            repr(answer.body),
            repr(accesses),
            repr(admission.stats()),
            repr(KEYS),
        ]
    ).lower()
    inside = repr([scope["headers"] for scope in app.scopes if scope["state"]["ticket"].key_name is not None])
    for canary in (CANARY_KEY, CANARY_PROMPT, GENERATE.secret, LIMITED.secret):
        assert canary.lower() not in shown
    named = " ".join(value for name, value in headers if name == "authorization").strip()
    assert not named or f"'{named}'" not in inside, "the key stays outside"


class Server:
    """The door before an API on a free port of 127.0.0.1, for clients of others."""

    def __init__(self, admission: Admission) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(admission, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=30)


def test_the_official_client_understands_each_refusal() -> None:
    hello: dict[str, Any] = {"model": "m", "prompt": "x", "max_tokens": 1}
    admission = door(App(), AdmissionConfig(max_body_bytes=5000))
    with Server(admission) as server:
        with pytest.raises(openai.AuthenticationError) as wrong:
            server.client("sk-wrong").models.list()
        with pytest.raises(openai.PermissionDeniedError) as scope:
            server.client(DETECT.secret).completions.create(**hello)
        with pytest.raises(openai.APIStatusError) as large:
            server.client(GENERATE.secret).completions.create(**hello | {"prompt": "x" * 5000})
        for _ in range(2):
            server.client(LIMITED.secret).completions.with_raw_response.create(**hello)
        with pytest.raises(openai.RateLimitError) as limited:
            server.client(LIMITED.secret).completions.create(**hello)
        admission.drain()
        with pytest.raises(openai.InternalServerError) as draining:
            server.client(GENERATE.secret).completions.create(**hello)

    refusals = (wrong.value, scope.value, large.value, limited.value, draining.value)
    assert [(refusal.status_code, refusal.code) for refusal in refusals] == [
        (401, "invalid_api_key"),
        (403, "insufficient_scope"),
        (413, "request_too_large"),
        (429, "rate_limit_exceeded"),
        (503, "server_draining"),
    ]
    assert all(refusal.request_id == "new-id" for refusal in refusals)
    assert int(limited.value.response.headers["retry-after"]) == 60


def test_a_client_that_leaves_a_stream_frees_its_turn() -> None:
    left = threading.Event()

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        async def events() -> AsyncIterator[str]:
            try:
                yield "data: {}\n\n"
                await asyncio.Event().wait()
            finally:
                left.set()

        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    answered = threading.Event()
    accesses: list[Access] = []

    def record(access: Access) -> None:
        accesses.append(access)
        answered.set()

    admission = Admission(
        stream, Keys(None, KEYS), DEFAULTS, max_in_flight=1, max_length=MAX_LENGTH, record=record, new_id=lambda: "i"
    )
    with Server(admission) as server:
        events = server.client(GENERATE.secret).completions.create(model="m", prompt="x", stream=True)
        next(iter(events))
        assert admission.stats().num_in_flight == 1
        events.close()
        assert left.wait(20)
        assert answered.wait(20)
        assert admission.stats().num_in_flight == 0
    assert accesses[0].status == 200
