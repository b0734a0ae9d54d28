"""The constants of docs/scale.md: what a request costs the gate, the journal, the driver and Ray's head.

python benchmarks/scale.py [--quick]

Nothing is sent anywhere. Requests are planned as for Alpaca (3 examples, 20 tasks), and an answer holds the 17 other
tasks: made instructions with the words of real ones, and outputs of real lengths. CPU seconds are of one thread;
memory is what the process has grown by.
"""

import argparse
import asyncio
import gc
import importlib.metadata
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.config import GenerateConfig, LimitsConfig, TeacherConfig
from alpaca_ray.generate.harvest import Harvest
from alpaca_ray.generate.plan import plan_request
from alpaca_ray.provider.budget import Charge
from alpaca_ray.provider.gate import Ask, Gate, Report
from alpaca_ray.provider.gate_actor import start_gate
from alpaca_ray.provider.journal import Cost, Journal, Writer
from alpaca_ray.provider.limiter import LimitHeaders
from alpaca_ray.provider.sender import BATCH
from alpaca_ray.schema import (
    COMPLETION_SCHEMA,
    DATASET_SCHEMA,
    REQUEST_SCHEMA,
    Completion,
    read_evaluation_tasks,
    read_seed_tasks,
)
from benchmarks.novelty import corpus

TASKS_IN_ANSWER = 17
OUTPUT_WORDS = (5, 90)  # Alpaca's outputs have 44 words in the mean
NO_LIMIT = LimitsConfig(requests_per_minute=10**9, tokens_per_minute=10**13)
Row = dict[str, Any]


def config() -> GenerateConfig:
    """Alpaca's, without a limit that would make anything wait."""
    teacher = TeacherConfig(model="teacher", max_tokens=3072)
    return GenerateConfig(num_instructions=10**9, num_tasks_per_prompt=20, max_requests=10**9, limits=NO_LIMIT,
                          teacher=teacher)  # fmt: skip


def answers(count: int) -> Iterator[Completion]:
    """Completions as a teacher gives them: they go on inside the heading of task 4."""
    rng, instructions = random.Random(0), corpus(count * TASKS_IN_ANSWER)
    words = sorted({word for text in instructions[:2000] for word in text.split()})
    for index in range(count):
        mine = instructions[index * TASKS_IN_ANSWER : (index + 1) * TASKS_IN_ANSWER]
        tasks = [
            f"{number}. Instruction: {text}\n{number}. Input:\n<noinput>\n{number}. Output:\n"
            f"{' '.join(rng.choices(words, k=rng.randint(*OUTPUT_WORDS)))}."
            for number, text in enumerate(mine, start=4)
        ]
        text = "\n###\n".join(tasks).removeprefix("4. Instruction:")
        yield Completion(text, None, None, "stop", 420, len(text) // 4, 20.0, f"cmpl-{index:024d}", "teacher", None,
                         1.7e9, 0.005)  # fmt: skip


@contextmanager
def measured(found: Row, count: int) -> Iterator[None]:
    """CPU microseconds and bytes for each of `count` things done inside."""
    process = psutil.Process()
    gc.collect()
    cpu, memory = process.cpu_times(), process.memory_info().rss
    yield
    gc.collect()
    then = process.cpu_times()
    found["cpu_us"] = round(1e6 * (then.user + then.system - cpu.user - cpu.system) / count, 1)
    found["bytes"] = round((process.memory_info().rss - memory) / count)


def gate(directory: Path, count: int) -> Iterator[Row]:
    """The gate's own work, and through its actor, one request in a call and as many as a sender asks for at once."""
    made = Gate(config(), open_run(str(directory), "gate"), "journal")
    found: Row = {}
    with measured(found, count):
        for first in range(0, count, BATCH):
            permits = made.acquire("owner", asks(first))
            made.settle([report(permit.key, permit.lease_id) for permit in permits.granted])
    yield {"name": "gate_request", **found, "of": count}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor = start_gate(config(), open_run(str(directory), "actor"), "journal")
        for size in (1, BATCH):
            calls = min(320, count // size)
            taken = asyncio.run(ask_actor(actor, calls, size))
            yield {"name": f"gate_actor_{size}_a_call", "per_s": round(calls * size / taken), "of": calls * size}
    finally:
        ray.shutdown()


async def ask_actor(actor: Any, calls: int, size: int) -> float:
    """Seconds of that many calls, 16 at a time."""
    await actor.acquire("owner", asks(10**8, 1))
    started_s = time.perf_counter()
    for first in range(0, calls, 16):
        many = [asks(10**9 * size + (first + i) * size, size) for i in range(min(16, calls - first))]
        given = await asyncio.gather(*(actor.acquire("owner", each) for each in many))
        await asyncio.gather(*(actor.settle([report(p.key, p.lease_id) for p in g.granted]) for g in given))
    return time.perf_counter() - started_s


def asks(first: int, size: int = BATCH) -> list[Ask]:
    return [Ask(f"{first + i:064d}", 3500, Charge(420, 3072)) for i in range(size)]


def report(key: str, lease_id: str) -> Report:
    return Report(lease_id, key, None, Charge(420, 1500), LimitHeaders(), final=True)


def journal(run: RunDirectory, completions: list[Completion]) -> Iterator[Row]:
    """Written by one process, 64 answers under way, each synced before it counts; then read by a driver."""
    started_s = time.perf_counter()
    asyncio.run(write(run, completions))
    taken_s = time.perf_counter() - started_s
    size = sum(Path(run.path(file)).stat().st_size for file in run.files("journal", ".journal"))
    count, found = len(completions), Row()
    yield {"name": "journal_written", "per_s": round(count / taken_s), "bytes_on_disk": size // count, "of": count}
    with measured(found, count):
        read = Journal(run, "journal")
    assert len(read.sent_keys()) == count
    yield {"name": "journal_read", **found, "mb_per_s": round(size / (found["cpu_us"] * count)), "of": count}


async def write(run: RunDirectory, completions: list[Completion]) -> None:
    writer, free = Writer(run, "journal"), asyncio.Semaphore(64)

    async def one(index: int, completion: Completion) -> None:
        async with free:
            key = f"{index:064d}"
            await writer.answered(key, writer.sent(key, Cost(3500, 0.01)), completion)

    await asyncio.gather(*(one(index, completion) for index, completion in enumerate(completions)))


def driver(run: RunDirectory, completions: list[Completion]) -> Iterator[Row]:
    """What the driver does with an answer and keeps of it, and what lies in the run directory at the end."""
    seeds, asked = read_seed_tasks(None), config()
    planned = [plan_request(0, k, seeds, asked) for k in range(len(completions))]
    harvest = Harvest.start(asked, seeds, read_evaluation_tasks(None))
    rows: list[Row] = []

    def take(first: int, end: int) -> None:
        for request, completion in zip(planned[first:end], completions[first:end], strict=True):
            rows.append({"request": request["request"], "key": "", **json.loads(json.dumps(vars(completion)))})
            harvest.add(request, rows[-1])

    before = len(completions) * 2 // 3  # novelty is compiled at 10,000 instructions, which is no answer's cost
    take(0, before)
    found: Row = {}
    with measured(found, len(completions) - before):
        take(before, len(completions))
    kept = len(harvest.kept)
    yield {"name": "driver_answer", **found, "of": len(completions), "kept_of_an_answer": round(kept / len(rows), 2)}
    dataset = pa.Table.from_pylist(harvest.kept, schema=DATASET_SCHEMA)
    run.write_table("dataset.parquet", dataset)
    run.write_table("completions.parquet", pa.Table.from_pylist(rows, schema=COMPLETION_SCHEMA))
    run.write_json("alpaca_data.json", dataset.select(["instruction", "input", "output"]).to_pylist())
    for file, each in (("dataset.parquet", kept), ("alpaca_data.json", kept), ("completions.parquet", len(rows))):
        size = Path(run.path(file)).stat().st_size
        yield {"name": file, "bytes_on_disk": size // each, "of": each, "unit": "of a row"}
    blocks = pa.Table.from_pylist(planned, schema=REQUEST_SCHEMA).nbytes
    answered = pa.Table.from_pylist(rows, schema=COMPLETION_SCHEMA).nbytes
    yield {"name": "object_store_request", "bytes": (blocks + answered) // len(rows), "of": len(rows)}


def head(num_actors: int) -> Iterator[Row]:
    """What the head's processes grow by for each actor of a pool, and how fast they start on these cores."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor: Any = ray.remote(num_cpus=0)(Idle)
        ray.get([actor.remote().ping.remote() for _ in range(2)])  # what the first one loads is not an actor's
        servers = {name: process for process in psutil.process_iter(["name"])
                   if (name := process.info["name"]) in ("gcs_server", "raylet")}  # fmt: skip
        before = {name: process.memory_info().rss for name, process in servers.items()}
        started_s = time.perf_counter()
        made = [actor.remote() for _ in range(num_actors)]
        ray.get([each.ping.remote() for each in made])
        taken_s = time.perf_counter() - started_s
        for name, process in servers.items():
            yield {"name": f"{name}_actor", "bytes": round((process.memory_info().rss - before[name]) / num_actors),
                   "of": num_actors}  # fmt: skip
        own = [child.memory_info().rss for child in psutil.Process().children(recursive=True)
               if child.name().startswith("ray::Idle")]  # fmt: skip
        yield {"name": "actor_process", "bytes": round(statistics.median(own)) if own else None, "of": len(own),
               "started_per_s": round(num_actors / taken_s, 1)}  # fmt: skip
    finally:
        ray.shutdown()


class Idle:
    """An actor that does nothing."""

    def ping(self) -> None:
        """Answers when it runs."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    return parser.parse_args()


def main() -> int:
    part = 10 if arguments().quick else 1
    os.environ["RAY_AUTH_MODE"] = "disabled"  # nobody else's token is read or written
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        completions = list(answers(1_500 // part))
        parts: list[Callable[[], Iterator[Row]]] = [
            lambda: driver(open_run(str(directory), "driver"), completions),
            lambda: journal(open_run(str(directory), "journal"), completions * 10),
            lambda: gate(directory, 256_000 // part),
            lambda: head(100 // part),
        ]
        for measure in parts:
            for row in measure():
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row | {"goal": "none, a constant", "holds": True})
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {"ray": importlib.metadata.version("ray"), "pyarrow": pa.__version__}
    size = statistics.mean(len(completion.text or "") for completion in completions)
    setting = {"answer_bytes": round(size)}
    print(
        json.dumps({"benchmark": "scale", "machine": machine, "versions": versions, "setting": setting, "rows": rows})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
