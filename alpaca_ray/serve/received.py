"""The body of a request, read before the API gets it: its size and its pace are bounded, so memory is, too."""

import asyncio
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive


class BodyTooLarge(Exception):
    """There is more of it than allowed."""


class ClientLeft(Exception):
    """Nobody is left to read an answer."""


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """The whole body. What a client says of its length only counts against it. Raises BodyTooLarge, ClientLeft."""
    announced = headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > max_bytes):
        raise BodyTooLarge
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return bytes(body)


class Received:
    """ASGI's receive for the API: the body that was read, then what comes, which can only be that the client leaves."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._next: asyncio.Future[Message] | None = None

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._next is None:
            return await self._receive()
        return await asyncio.shield(self._next)  # cancelled by a listener that stops, it would lose its message

    async def wait_while_there(self, turn: "asyncio.Future[None]", timeout_s: float) -> None:
        """Until `turn` is done or the time is over. Raises ClientLeft."""
        self._next = asyncio.ensure_future(self._receive())
        both: tuple[asyncio.Future[Any], ...] = (turn, self._next)
        await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._next.done() and not turn.done() and self._next.result()["type"] == "http.disconnect":
            raise ClientLeft

    def close(self) -> None:
        """End the wait for the next message."""
        if self._next is not None:
            self._next.cancel()
