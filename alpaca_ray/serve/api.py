"""The OpenAI-compatible HTTP API over a TextModel: completions, chats, models, detector, health. No Ray here."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from alpaca_ray.config import UserError
from alpaca_ray.safety.detection import Detection
from alpaca_ray.serve.answers import Answer
from alpaca_ray.serve.engine import ContextLengthError, EngineError
from alpaca_ray.serve.errors import APIError, as_api_error, explain_invalid
from alpaca_ray.serve.protocol import ChatCompletionRequest, CompletionRequest, DetectRequest
from alpaca_ray.serve.text import PromptError, TextDelta, TextModel
from alpaca_ray.serve.visit import Ticket

REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/watermark/detect": DetectRequest,
}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it

Deltas = AsyncGenerator[tuple[int, TextDelta], None]
# A text or its token ids, no prompt among them. Raises UserError for ids that are none, EngineError if it cannot say.
Detector = Callable[[str | tuple[int, ...]], Awaitable[Detection]]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail = Field(description="OpenAI's form")


# "default" also keeps FastAPI from promising 422, which is never given.
ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody, "description": "Refused or failed"}}
COMPLETED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, as events with `stream`", "content": {"text/event-stream": {}}}
}


def create_api(
    model: TextModel, model_name: str, created_s: int | None = None, detector: Detector | None = None
) -> FastAPI:
    """The application. `created_s`: Unix time that /v1/models shows; None: now. `detector`: of the watermark."""
    api = FastAPI(title="alpaca_ray", docs_url=None, redoc_url=None, responses=ERRORS)
    _add_error_handlers(api)
    _add_health(api, model)
    _add_models(api, model_name, int(time.time()) if created_s is None else created_s)

    @api.post("/v1/completions", responses=COMPLETED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(body, request, model, model_name)

    @api.post("/v1/chat/completions", responses=COMPLETED)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await _answer(body, request, model, model_name)

    @api.post("/v1/watermark/detect")
    async def detect(body: DetectRequest) -> dict[str, Any]:
        return await _detect(body, detector)

    return api


def _add_health(api: FastAPI, model: TextModel) -> None:
    @api.get("/health")
    async def health() -> dict[str, Any]:
        """This process is alive."""
        return {"status": "ok"}

    @api.get("/ready")
    async def ready() -> dict[str, Any]:
        """The engine can answer; 503 where it cannot."""
        try:
            state = await model.health()
        except Exception as error:
            raise as_api_error(error) from None
        status = "asleep" if state.is_asleep else "ok"
        return {"status": status, "num_running": state.num_running, "num_waiting": state.num_waiting}


def _add_models(api: FastAPI, model_name: str, created_s: int) -> None:
    card = {"id": model_name, "object": "model", "created": created_s, "owned_by": "alpaca_ray"}

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @api.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        _refuse_other_model(name, model_name)
        return card


async def _answer(
    body: CompletionRequest | ChatCompletionRequest, request: Request, model: TextModel, model_name: str
) -> Response:
    _refuse_other_model(body.model, model_name)
    requests = body.text_requests()
    answer = Answer(
        is_chat=isinstance(body, ChatCompletionRequest),
        model_name=model_name,
        num_choices=len(requests),
        choices_per_prompt=body.num_choices,
        has_logprobs=body.wants_logprobs(),
        includes_usage=body.includes_usage(),
    )
    deltas = _counted(answer, merge([model.complete(text_request) for text_request in requests]), request)
    work = _stream(answer, deltas) if body.stream else _whole(answer, deltas)
    try:
        return await _until_disconnect(request, work)
    except Exception as error:  # the boundary of a request
        raise as_api_error(error) from None


async def _counted(answer: Answer, deltas: Deltas, request: Request) -> Deltas:
    """The deltas, in the answer; however it ends, admission hears what was spent."""
    ticket: Ticket | None = getattr(request.state, "ticket", None)
    try:
        async with aclosing(deltas):
            async for index, delta in deltas:
                answer.take(index, delta)
                yield index, delta
    finally:
        spent = answer.usage()["total_tokens"]
        if ticket is not None and spent:
            ticket.add_tokens(spent)


async def _whole(answer: Answer, deltas: Deltas) -> Response:
    async with aclosing(deltas):
        async for _ in deltas:
            pass
    return JSONResponse(answer.whole())


async def _stream(answer: Answer, deltas: Deltas) -> Response:
    first = await anext(deltas)  # an error before the first token still has a status code of its own
    return StreamingResponse(_events(answer, first, deltas), media_type="text/event-stream")


async def _events(answer: Answer, first: tuple[int, TextDelta], deltas: Deltas) -> AsyncIterator[str]:
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
            if answer.includes_usage:
                yield _event(answer.usage_chunk())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(as_api_error(error).body())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def merge(streams: Sequence[AsyncGenerator[TextDelta, None]]) -> Deltas:
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


async def _detect(body: DetectRequest, detector: Detector | None) -> dict[str, Any]:
    content = body.content()
    if detector is None:
        raise APIError(404, "This server marks no text, so there is nothing to detect", code="no_watermark")
    try:
        found = await detector(content)
    except UserError as error:
        raise APIError(400, str(error), "token_ids", "invalid_value") from None
    except Exception as error:
        raise as_api_error(error) from None
    return {
        "object": "watermark.detection",
        "verdict": found.verdict,
        "z_score": found.z_score,
        "p_value": found.p_value,
        "num_scored": found.num_scored,
        "num_green": found.num_green,
    }


def _refuse_other_model(asked: str, served: str) -> None:
    if asked != served:
        message = f"The model that was asked for does not exist: this server has {served!r}"
        raise APIError(404, message, "model", "model_not_found")


def _add_error_handlers(api: FastAPI) -> None:
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _respond(explain_invalid(error.errors(), REQUESTS.get(request.url.path)))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _respond(APIError(error.status_code, str(error.detail)), error.headers)

    async def ours(_: Request, error: Exception) -> Response:
        return _respond(as_api_error(error))

    api.add_exception_handler(RequestValidationError, invalid)
    api.add_exception_handler(HTTPException, http)
    for kind in (APIError, ContextLengthError, PromptError, EngineError, Exception):
        api.add_exception_handler(kind, ours)


def _respond(error: APIError, headers: Any = None) -> Response:
    retry = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.body(), status_code=error.status, headers={**(headers or {}), **retry})
