"""What benchmarks/serve.py measures: sides that answer the same prompts, by HTTP or by lines on a pipe.

A stream's times are taken where its text arrives: in the client, of an HTTP server; in the engine's own process, of a
bare engine. Every side gets the same model directory, whose end-of-sequence token is one that the model never gives,
so that every stream has as many tokens as were asked for.
"""

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp

from alpaca_ray.config import Placement

# What the bare engine and the served one have in common.
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32", "max_length": 512, "max_batch_size": 16, "placement": Placement(num_cpus=0),  # 0: all cores
}  # fmt: skip
WATERMARK_KEY = 3_141_592_653_589_793_238
NEVER_GIVEN = (7, "<gh_stars>")  # a token that belongs to source files, not to texts
START_S = 420.0
REQUEST_S = 600.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One completion of each prompt, all asked for at once."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    num_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Stream:
    """When its pieces of text came, in seconds after all streams were asked for."""

    times_s: tuple[float, ...]
    num_tokens: int
    num_prompt_tokens: int
    text: str = ""


@dataclass(frozen=True)
class Pass:
    """One answer to a Work."""

    streams: tuple[Stream, ...]

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together, from the first request to the last token."""
        return sum(s.num_tokens for s in self.streams) / max(s.times_s[-1] for s in self.streams)

    @property
    def first_ms(self) -> list[float]:
        """Time to the first text, of each stream."""
        return [1000 * s.times_s[0] for s in self.streams]

    @property
    def gaps_ms(self) -> list[float]:
        """Between pieces of text. A piece may be a token, or what a server lets out at once."""
        return [1000 * (b - a) for s in self.streams for a, b in zip(s.times_s, s.times_s[1:], strict=False)]

    @property
    def token_ms(self) -> list[float]:
        """Time per token behind the first text, of each stream."""
        return [1000 * (s.times_s[-1] - s.times_s[0]) / max(1, s.num_tokens - 1) for s in self.streams]


class Side(Protocol):
    """Something that answers a Work."""

    name: str

    def answer(self, work: Work) -> Pass:
        """Raises RuntimeError for an answer that is not what was asked for."""
        ...

    def close(self) -> None: ...


class HttpSide:
    """A server with OpenAI's completions API. `fields` change the body; None leaves one out."""

    def __init__(  # noqa: PLR0913 - each server has its own way
        self,
        name: str,
        url: str,
        model: str,
        *,
        key: str | None = None,
        fields: dict[str, Any] | None = None,
        process: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        self.name = name
        self._url, self._model, self._fields = url, model, fields or {}
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._process = process

    def answer(self, work: Work) -> Pass:
        """See `Side`."""
        try:
            return checked(self.name, work, asyncio.run(self._ask(work)))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RuntimeError(f"{self.name} broke off: {error!r}") from None

    def close(self) -> None:
        """End the server's process, where it is ours."""
        if self._process is not None:
            stop(self._process)

    async def _ask(self, work: Work) -> list[Stream]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            started_s = time.perf_counter()
            asked = [self._stream(session, work, index, started_s) for index in range(len(work.prompts))]
            return await asyncio.gather(*asked)

    async def _stream(self, session: aiohttp.ClientSession, work: Work, index: int, started_s: float) -> Stream:
        body = {
            "model": self._model, "prompt": work.prompts[index], "max_tokens": work.num_tokens, "stream": True,
            "temperature": work.temperature, "top_p": work.top_p, "seed": index,
            "stream_options": {"include_usage": True},
        } | self._fields  # fmt: skip
        body = {name: value for name, value in body.items() if value is not None}
        lines: list[tuple[float, bytes]] = []  # read afterwards: the client shares the cores
        async with session.post(f"{self._url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{self.name} said {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                lines.append((time.perf_counter() - started_s, line))
        return read(self.name, lines)


def read(name: str, lines: Sequence[tuple[float, bytes]]) -> Stream:
    """The events of a stream."""
    times_s, text, usage = [], "", None
    for time_s, line in lines:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"{name} said {event['error']}")
        piece = "".join(choice.get("text") or "" for choice in event.get("choices", []))
        if piece:
            times_s.append(time_s)
            text += piece
        usage = event.get("usage") or usage
    if usage is None or not times_s:
        raise RuntimeError(f"{name} ended a stream early: {lines[-1:]!r}")
    return Stream(tuple(times_s), usage["completion_tokens"], usage["prompt_tokens"], text)


class LineSide:
    """A process that reads a Work a line, writes its streams a line: `{"times_s": [[...], ...]}`, a time a token."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._process = start(command, log, pipes=True)

    def answer(self, work: Work) -> Pass:
        """See `Side`."""
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        asked = {"prompt_ids": work.prompt_ids, "num_tokens": work.num_tokens,
                 "temperature": work.temperature, "top_p": work.top_p}  # fmt: skip
        pipe_in.write(json.dumps(asked).encode() + b"\n")
        pipe_in.flush()
        line = pipe_out.readline()
        if not line:
            raise RuntimeError(f"{self.name} died: see its log")
        streams = [
            Stream(tuple(times_s), len(times_s), len(ids))
            for times_s, ids in zip(json.loads(line)["times_s"], work.prompt_ids, strict=True)
        ]
        return checked(self.name, work, streams)

    def close(self) -> None:
        """End the process."""
        stop(self._process)


def checked(name: str, work: Work, streams: Sequence[Stream]) -> Pass:
    """Nobody skips work: as many tokens as were asked for, of as many prompt tokens as there are."""
    for stream, ids in zip(streams, work.prompt_ids, strict=True):
        if stream.num_tokens != work.num_tokens or stream.num_prompt_tokens != len(ids):
            raise RuntimeError(
                f"{name} gave {stream.num_tokens} tokens for a prompt of {stream.num_prompt_tokens}; "
                f"{work.num_tokens} for {len(ids)} were asked for"
            )
    return Pass(tuple(streams))


def start(command: Sequence[str], log: Path, pipes: bool = False) -> "subprocess.Popen[bytes]":
    """A process in a group of its own; what it says goes to `log`."""
    pipe = subprocess.PIPE if pipes else None
    with log.open("wb") as said:
        return subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdin=pipe, stdout=pipe or said, stderr=said, start_new_session=True
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the group, SIGKILL to what is left."""
    for signal in (15, 9):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def serving(command: Sequence[str], port: int, path: str, log: Path) -> "subprocess.Popen[bytes]":
    """Start a server and wait until it answers. Raises RuntimeError with the end of its log."""
    process = start(command, log)
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if asyncio.run(_answers(f"http://127.0.0.1:{port}{path}")):
            return process
        time.sleep(0.5)
    stop(process)
    raise RuntimeError(f"{command[0]} did not start: {log.read_text(errors='replace')[-600:]}")


async def _answers(url: str) -> bool:
    with suppress(aiohttp.ClientError, TimeoutError):
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(url) as response,
        ):
            return response.status == 200
    return False


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def endless_model(source: Path, target: Path) -> Path:
    """The model with another end-of-sequence token, its weights linked."""
    target.mkdir()
    token_id, token = NEVER_GIVEN
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"eos_token_id": token_id},
        "generation_config.json": {"eos_token_id": token_id},
        "tokenizer_config.json": {"eos_token": token},
    }
    for file in source.iterdir():
        if file.name in changes:
            (target / file.name).write_text(json.dumps(json.loads(file.read_text()) | changes[file.name]))
        elif file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, target)
    return target


def percentile(values: Sequence[float], percent: int) -> float:
    """Interpolated, as of a sample that holds its smallest and largest."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Sides:
    """The sides that could be started, by name; those that could not, with the reason."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.started: dict[str, Side] = {}
        self.absent: dict[str, str] = {}

    def add(self, name: str, make: Callable[[], Side]) -> None:
        """Start one. A peer that does not start is a row of the result, not the end of the run."""
        started_s = time.monotonic()
        try:
            self.started[name] = make()
        except (RuntimeError, OSError) as error:
            self.absent[name] = str(error)
        state = self.absent.get(name, f"started in {time.monotonic() - started_s:.0f} s")
        print(f"{name}: {state}", file=sys.stderr, flush=True)

    def ask(self, name: str, work: Work) -> Pass | None:
        """The answer; None from one that failed, now or before, which is out from then on."""
        if name not in self.started:
            return None
        try:
            return self.started[name].answer(work)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            self.absent[name] = str(error)
            self.end(name)
            return None

    def end(self, name: str) -> None:
        """Close one, if it is there."""
        if side := self.started.pop(name, None):
            side.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for side in self.started.values():
            side.close()
