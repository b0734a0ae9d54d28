"""The HTTP API over a given model: asked over ASGI where that is enough, over a real port where it is not."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn
from fastapi.testclient import TestClient

from alpaca_ray.serve.api import Detector, create_api
from alpaca_ray.serve.engine import Health
from alpaca_ray.serve.text import TextDelta, TextModel, TextRequest

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Pieces:
    """A TextModel that answers with the given pieces; an exception among them is raised, None waits for ever."""

    def __init__(self, *pieces: str | Exception | None) -> None:
        self.pieces = pieces
        self.requests: list[TextRequest] = []
        self.closed = threading.Event()

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        self.requests.append(request)
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    await asyncio.Event().wait()
                yield TextDelta(str(piece), 3, 1)
            yield TextDelta("", 3, 0, "stop")
        finally:
            self.closed.set()

    async def health(self) -> Health:
        return Health(num_running=0, num_waiting=0)


def http(model: TextModel, detector: Detector | None = None) -> TestClient:
    return TestClient(create_api(model, "tiny", created_s=7, detector=detector), raise_server_exceptions=False)


def client_of(model: TextModel) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=http(model), max_retries=0)


def error_of(model: TextModel, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    content = json.dumps({"model": "tiny"} | body)  # half a surrogate pair passes here, as it does on a wire
    response = http(model).post(path, content=content, headers={"content-type": "application/json"})
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


@contextmanager
def served(model: TextModel) -> Iterator[str]:
    """The API on a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_api(model, "tiny"), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
