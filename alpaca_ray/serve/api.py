"""The OpenAI-compatible HTTP API over a TextModel: models, completions, chat completions, health. No Ray here."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from alpaca_ray.serve.engine import ContextLengthError, EngineError
from alpaca_ray.serve.protocol import APIError, ChatCompletionRequest, CompletionRequest, explain_invalid
from alpaca_ray.serve.text import PromptError, TextDelta, TextModel

logger = logging.getLogger(__name__)

REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it


def create_api(model: TextModel, model_name: str, created_s: int | None = None) -> FastAPI:
    """The application. `created_s`: Unix time that /v1/models shows; None: now."""
    api = FastAPI(title="alpaca_ray", docs_url=None, redoc_url=None)
    card = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()) if created_s is None else created_s,
        "owned_by": "alpaca_ray",
    }
    _add_error_handlers(api)

    @api.get("/health")
    async def health() -> dict[str, Any]:
        state = await model.health()
        return {"status": "ok", "num_running": state.num_running, "num_waiting": state.num_waiting}

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @api.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        _refuse_other_model(name, model_name)
        return card

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(body, request, model, model_name)

    @api.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await _answer(body, request, model, model_name)

    return api


async def _answer(
    body: CompletionRequest | ChatCompletionRequest, request: Request, model: TextModel, model_name: str
) -> Response:
    _refuse_other_model(body.model, model_name)
    requests = body.text_requests()
    answer = _Answer(isinstance(body, ChatCompletionRequest), model_name, len(requests))
    deltas = merge([model.complete(text_request) for text_request in requests])
    work = _stream(answer, deltas, body.includes_usage()) if body.stream else _whole(answer, deltas)
    return await _until_disconnect(request, work)


async def _whole(answer: "_Answer", deltas: AsyncGenerator[tuple[int, TextDelta], None]) -> Response:
    async with aclosing(deltas):
        async for index, delta in deltas:
            answer.take(index, delta)
    return JSONResponse(answer.whole())


async def _stream(
    answer: "_Answer", deltas: AsyncGenerator[tuple[int, TextDelta], None], include_usage: bool
) -> Response:
    first = await anext(deltas)  # an error before the first token still has a status code of its own
    return StreamingResponse(_events(answer, first, deltas, include_usage), media_type="text/event-stream")


async def _events(
    answer: "_Answer",
    first: tuple[int, TextDelta],
    deltas: AsyncGenerator[tuple[int, TextDelta], None],
    include_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events. The status line is out, so an error goes as an event, and no [DONE] follows it."""
    async with aclosing(deltas):
        try:
            for event in answer.opening():
                yield _event(event)
            for event in answer.chunks(*first):
                yield _event(event)
            async for index, delta in deltas:
                for event in answer.chunks(index, delta):
                    yield _event(event)
            if include_usage:
                yield _event(answer.usage_chunk())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(as_api_error(error).body())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@dataclass
class _Answer:
    """The choices of one request as they grow, and how each endpoint words them."""

    is_chat: bool
    model_name: str
    num_choices: int
    created_s: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._texts = [""] * self.num_choices
        self._reasons: list[str | None] = [None] * self.num_choices
        self._prompt_tokens = [0] * self.num_choices
        self._num_tokens = 0

    def take(self, index: int, delta: TextDelta) -> None:
        """Add a delta to its choice."""
        self._texts[index] += delta.text
        self._reasons[index] = delta.finish_reason
        self._prompt_tokens[index] = delta.num_prompt_tokens
        self._num_tokens += delta.num_tokens

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(i, {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text})
            for i, text in enumerate(self._texts)
        ]
        return self._envelope("", choices) | {"usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """A chat stream begins with the role."""
        if not self.is_chat:
            return []
        return [self._envelope(".chunk", [self._choice(0, {"delta": {"role": "assistant", "content": ""}})])]

    def chunks(self, index: int, delta: TextDelta) -> list[dict[str, Any]]:
        """The stream's next event: none while text is held back."""
        self.take(index, delta)
        if not delta.text and delta.finish_reason is None:
            return []
        if not self.is_chat:
            return [self._envelope("", [self._choice(index, {"text": delta.text})])]
        return [self._envelope(".chunk", [self._choice(index, {"delta": {"content": delta.text}})])]

    def usage_chunk(self) -> dict[str, Any]:
        """The last event of a stream that asked for the counts."""
        return self._envelope(".chunk" if self.is_chat else "", []) | {"usage": self._usage()}

    def _choice(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": self._reasons[index]}

    def _envelope(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", "chat.completion") if self.is_chat else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind + suffix,
            "created": self.created_s,
            "model": self.model_name,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        prompt_tokens = sum(self._prompt_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": prompt_tokens + self._num_tokens,
        }


async def merge(
    streams: Sequence[AsyncGenerator[TextDelta, None]],
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """(index of the stream, delta) from all streams at once, as they come. Closing it closes every stream."""
    arrived: asyncio.Queue[tuple[int, TextDelta] | None] = asyncio.Queue()

    async def drain(index: int, stream: AsyncGenerator[TextDelta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    arrived.put_nowait((index, delta))
        finally:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(drain(i, stream)) for i, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            item = await arrived.get()
            if item is not None:
                yield item
                continue
            open_streams -= 1
            for task in tasks:
                if task.done():
                    task.result()  # raises what the stream raised
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """`work`, cancelled as soon as the client goes: it would compute for nobody."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refuse_other_model(asked: str, served: str) -> None:
    if asked != served:
        message = f"The model {asked!r} does not exist: this server has {served!r}"
        raise APIError(404, message, "model", "model_not_found")


def as_api_error(error: Exception) -> APIError:
    """What the client is told. An error of a kind that we do not know is a bug: logged here, its text kept back."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextLengthError):
        return APIError(400, str(error), code="context_length_exceeded")
    if isinstance(error, PromptError):
        return APIError(400, str(error), code="invalid_prompt")
    if isinstance(error, EngineError):
        return APIError(500, f"The engine failed: {error}", code="engine_error")
    logger.error("a request failed", exc_info=error)
    return APIError(500, "The server failed on this request; its log says why", code="internal_error")


def _add_error_handlers(api: FastAPI) -> None:
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _respond(explain_invalid(error.errors(), REQUESTS.get(request.url.path)))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _respond(APIError(error.status_code, str(error.detail)))

    async def ours(_: Request, error: Exception) -> Response:
        return _respond(as_api_error(error))

    api.add_exception_handler(RequestValidationError, invalid)
    api.add_exception_handler(HTTPException, http)
    for kind in (APIError, ContextLengthError, PromptError, EngineError, Exception):
        api.add_exception_handler(kind, ours)


def _respond(error: APIError) -> Response:
    return JSONResponse(error.body(), status_code=error.status)
