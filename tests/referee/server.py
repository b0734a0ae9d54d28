"""The routes, over aiohttp's low-level server: no router and no middleware on the way of a paid request."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import BodyPartReader, web
from pydantic import ValidationError

from tests.referee import refusals
from tests.referee.batches import Batches
from tests.referee.bodies import read_json
from tests.referee.desk import Desk, Outcome
from tests.referee.ledger import PAID_ROUTES, Entry, request_key, summary
from tests.referee.refusals import Refusal
from tests.referee.settings import FaultKind, Settings

TIMEOUT_S, SLOW_BODY_S = 600.0, 1.0  # where a fault names no duration
NUM_TRICKLES = 20
FILES = "/v1/files"


class Server:
    """One referee. `answer` is the handler of aiohttp's server."""

    def __init__(self, settings: Settings) -> None:
        self.desk = Desk(settings)
        self.batches = Batches(self.desk)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request comes through here."""
        path = request.path
        if path in PAID_ROUTES and request.method == "POST":
            return await self._paid(request, path)
        if path.startswith("/referee/"):
            return await self._control(request)
        return await self._free(request)

    async def _paid(self, request: web.BaseRequest, route: str) -> web.StreamResponse:
        body = read_json(await request.read())
        outcome = self.desk.judge(route, body, request.headers.get("Authorization"))
        kind = outcome.fault.kind if outcome.fault else None
        try:
            if kind == FaultKind.TIMEOUT:
                await asyncio.sleep(_duration_s(outcome, TIMEOUT_S))
            elif outcome.latency_s:
                await asyncio.sleep(outcome.latency_s)
        except asyncio.CancelledError:
            self.desk.close(outcome, connected=False)  # the answer is made and billed all the same
            raise
        self.desk.close(outcome, connected=request.transport is not None and not request.transport.is_closing())
        return await self._send(request, outcome, kind)

    async def _send(self, request: web.BaseRequest, outcome: Outcome, kind: FaultKind | None) -> web.StreamResponse:
        if kind in (FaultKind.TIMEOUT, FaultKind.RESET):
            _reset(request)
            return web.Response()
        body = outcome.body
        if kind == FaultKind.TRUNCATED_JSON:
            body = body[: len(body) // 2]
        if kind in (FaultKind.SLOW_BODY, FaultKind.SHORT_BODY, FaultKind.RESET_IN_BODY):
            return await self._send_in_pieces(request, outcome, kind)
        return web.Response(
            body=body, status=outcome.status, headers=outcome.headers, content_type=outcome.content_type
        )

    async def _send_in_pieces(self, request: web.BaseRequest, outcome: Outcome, kind: FaultKind) -> web.StreamResponse:
        body = outcome.body
        response = web.StreamResponse(status=outcome.status, headers=outcome.headers)
        response.content_type, response.content_length = outcome.content_type, len(body)
        await response.prepare(request)
        if kind == FaultKind.SLOW_BODY:
            size = -(-len(body) // NUM_TRICKLES)
            for start in range(0, len(body), size):
                await response.write(body[start : start + size])
                await asyncio.sleep(_duration_s(outcome, SLOW_BODY_S) / NUM_TRICKLES)
            return response
        await response.write(body[: len(body) // 2])
        if kind == FaultKind.RESET_IN_BODY:
            _reset(request)
        elif request.transport is not None:
            request.transport.close()  # what was written still goes out
        return response

    async def _control(self, request: web.BaseRequest) -> web.Response:
        desk = self.desk
        match request.method, request.path:
            case "GET", "/referee/ledger":
                return _json([entry.as_dict() for entry in desk.ledger.entries])
            case "GET", "/referee/summary":
                return _json(self._summary(request.query))
            case "POST", "/referee/reset":
                desk.reset()
                return _json({})
            case "POST", "/referee/config":
                return self._configure(read_json(await request.read()))
        return _refuse(refusals.no_such_route(request.method, request.path))

    def _configure(self, changes: dict[str, Any] | Refusal) -> web.Response:
        if isinstance(changes, Refusal):
            return _refuse(changes)
        try:
            self.desk.configure(changes)
        except ValidationError as error:
            return _refuse(Refusal(400, str(error)))
        return _json(self.desk.settings.model_dump(mode="json"))

    def _summary(self, query: Mapping[str, str]) -> dict[str, Any]:
        from_s, until_s = (float(query[name]) if name in query else None for name in ("from_s", "until_s"))
        window_s = self.desk.settings.limits.window_s
        counts = summary(self.desk.ledger, window_s, from_s, until_s)
        counts["most"]["held_tokens"] = self.desk.most_held_tokens
        return counts

    async def _free(self, request: web.BaseRequest) -> web.Response:
        """What costs nothing: models, files, batches."""
        body = await _form(request) if request.path == FILES and request.method == "POST" else await request.read()
        entry = self.desk.open(request.path, request.method)
        refusal = self.desk.refused_key(request.headers.get("Authorization"))
        answer = refusal or self._route(request, entry, body)
        if isinstance(answer, Refusal):
            entry.code = answer.code
        response = _refuse(answer) if isinstance(answer, Refusal) else _json(answer)
        entry.status = response.status
        self.desk.ledger.close(entry, time.monotonic())
        return response

    def _route(self, request: web.BaseRequest, entry: Entry, body: Any) -> Any:
        """The answer as JSON, as bytes, or as a Refusal."""
        parts = request.path.strip("/").split("/")[1:]  # without "v1"
        answer: Any = refusals.no_such_route(request.method, request.path)
        match request.method, parts:
            case "GET", ["models"]:
                models = [{"id": name, "object": "model", "owned_by": "referee"} for name in self.desk.settings.models]
                answer = {"object": "list", "data": models}
            case "POST", ["files"]:
                answer = body if isinstance(body, Refusal) else self.batches.add_file(*body).payload()
            case "POST", ["batches"]:
                answer = self._new_batch(entry, read_json(body))
            case "GET", ["batches"]:
                answer = self._list_batches(request.query)
            case _, ["files", name, *rest] if name in self.batches.files:
                answer = self._file(request, name, rest)
            case _, ["batches", name, *rest] if name in self.batches.batches:
                answer = self._batch(request, name, rest)
            case _, ["files" | "batches" as kind, name, *_]:
                answer = refusals.not_found(f"{kind}: {name}")
        return answer

    def _file(self, request: web.BaseRequest, name: str, rest: list[str]) -> Any:
        file = self.batches.files[name]
        match request.method, rest:
            case "GET", []:
                return file.payload()
            case "GET", ["content"]:
                return file.content
        return refusals.no_such_route(request.method, request.path)

    def _batch(self, request: web.BaseRequest, name: str, rest: list[str]) -> Any:
        batch = self.batches.batches[name]
        match request.method, rest:
            case "GET", []:
                return self.batches.poll(batch).payload()
            case "POST", ["cancel"]:
                cancelled = self.batches.cancel(batch)
                return cancelled if isinstance(cancelled, Refusal) else cancelled.payload()
        return refusals.no_such_route(request.method, request.path)

    def _new_batch(self, entry: Entry, body: dict[str, Any] | Refusal) -> Any:
        if isinstance(body, Refusal):
            return body
        entry.key = request_key(entry.route, body)
        batch = self.batches.create(body)
        if isinstance(batch, Refusal):
            return batch
        entry.batch = batch.id
        return batch.payload()

    def _list_batches(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The newest first, in pages."""
        newest = [batch.payload() for batch in reversed(self.batches.batches.values())]
        ids = [batch["id"] for batch in newest]
        start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
        page = newest[start : start + int(query.get("limit", 20))]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return {"object": "list", "data": page, **ends, "has_more": start + len(page) < len(newest)}


async def _form(request: web.BaseRequest) -> tuple[str, str, bytes] | Refusal:
    """Name, purpose and content of an uploaded file."""
    if not request.content_type.startswith("multipart/"):
        return Refusal(400, "Send the file as multipart/form-data.")
    fields: dict[str, bytes] = {}
    file_name = ""
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or part.name not in ("purpose", "file"):
            name = getattr(part, "name", None)
            return Refusal(400, f"Unrecognized form field: {name}", param=name, code="unknown_parameter")
        fields[part.name] = bytes(await part.read())
        file_name = part.filename or file_name
    for name in ("purpose", "file"):
        if name not in fields:
            return Refusal(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    purpose = fields["purpose"].decode(errors="replace")
    if purpose != "batch" or not file_name.endswith(".jsonl"):
        return Refusal(400, "The purpose must be 'batch' and the file's name end in .jsonl.", param="purpose")
    return file_name, purpose, fields["file"]


def _duration_s(outcome: Outcome, default_s: float) -> float:
    assert outcome.fault is not None
    return outcome.fault.duration_s or default_s


def _reset(request: web.BaseRequest) -> None:
    """End the connection with RST: what is not yet sent is lost."""
    transport = request.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


def _json(value: Any) -> web.Response:
    if isinstance(value, bytes):
        return web.Response(body=value, content_type="application/octet-stream")
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")


def _refuse(refusal: Refusal) -> web.Response:
    return web.Response(
        body=refusal.body(), status=refusal.status, headers=refusal.headers, content_type="application/json"
    )
