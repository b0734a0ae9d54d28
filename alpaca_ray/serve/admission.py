"""ASGI middleware in front of the API: who may ask, for how much, and how many at once.

A request passes, in this order: its key, the key's scope, the drain, a place in the queue, its body's size and pace,
the key's minute, its turn. What does not pass gets OpenAI's error body. Answers go through as they come.

The API finds a `Ticket` at `scope["state"]["ticket"]` (Starlette: `request.state.ticket`) and reports tokens to it.
"""

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from alpaca_ray.config import AdmissionConfig
from alpaca_ray.serve.access_log import Access, log_access
from alpaca_ray.serve.exposure import keyless_problem
from alpaca_ray.serve.keys import Key, Keys, KeyScope
from alpaca_ray.serve.places import Places
from alpaca_ray.serve.quota import Exceeded, Quotas, estimate_tokens
from alpaca_ray.serve.received import BodyTooLarge, ClientLeft, Received, read_body
from alpaca_ray.serve.refusals import (
    DRAINING,
    NO_KEY,
    SLOW_BODY,
    TOO_LONG,
    WRONG_KEY,
    Refusal,
    Refused,
    queue_full,
    rate_limited,
    waited_too_long,
)
from alpaca_ray.serve.request_headers import REQUEST_ID, request_id
from alpaca_ray.serve.visit import Visit

OPEN_ROUTES = frozenset({"/health", "/ready"})  # for probes
READING = frozenset({"GET", "HEAD", "OPTIONS"})
DETECT_ROUTE = "/v1/watermark/detect"
ADMIN_ROUTE = "/admin"
ANSWER_TIMEOUT_S = 5.0  # for a refusal to a client that does not read
EXPOSED_HEADERS = (
    REQUEST_ID,
    "retry-after",
    *(
        f"x-ratelimit-{value}-{what}"
        for value in ("limit", "remaining", "reset")
        for what in ("requests", "tokens")
    ),
)  # fmt: skip


@dataclass(frozen=True)
class AdmissionStats:
    """For metrics. `refusals`: how many by reason, since the start."""

    num_in_flight: int
    num_waiting: int
    is_draining: bool
    refusals: dict[str, int]


class Admission:
    """Wraps the API. One event loop; limits and queue are those of this process."""

    def __init__(  # noqa: PLR0913 - each is set by the app or by a test
        self,
        app: ASGIApp,
        keys: Keys,
        config: AdmissionConfig,
        *,
        max_in_flight: int,  # where the config leaves it open
        max_length: int,  # of the engine: what a chat without max_tokens may cost
        adds_request_id: bool = True,  # to answers; Serve's proxy adds it by itself
        record: Callable[[Access], None] = log_access,
        clock: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._app, self._keys, self._config = app, keys, config
        self._max_length, self._adds_request_id = max_length, adds_request_id
        self._record, self._clock, self._new_id = record, clock, new_id
        self._places = Places(config.max_in_flight or max_in_flight, config.max_waiting)
        self._quotas = Quotas()
        self._refusals: Counter[str] = Counter()
        self._is_draining = False
        self._outer: ASGIApp = self._admit
        if config.cors_origins:
            self._outer = CORSMiddleware(
                self._admit,
                allow_origins=config.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._outer(scope, receive, send)
        else:
            self._refusals["websocket"] += 1
            await send({"type": "websocket.close", "code": 1008})

    @property
    def routes(self) -> list[BaseRoute]:
        """The API's: Serve names its metrics after them."""
        found: list[BaseRoute] = getattr(self._app, "routes", [])
        return found

    def drain(self) -> None:
        """Finish what has begun, take nothing new: 503, and /ready says so."""
        self._is_draining = True

    def stats(self) -> AdmissionStats:
        """As of now."""
        places = self._places
        return AdmissionStats(places.num_in_flight, places.num_waiting, self._is_draining, dict(self._refusals))

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = Visit(scope, receive, send, request_id(Headers(scope=scope), self._new_id), self._clock)
        visit.adds_request_id = self._adds_request_id
        try:
            async with asyncio.timeout(self._config.request_timeout_s) as time_limit:
                await self._pass(visit)
        except Refused as refused:
            await self._refuse(visit, refused.refusal)
        except ClientLeft:
            visit.reason = "client_left"
        except TimeoutError:
            if not time_limit.expired():
                raise
            await self._refuse(visit, TOO_LONG)
        finally:
            self._settle(visit)
            self._record(visit.access())

    async def _pass(self, visit: Visit) -> None:
        open_to_all = visit.route in OPEN_ROUTES and visit.scope["method"] in READING
        if not open_to_all:
            visit.key = self._authenticate(visit)
        if self._is_draining and visit.route != "/health":
            raise Refused(DRAINING)
        if visit.scope["method"] in READING:
            await self._app(visit.inner_scope(), visit.receive, visit.send)
        elif self._places.enter():
            try:
                await self._pass_body(visit)
            finally:
                self._places.leave()
        else:
            raise Refused(queue_full(self._places))

    def _authenticate(self, visit: Visit) -> Key | None:
        if not self._keys.given:
            problem = keyless_problem(visit.scope, self._config.cors_origins)
            if problem is not None:
                raise Refused(Refusal(403, "keyless", problem, "api_keys_required"))
            return None
        secret = _bearer(visit.headers)
        if secret is None:
            raise Refused(NO_KEY)
        key = self._keys.find(secret, self._clock())
        if key is None:
            raise Refused(WRONG_KEY)
        visit.key = key  # a refusal from here on has a name
        scope = required_scope(visit.scope["method"], visit.route)
        if scope is not None and scope not in key.scopes:
            raise Refused(Refusal(403, "scope", f"This API key has not the scope {scope!r}", "insufficient_scope"))
        return key

    async def _pass_body(self, visit: Visit) -> None:
        limit = self._config.max_body_bytes
        try:
            async with asyncio.timeout(self._config.body_timeout_s) as time_limit:
                body = await read_body(visit.headers, visit.receive, limit)
        except BodyTooLarge:
            message = f"The request is larger than {limit} bytes"
            raise Refused(Refusal(413, "body_too_large", message, "request_too_large")) from None
        except TimeoutError:
            if not time_limit.expired():
                raise
            raise Refused(SLOW_BODY) from None
        if self._config.log_prompts:
            visit.prompt = body.decode("utf-8", "replace")
        self._take_quota(visit, body)
        received = Received(body, visit.receive)
        try:
            await self._pass_turn(visit, received)
        finally:
            received.close()

    def _take_quota(self, visit: Visit, body: bytes) -> None:
        if visit.key is None:
            return
        tokens = 0 if visit.key.tokens_per_minute is None else estimate_tokens(body, self._max_length)
        taken = self._quotas.take(visit.key, tokens, self._clock())
        visit.limit_headers = self._quotas.headers(visit.key, self._clock())
        if isinstance(taken, Exceeded):
            raise Refused(rate_limited(taken))
        visit.charge = taken

    async def _pass_turn(self, visit: Visit, received: Received) -> None:
        turn = self._places.line_up()
        called_s = None
        try:
            if not turn.done():
                await received.wait_while_there(turn, self._config.max_wait_s)
            if not turn.done():
                raise Refused(waited_too_long(self._places))
            called_s = self._clock()
            await self._app(visit.inner_scope(), received, visit.send)
        finally:
            self._places.step_out(turn, None if called_s is None else self._clock() - called_s)

    def _settle(self, visit: Visit) -> None:
        if visit.key is None or visit.charge is None:
            return
        if visit.ticket is None:  # turned away while it waited
            self._quotas.settle(visit.key, visit.charge, 0, 0)
        elif visit.ticket.num_tokens is not None:
            self._quotas.settle(visit.key, visit.charge, 1, visit.ticket.num_tokens)
        elif visit.status is None or visit.status >= 400:
            self._quotas.settle(visit.key, visit.charge, 1, 0)

    async def _refuse(self, visit: Visit, refusal: Refusal) -> None:
        visit.reason = refusal.reason
        self._refusals[refusal.reason] += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await visit.answer(refusal)


def required_scope(method: str, route: str) -> KeyScope | None:
    """Which scope a key needs; None: any key will do. What is not known needs more, not less."""
    if route.startswith(ADMIN_ROUTE):
        return "admin"
    if route == DETECT_ROUTE:
        return "detect"
    return None if method in READING else "generate"


def _bearer(headers: Headers) -> str | None:
    given = headers.getlist("authorization")
    kind, _, secret = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return secret.strip() if kind.lower() == "bearer" and secret.strip() else None
