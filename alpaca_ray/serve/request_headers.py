"""Request headers that are not for the model: those that steer Ray Serve, those of one hop, and the key."""

import re
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from alpaca_ray.serve.keys import PREFIX

REQUEST_ID = "x-request-id"
# Serve reads - and _ alike in these. Its proxy obeys them from anyone (ray 2.60, serve/_private/proxy.py).
STEERS_SERVE = frozenset(
    {"x-request-disconnect-disabled", "x-request-timeout-seconds", "serve-multiplexed-model-id", "x-session-id"}
)
STEERS_ROUTER = "x-serve-router-"
# RFC 9110, section 7.6.1, and RFC 2616, section 13.5.1
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
CREDENTIALS = frozenset({"authorization", "cookie", "api-key", "x-api-key"})
VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def inner_headers(headers: Headers, request_id: str) -> list[tuple[bytes, bytes]]:
    """What the application gets to see."""
    dropped = HOP_BY_HOP | CREDENTIALS | {REQUEST_ID}
    dropped |= {name.strip().lower() for name in headers.get("connection", "").split(",")} - {"content-type"}
    kept = [
        (name, value) for name, value in headers.raw if name.decode("latin-1") not in dropped and not steers_serve(name)
    ]
    return [*kept, (REQUEST_ID.encode(), request_id.encode())]


def request_id(headers: Headers, new_id: Callable[[], str]) -> str:
    """The client's id if it is a short word and no key of ours; else a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if VALID_ID.fullmatch(given) and PREFIX not in given else new_id()


def steers_serve(name: bytes) -> bool:
    """Whether Serve does something else because of a header of that name."""
    normal = name.decode("latin-1").lower().replace("_", "-")
    return normal in STEERS_SERVE or normal.startswith(STEERS_ROUTER)


def proxy_middlewares() -> list[Middleware]:
    """For Serve's proxies: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=alpaca_ray.serve.request_headers:proxy_middlewares

    They have read those headers before a replica gets the request, so only there are they stripped in time. The
    variable must stand in the environment that `ray start` has.
    """
    return [Middleware(WithoutSteering)]


class WithoutSteering:
    """ASGI middleware: the application sees no header that steers Serve."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] in ("http", "websocket"):
            scope["headers"] = [(name, value) for name, value in scope["headers"] if not steers_serve(name)]
        await self._app(scope, receive, send)
