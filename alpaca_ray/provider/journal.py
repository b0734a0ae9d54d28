"""Every paid response, durable before anything uses it: a later try reads it back and pays for nothing twice.

One line a record: the CRC-32 of a JSON object in eight hexadecimal digits, a space, the object. Three kinds:

    sent       an attempt at a request is about to go out, and what it may cost at most
    failed     that attempt came to nothing, and what it may have cost
    answered   the Completion under the request's key

Each writer has files of its own, so a line can be torn only where its writer died; it is skipped. On a local disk or
NFS records are appended, and an answer is synced before `answered` returns. An object store cannot append: there a
writer puts what has come in within `FLUSH_S` as one part, and what was sent since the last part is not known to a
later try.

While the storage is away answers wait in memory, and nothing new is to go out: see `Writer.ready`.
"""

import asyncio
import errno
import json
import logging
import os
import socket
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs

from alpaca_ray.artifacts import FIRST_PAUSE_S, MAX_PAUSE_S, RunDirectory, is_passing, patiently
from alpaca_ray.provider.budget import Spent, pico_usd
from alpaca_ray.schema import Completion

FLUSH_S = 1.0
STALL_S = 2.0  # a write that takes longer is none that others should pile up behind; S3 takes 0.1 s for a part
POLL_S = 0.1
_SUFFIX = ".journal"

log = logging.getLogger("alpaca_ray")


@dataclass(frozen=True)
class Cost:
    """Tokens of prompt and completion together, and US dollars."""

    tokens: int
    usd: float


class Writer:
    """Writes to files of its own in the run's `directory`, named after host and process."""

    def __init__(self, run: RunDirectory, directory: str, stall_s: float = STALL_S) -> None:
        self.name = f"{socket.gethostname().split('.')[0]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._sink = _sink(run, f"{directory}/{self.name}")
        self._attempts = 0
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._patience_s, self._stall_s = run.patience_s, stall_s
        self._writing_since_s: float | None = None  # on the loop's clock

    def is_ready(self) -> bool:
        """Whether answers get through to the storage. While they do not, a new one is paid for at a risk."""
        return self._writing_since_s is None or _now_s() - self._writing_since_s <= self._stall_s

    async def ready(self) -> None:
        """Return when it is."""
        while not self.is_ready():
            await asyncio.sleep(POLL_S)

    def sent(self, key: str, worst: Cost) -> int:
        """Before it goes out; returns the attempt's number. Outlives a kill of this process. Raises OSError."""
        self._attempts += 1
        self._sink.append(_line({"kind": "sent", "key": key, "attempt": self._attempts, **vars(worst)}))
        return self._attempts

    def failed(self, key: str, attempt: int, error: str, cost: Cost) -> None:
        """What an attempt that came to nothing may have cost. Raises OSError."""
        record = {"kind": "failed", "key": key, "attempt": attempt, "error": error, **vars(cost)}
        self._sink.append(_line(record))

    async def answered(self, key: str, attempt: int, completion: Completion) -> None:
        """Return when the answer is durable. Answers that come together share one sync.

        Raises OSError when the storage was away for the run's `patience_s`, and at once for what does not pass.
        """
        future = asyncio.get_running_loop().create_future()
        record = {"kind": "answered", "key": key, "attempt": attempt, "completion": vars(completion)}
        self._waiting.append((_line(record), future))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        await future

    async def _flush(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._sink.gather_s)
            batch, self._waiting = self._waiting, []
            try:
                await self._write(b"".join(line for line, _ in batch))
            except OSError as error:
                for _, future in batch:
                    future.set_exception(error)
            else:
                for _, future in batch:
                    future.set_result(None)
        self._flusher = None

    async def _write(self, data: bytes) -> None:
        self._writing_since_s, pause_s = _now_s(), FIRST_PAUSE_S
        try:
            while True:
                try:
                    return await asyncio.to_thread(self._sink.write_durably, data)
                except OSError as error:
                    if not is_passing(error) or _now_s() - self._writing_since_s > self._patience_s:
                        raise
                    log.warning("the journal cannot be written (%s): trying again, and nothing new is sent", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        finally:
            self._writing_since_s = None


class Journal:
    """Reads what all writers of a run have left. Answers stay on disk; where they lie is held."""

    def __init__(self, run: RunDirectory, directory: str) -> None:
        self._run, self._directory = run, directory
        self._read_bytes: dict[str, int] = {}  # file -> up to where it has been read
        self._answers: dict[str, tuple[str, int, int]] = {}  # key -> file, offset, length
        self._open: dict[tuple[str, int], tuple[str, Cost]] = {}  # writer and attempt -> key and worst case
        self.spent = Spent()  # by answers, and by failures that may have been billed
        self.newest_at = 0.0  # Unix time of the newest record, s
        self.refresh()

    def refresh(self) -> None:
        """Read what was written since the last time. A line without its end is left for the next time."""
        selector = pyarrow.fs.FileSelector(self._run.path(self._directory), allow_not_found=True)
        for info in patiently(lambda: self._run.fs.get_file_info(selector), self._run.patience_s):
            start = self._read_bytes.get(info.path, 0)
            if info.path.endswith(_SUFFIX) and info.size > start:
                self._read_bytes[info.path] = start + self._take_lines(info.path, start, info.size - start)

    def sent_keys(self) -> set[str]:
        """Every request that was ever sent and did not fail."""
        return self._answers.keys() | {key for key, _ in self._open.values()}

    def in_flight(self) -> list[Cost]:
        """Worst cases of the attempts that nothing was heard of since: under way, or lost with their sender."""
        return [worst for _, worst in self._open.values()]

    def answer(self, key: str) -> Completion | None:
        """The completion under `key`, as far as `refresh` has seen."""
        if key not in self._answers:
            return None
        record = _parse(self._read(*self._answers[key]))
        assert record is not None, f"{self._answers[key][0]} has changed"
        return Completion(**record["completion"])

    def _read(self, path: str, offset: int, length: int) -> bytes:
        def read() -> bytes:
            with self._run.fs.open_input_file(path) as file:
                return bytes(file.read_at(length, offset))

        return patiently(read, self._run.patience_s)

    def _take_lines(self, path: str, start: int, length: int) -> int:
        """Take the whole lines; returns how many bytes they are."""
        data = self._read(path, start, length)
        end, offset = data.rfind(b"\n") + 1, 0
        for line in data[:end].split(b"\n")[:-1]:
            if record := _parse(line):
                self._take(record, (path, start + offset, len(line)))
            offset += len(line) + 1
        return end

    def _take(self, record: dict[str, Any], where: tuple[str, int, int]) -> None:
        attempt = (_writer(where[0]), record["attempt"])
        self.newest_at = max(self.newest_at, record["at"])
        if record["kind"] == "sent":
            self._open[attempt] = (record["key"], Cost(record["tokens"], record["usd"]))
            return
        self._open.pop(attempt, None)
        if record["kind"] == "failed":
            cost = Cost(record["tokens"], record["usd"])
        else:
            known = self._answers.setdefault(record["key"], where)
            if known != where and _writer(known[0]) == attempt[0]:
                return  # written again, since a sync had failed; it was paid for once
            completion = record["completion"]
            cost = Cost(completion["prompt_tokens"] + completion["completion_tokens"], completion["usd"])
        self.spent = Spent(self.spent.pico_usd + pico_usd(cost.usd), self.spent.tokens + cost.tokens)


def records(run: RunDirectory, directory: str) -> Iterator[dict[str, Any]]:
    """Every whole record, file by file: for looking into a journal by hand."""
    for path in run.files(directory, _SUFFIX):
        for line in run.read_bytes(path).split(b"\n"):
            if record := _parse(line):
                yield record


class _Sink(Protocol):
    gather_s: float

    def append(self, data: bytes) -> None: ...

    def write_durably(self, data: bytes) -> None: ...


class _File:
    """A local disk or NFS."""

    gather_s = 0.0  # while one batch is synced, the next one gathers

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._torn = False
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the file's name is to be durable too
        os.close(directory)

    def append(self, data: bytes) -> None:
        data = b"\n" + data if self._torn else data  # what a full disk has cut off must not spoil the next line
        self._torn = True
        if os.write(self._descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def write_durably(self, data: bytes) -> None:
        self.append(data)
        os.fsync(self._descriptor)


class _Parts:
    """An object store: what is written whole is durable."""

    gather_s = FLUSH_S

    def __init__(self, run: RunDirectory, stem: str) -> None:
        self._fs, self._stem = run.fs, stem
        self._pending: list[bytes] = []
        self._parts = 0
        patiently(lambda: run.fs.create_dir(stem.rpartition("/")[0], recursive=True), run.patience_s)

    def append(self, data: bytes) -> None:
        self._pending.append(data)

    def write_durably(self, data: bytes) -> None:
        pending, self._pending = self._pending, []
        try:
            with self._fs.open_output_stream(f"{self._stem}.{self._parts:06d}{_SUFFIX}") as stream:
                stream.write(b"".join(pending) + data)
        except BaseException:
            self._pending = pending + self._pending
            raise
        self._parts += 1


def _sink(run: RunDirectory, relative: str) -> _Sink:
    if isinstance(run.fs, pyarrow.fs.LocalFileSystem):
        return _File(Path(run.path(relative) + _SUFFIX))
    return _Parts(run, run.path(relative))


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _writer(path: str) -> str:
    """The name of the writer of a file or part."""
    return path.rpartition("/")[2].split(".")[0]


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record | {"at": time.time()}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for one that is torn or damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record
