"""A strict fake of OpenAI's POST /v1/moderations over real HTTP. It shares no code with alpaca_ray.

What a client may not send gets OpenAI's refusal, so a request that passes here is one that the endpoint takes.
"""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
KEY = "good-key"
MODEL = "omni-moderation-latest"
MARKS = {"BADLY": "violence", "SICKLY": "self-harm"}
REFUSED_WORD = "UNREADABLE"  # an input with it is refused, as one is that the endpoint cannot take
MAX_INPUTS = 32

Fault = int | Literal["slow", "reset", "torn", "short", "long", "page"]


class ModerationServer(ThreadingHTTPServer):
    """`fault` is given to every request until it is None again. `batches`: the inputs of each answered request.

    `marks`: a text is flagged for each of these words in it, with that category.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.fault: Fault | None = None
        self.batches: list[list[str]] = []
        self.marks = dict(MARKS)
        self.num_requests = 0
        self.released = threading.Event()  # ends the wait of "slow"
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def moderation_server() -> Iterator[ModerationServer]:
    """A server on a free port of 127.0.0.1, ended with the block."""
    server = ModerationServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Routes(BaseHTTPRequestHandler):
    server: ModerationServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.num_requests += 1
        match self.server.fault:
            case int() as status:
                self._refuse(status, "scripted")
            case "slow":
                self.server.released.wait(60)
                self.close_connection = True
            case "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
            case "page":
                self._send(200, b"<html>Sign in</html>", "text/html")
            case fault:
                self._judge(raw, fault)

    def do_GET(self) -> None:
        self._refuse(405, "method_not_allowed")

    def _judge(self, raw: bytes, fault: str | None) -> None:
        if wrong := self._wrong(raw):
            return self._refuse(*wrong)
        inputs: list[str] = json.loads(raw)["input"]
        with self.server.lock:
            self.server.batches.append(inputs)
        results = [_result(text, self.server.marks) for text in inputs]
        if fault == "short":
            results.pop()
        if fault == "long":
            results.append(_result("fine", {}))
        data = json.dumps({"id": "modr-1", "model": MODEL, "results": results}).encode()
        return self._send(200, data[: len(data) // 2] if fault == "torn" else data)

    def _wrong(self, raw: bytes) -> tuple[int, str] | None:
        """The status and code of the refusal that the request has earned."""
        if self.path != "/v1/moderations":
            return 404, "unknown_url"
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return 401, "invalid_api_key"
        try:
            body = json.loads(raw.decode("utf-8", "strict"))
        except ValueError:
            return 400, "invalid_json"
        texts: Any = body.get("input") if isinstance(body, dict) else None
        well_formed = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
        if not well_formed or set(body) != {"model", "input"} or body["model"] != MODEL:
            return 400, "invalid_value"
        if not 1 <= len(texts) <= MAX_INPUTS or any(REFUSED_WORD in text for text in texts):
            return 400, "invalid_value"
        return None

    def _refuse(self, status: int, code: str) -> None:
        sent = self.headers["Authorization"] or ""
        message = f"Refused, you sent {sent}"  # as OpenAI does with a wrong key
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self._send(status, json.dumps({"error": error}).encode())

    def _send(self, status: int, data: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client may leave whenever it likes
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: pytest shows the failures."""


def _result(text: str, marks: dict[str, str]) -> dict[str, Any]:
    found = {category for mark, category in marks.items() if mark in text}
    return {
        "flagged": bool(found),
        "categories": {name: name in found for name in CATEGORIES},
        "category_scores": {name: 0.9 if name in found else 0.01 for name in CATEGORIES},
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
    }
