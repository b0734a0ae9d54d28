"""OpenAI's Files and Batch API. Everything is in memory; a batch goes on only when it is asked for."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tests.referee.bodies import refusal_of
from tests.referee.desk import Desk, Outcome
from tests.referee.faults import LOST_IN_A_BATCH
from tests.referee.refusals import Refusal, not_found

MAX_ROWS = 50_000
EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Endpoint = Literal["/v1/completions", "/v1/chat/completions"]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class NewBatch(Strict):
    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class Row(Strict):
    custom_id: str
    method: Literal["POST"]
    url: Endpoint
    body: dict[str, Any]


@dataclass(frozen=True)
class File:
    """An uploaded file, or one that a batch made."""

    id: str
    name: str
    purpose: str
    content: bytes
    created_at: int

    def payload(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass
class Batch:
    """A batch and how far it is."""

    id: str
    new: NewBatch
    created_at: int
    step_s: float  # monotonic, when it came to its status
    status: str = "validating"
    polls: int = 0  # since it came to its status
    rows: list[Row] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    ended_at: int | None = None

    def payload(self) -> dict[str, Any]:
        """As the API shows it."""
        ends = {f"{name}_at": None for name in ("completed", "failed", "expired", "cancelled")}
        counts = {"total": len(self.rows), "completed": self.completed, "failed": self.failed}
        return {
            "id": self.id,
            "object": "batch",
            **self.new.model_dump(),
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.created_at + 24 * 3600,
            **ends,
            **({f"{self.status}_at": self.ended_at} if self.ended_at else {}),
            "request_counts": counts,
        }


class Batches:
    """All files and batches of a referee."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.files: dict[str, File] = {}
        self.batches: dict[str, Batch] = {}

    def add_file(self, name: str, purpose: str, content: bytes) -> File:
        """Keep a file."""
        file = File(f"file-{len(self.files) + 1:08d}", name, purpose, content, int(time.time()))
        self.files[file.id] = file
        return file

    def create(self, body: dict[str, Any]) -> Batch | Refusal:
        """A batch over an uploaded file. What is wrong with the file shows later, as at OpenAI."""
        try:
            new = NewBatch.model_validate(body)
        except ValidationError as error:
            return refusal_of(error)
        file = self.files.get(new.input_file_id)
        if file is None or file.purpose != "batch":
            return not_found(f"File {new.input_file_id}")
        batch = Batch(f"batch_{len(self.batches) + 1:08d}", new, int(time.time()), time.monotonic())
        self.batches[batch.id] = batch
        return batch

    def poll(self, batch: Batch) -> Batch:
        """Count a question for it, and let it go on as far as it is due."""
        batch.polls += 1
        settings = self._desk.settings.batches
        while batch.status in _STEPS:
            due = batch.polls >= settings.polls_per_step
            if not due or time.monotonic() < batch.step_s + settings.seconds_per_step:
                break
            batch.polls, batch.step_s = 0, batch.step_s + settings.seconds_per_step
            _STEPS[batch.status](self, batch)
        return batch

    def cancel(self, batch: Batch) -> Batch | Refusal:
        """Stop it; it is cancelled at the next question."""
        if batch.status not in ("validating", "in_progress"):
            return Refusal(409, f"Cannot cancel a batch with status '{batch.status}'.", code="invalid_status")
        batch.status = "cancelling"
        return batch

    def validate(self, batch: Batch) -> None:
        """Read the rows; one that is wrong fails the whole batch."""
        content = self.files[batch.new.input_file_id].content
        read = list(_read_rows(content, batch.new.endpoint))
        batch.errors = [error for _, error in read if error]
        if batch.errors:
            _end(batch, "failed")
        else:
            batch.status, batch.rows = "in_progress", [row for row, _ in read if row]

    def work(self, batch: Batch) -> None:
        """Answer the rows and write both files, last row first: the API promises no order."""
        last = self._desk.settings.batches.expires_after_rows
        done: dict[bool, list[bytes]] = {True: [], False: []}
        for number, row in enumerate(batch.rows):
            line = self._answer(batch, number, row) if last is None or number < last else _line(batch, number, row)
            done[line["error"] is None and line["response"]["status_code"] == 200].append(json.dumps(line).encode())
        batch.completed, batch.failed = len(done[True]), len(done[False])
        batch.output_file_id = self._write(batch, "output", done[True])
        batch.error_file_id = self._write(batch, "error", done[False])
        _end(batch, "completed" if last is None or last >= len(batch.rows) else "expired")

    def stop(self, batch: Batch) -> None:
        """It was cancelled."""
        _end(batch, "cancelled")

    def _answer(self, batch: Batch, number: int, row: Row) -> dict[str, Any]:
        outcome = self._desk.judge_row(row.url, row.body, batch.id)
        if outcome.fault and outcome.fault.kind in LOST_IN_A_BATCH:
            outcome.status = 0
        self._desk.close(outcome)
        return _line(batch, number, row, outcome if outcome.status else None)

    def _write(self, batch: Batch, kind: str, lines: list[bytes]) -> str | None:
        if not lines:
            return None
        content = b"".join(line + b"\n" for line in reversed(lines))
        return self.add_file(f"{batch.id}_{kind}.jsonl", "batch_output", content).id


_STEPS: dict[str, Callable[[Batches, Batch], None]] = {
    "validating": Batches.validate,
    "in_progress": Batches.work,
    "cancelling": Batches.stop,
}


def _end(batch: Batch, status: str) -> None:
    batch.status, batch.ended_at = status, int(time.time())


def _line(batch: Batch, number: int, row: Row, outcome: Outcome | None = None) -> dict[str, Any]:
    """A line of the output or error file; without an outcome the row has expired."""
    request_id = f"{batch.id}_req_{number}"
    line = {"id": request_id, "custom_id": row.custom_id, "response": None, "error": None}
    if outcome is None:
        return line | {"error": EXPIRED}
    response = {"status_code": outcome.status, "request_id": request_id, "body": outcome.payload}
    return line | {"response": response}


def _read_rows(content: bytes, endpoint: str) -> Iterator[tuple[Row | None, dict[str, Any] | None]]:
    """Each line as a row, or what is wrong with it."""
    lines = content.splitlines()
    if not lines or len(lines) > MAX_ROWS:
        yield None, _error("invalid_file_size", f"A batch has between 1 and {MAX_ROWS} requests.", None)
        return
    seen: set[str] = set()
    models: set[Any] = set()
    for number, line in enumerate(lines, start=1):
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            yield None, _error("invalid_request", refusal_of(error).message, number)
            continue
        models.add(str(row.body.get("model")))
        yield row, next(_wrong_with(row, number, endpoint, seen, models), None)
        seen.add(row.custom_id)


def _wrong_with(
    row: Row, number: int, endpoint: str, seen: Iterable[str], models: set[Any]
) -> Iterator[dict[str, Any]]:
    if row.url != endpoint:
        yield _error("mismatched_endpoint", f"The batch is for {endpoint}, not for {row.url}.", number)
    if row.custom_id in seen:
        yield _error("duplicate_custom_id", f"The custom_id '{row.custom_id}' stands twice.", number)
    if len(models) > 1:
        yield _error("mismatched_model", "All requests of a batch must name the same model.", number)


def _error(code: str, message: str, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": line}
