"""Rows that cross a stage boundary, their Arrow schemas, and the readers of task files."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alpaca_ray.config import UserError


class Instance(BaseModel):
    """One input of a task with its reference output; `input` is "" where the instruction says it all."""

    model_config = ConfigDict(frozen=True)
    input: str
    output: str = Field(min_length=1)


class SeedTask(BaseModel):
    """A hand-written task in self-instruct's JSONL format (Wang et al. 2023)."""

    model_config = ConfigDict(frozen=True)
    id: str = Field(min_length=1)
    name: str
    instruction: str = Field(min_length=1)
    instances: tuple[Instance, ...] = Field(min_length=1)
    is_classification: bool


class EvaluationTask(BaseModel):
    """A row of self-instruct's user_oriented_instructions.jsonl."""

    model_config = ConfigDict(frozen=True)
    id: str = Field(min_length=1)
    motivation_app: str
    instruction: str = Field(min_length=1)
    instances: tuple[Instance, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Example:
    """A demonstration: what a model is asked and what it should answer. `input` may be ""."""

    id: str
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Completion:
    """What one request gave: `text`, or `error`, never both. `error_detail` is the provider's own message.

    `model` and `fingerprint` are what the server says it answered with. `usd` is what the request has cost, at most.
    """

    text: str | None
    error: str | None = None
    error_detail: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    response_id: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    finished_at: float = 0.0  # Unix time, s
    usd: float = 0.0


@dataclass(frozen=True)
class Reject:
    """Generated text that is no row of the dataset, and why."""

    reason: str
    text: str


REQUEST_SCHEMA = pa.schema(
    [
        ("request", pa.int64()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("seed_tasks", pa.list_(pa.string())),  # ids of the in-context examples
    ]
)

COMPLETION_SCHEMA = pa.schema(
    [
        ("request", pa.int64()),
        ("key", pa.string()),  # the hash of the canonical request, as in the journal
        ("text", pa.string()),
        ("error", pa.string()),
        ("error_detail", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("latency_s", pa.float64()),
        ("response_id", pa.string()),
        ("model", pa.string()),
        ("fingerprint", pa.string()),
        ("finished_at", pa.float64()),
        ("usd", pa.float64()),
    ]
)

DATASET_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("output", pa.string()),
        ("request", pa.int64()),
        ("position", pa.int64()),
        ("model", pa.string()),
        ("prompt_version", pa.string()),
        ("seed_tasks", pa.list_(pa.string())),
        # Among the seeds and everything kept before; null where generate.similarity is off.
        ("most_similar", pa.list_(pa.struct([("instruction", pa.string()), ("rouge_l", pa.float64())]))),
        ("mean_rouge_l", pa.float64()),
    ]
)

REJECT_SCHEMA = pa.schema(
    [
        ("request", pa.int64()),
        ("position", pa.int64()),
        ("reason", pa.string()),
        ("text", pa.string()),
        ("rouge_l", pa.float64()),  # of a duplicate, to the nearest of the seeds and everything kept before
        ("nearest", pa.string()),
    ]
)

EXAMPLE_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "instruction", "input", "output")])

Task = TypeVar("Task", SeedTask, EvaluationTask)


def shipped(name: str) -> Path:
    """Path of a data file inside the package."""
    return Path(str(resources.files("alpaca_ray") / "data" / name))


def read_seed_tasks(path: str | None) -> list[SeedTask]:
    """The seed tasks at `path`, or the 175 of the package. Raises UserError with file, line and field."""
    return _read_tasks(SeedTask, Path(path) if path is not None else shipped("seed_tasks.jsonl"))


def read_evaluation_tasks(path: str | None) -> list[EvaluationTask]:
    """The evaluation instructions at `path`, or the 60 of the package. Raises UserError like the above."""
    return _read_tasks(EvaluationTask, Path(path) if path is not None else shipped("evaluation_instructions.jsonl"))


def content_hash(rows: list[Any]) -> str:
    """SHA-256 over rows (pydantic models or dataclasses), first 16 digits: equal rows from another path are equal."""
    plain = [row.model_dump() if isinstance(row, BaseModel) else asdict(row) for row in rows]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def as_examples(tasks: list[SeedTask] | list[EvaluationTask]) -> list[Example]:
    """One Example per task, from its first instance."""
    return [Example(t.id, t.instruction, t.instances[0].input, t.instances[0].output) for t in tasks]


def _read_tasks(kind: type[Task], path: Path) -> list[Task]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a JSONL file of {kind.__name__} rows")
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    # split("\n"), not splitlines(): U+2028 and its like may stand inside a JSON string
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        task = _parse_task(kind, line, f"{path}, line {number}")
        if task.id in seen:
            raise UserError(f"{path}, line {number}, field id: {task.id!r} stands already on line {seen[task.id]}")
        seen[task.id] = number
        tasks.append(task)
    if not tasks:
        raise UserError(f"{path} holds no tasks")
    return tasks


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def _parse_task(kind: type[Task], line: str, where: str) -> Task:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        named = f", field {field}" if field else ""
        raise UserError(f"{where}{named}: {first['msg']}; mend or remove this line") from None
