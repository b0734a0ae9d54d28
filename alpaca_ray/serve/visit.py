"""One request on its way through serve/admission.py."""

from collections.abc import Callable
from dataclasses import dataclass

from starlette._utils import get_route_path  # the router's own: another one's idea of a path would open doors
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from alpaca_ray.provider.window import Charge
from alpaca_ray.serve.access_log import Access, method_name, route_name
from alpaca_ray.serve.keys import Key
from alpaca_ray.serve.refusals import Refusal
from alpaca_ray.serve.request_headers import REQUEST_ID, inner_headers

CLIENT_LEFT = 499  # nginx's number


@dataclass
class Ticket:
    """A request that was let in. The API adds tokens as they are spent, prompt and completion.

    If it adds none, the key is charged what was reserved, or nothing if the answer was an error.
    """

    request_id: str
    key_name: str | None  # None: a server without keys
    num_tokens: int | None = None

    def add_tokens(self, num_tokens: int) -> None:
        """So many more were spent."""
        self.num_tokens = (self.num_tokens or 0) + num_tokens


class Visit:
    """One request on its way through, and what is known of it so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str, clock: Callable[[], float]) -> None:
        self.scope, self.receive, self._send = scope, receive, send
        self.headers = Headers(scope=scope)
        self.route = get_route_path(scope)
        self.request_id, self._clock, self._began_s = request_id, clock, clock()
        self._first_event_s: float | None = None
        self.key: Key | None = None
        self.charge: Charge | None = None
        self.ticket: Ticket | None = None
        self.limit_headers: dict[str, str] = {}
        self.adds_request_id = True
        self.status: int | None = None
        self.reason: str | None = None
        self.prompt: str | None = None
        self._is_event_stream = self._is_done = False

    def inner_scope(self) -> Scope:
        """What the API gets. From here on it is its request."""
        self.ticket = Ticket(self.request_id, None if self.key is None else self.key.name)
        state = {**self.scope.get("state", {}), "ticket": self.ticket}
        return {**self.scope, "headers": inner_headers(self.headers, self.request_id), "state": state}

    async def send(self, message: Message) -> None:
        """ASGI: the answer on its way out."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            headers.update(self.limit_headers)
            if self.adds_request_id:
                headers[REQUEST_ID] = self.request_id
            self.status = message["status"]
            self._is_event_stream = headers.get("content-type", "").startswith("text/event-stream")
            message = {**message, "headers": headers.raw}
        elif message["type"] == "http.response.body":
            self._is_done = not message.get("more_body", False)
            if self._is_event_stream and self._first_event_s is None:
                self._first_event_s = self._clock() - self._began_s
        await self._send(message)

    async def answer(self, refusal: Refusal) -> None:
        """The refusal: as the answer, as the last event of a stream that has begun, or as a broken connection."""
        if self.status is None:
            headers = [(name.encode(), value.encode()) for name, value in refusal.headers().items()]
            await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": refusal.body()})
        elif self._is_event_stream and not self._is_done:
            await self.send({"type": "http.response.body", "body": b"data: " + refusal.body() + b"\n\n"})

    def access(self) -> Access:
        """For the log."""
        return Access(
            request_id=self.request_id,
            key=None if self.key is None else self.key.name,
            method=method_name(self.scope["method"]),
            route=route_name(self.route),
            status=CLIENT_LEFT if self.status is None else self.status,
            duration_s=self._clock() - self._began_s,
            first_event_s=self._first_event_s,
            refusal=self.reason,
            num_tokens=None if self.ticket is None else self.ticket.num_tokens,
            prompt=self.prompt,
        )
