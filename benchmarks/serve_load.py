"""The served application past its capacity, and 10,000 wrong requests.

python benchmarks/serve_load.py [--quick] [--seconds 20] [--requests 10000]

1. Overload on Ray Serve, a tiny model: a closed loop of as many clients as there are places, then of four times as
   many, A B A B. Refused clients come back when Retry-After says, or (rude) at once. How fast are those that are
   served? The peer is the same service at capacity.
2. Requests of tests/unit/test_serve_fuzz.py through the whole chain but the model; the first that gets a 5xx, or has
   its own words in an error or a log, ends it.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import hypothesis
import psutil
from hypothesis import HealthCheck, given, settings

from alpaca_ray.config import AdmissionConfig, Placement, ServeArgs, WatermarkConfig
from tests.crowd import MODEL, Crowd, Outcome, Service, service
from tests.tiny import READABLE, write_tiny_model
from tests.unit.test_serve_fuzz import REQUESTS, Door, create_scripted_api

BATCH_SIZE, MAX_WAITING, MAX_LENGTH, MAX_TOKENS = 16, 32, 1024, 200
CAPACITY = 2 * BATCH_SIZE + MAX_WAITING
ROUNDS = 2


@dataclass(frozen=True)
class Pace:
    """95th percentiles over the streams that were served, in seconds. `between_s`: tokens behind the first event."""

    first_event_s: float
    between_s: float
    served_per_s: float
    statuses: dict[int, int]
    without_retry_after: int
    incomplete: int


async def loop(crowd: Crowd, num_clients: int, seconds: float, is_rude: bool) -> list[Outcome]:
    """A closed loop of clients; none begins another request when the time is over."""
    ends_s, outcomes = time.monotonic() + seconds, list[Outcome]()

    async def client() -> None:
        while time.monotonic() < ends_s:
            outcome = await crowd.complete(max_tokens=MAX_TOKENS)
            outcomes.append(outcome)
            if outcome.status == 429 and not is_rude:
                await asyncio.sleep(float(outcome.headers.get("retry-after", 0)))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return outcomes


def paced(outcomes: Sequence[Outcome], seconds: float) -> Pace:
    """What the clients saw."""
    served = [outcome for outcome in outcomes if outcome.status == 200]
    # One letter is one token of the tiny model; the first event is a sentence that was judged.
    gaps = [
        (outcome.event_s[-1] - outcome.event_s[0]) / (MAX_TOKENS / len(outcome.event_s) * (len(outcome.event_s) - 1))
        for outcome in served
        if len(outcome.event_s) > 1
    ]
    return Pace(
        first_event_s=quantiles([outcome.event_s[0] for outcome in served], n=20)[-1],
        between_s=quantiles(gaps, n=20)[-1],
        served_per_s=len(served) / seconds,
        statuses=dict(Counter(outcome.status for outcome in outcomes)),
        without_retry_after=sum("retry-after" not in outcome.headers for outcome in outcomes if outcome.status == 429),
        incomplete=sum(not outcome.is_complete for outcome in served),
    )


def measure(running: Service, num_clients: int, seconds: float, is_rude: bool = False) -> Pace:
    """One loop, told as it ends."""

    async def scene() -> list[Outcome]:
        async with Crowd(running.cluster.serve_url, running.key.secret, timeout_s=seconds + 60) as crowd:
            return await loop(crowd, num_clients, seconds, is_rude)

    pace = paced(asyncio.run(scene()), seconds)
    print(f"{num_clients} clients{' rude' * is_rude}: {pace}", file=sys.stderr)
    return pace


def overload(seconds: float) -> list[dict[str, Any]]:
    """The rows of part 1."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tiny_model(directory / MODEL, alphabet=READABLE, max_length=MAX_LENGTH, ends=False)
        args = ServeArgs(
            model=str(directory / MODEL),
            dtype="float32",
            max_length=MAX_LENGTH,
            max_batch_size=BATCH_SIZE,
            placement=Placement(num_cpus=1),
            watermark=WatermarkConfig(key_file=str(directory / "watermark_key")),
            admission=AdmissionConfig(key_file=str(directory / "keys.jsonl"), max_waiting=MAX_WAITING),
        )
        with service(directory, {}, num_cpus=4, host="127.0.0.1") as running:
            running.deploy({"/": args})
            measure(running, CAPACITY, seconds / 4)  # warm
            pairs = [
                (measure(running, CAPACITY, seconds), measure(running, 4 * CAPACITY, seconds)) for _ in range(ROUNDS)
            ]
            rude = [measure(running, 4 * CAPACITY, seconds, is_rude=True)]
    return overload_rows([pair[0] for pair in pairs], [pair[1] for pair in pairs], rude)


def overload_rows(full: Sequence[Pace], over: Sequence[Pace], rude: Sequence[Pace]) -> list[dict[str, Any]]:
    paces = [*full, *over, *rude]
    others = sum(count for pace in paces for status, count in pace.statuses.items() if status not in (200, 429))
    faults = others + sum(pace.without_retry_after + pace.incomplete for pace in paces)
    rows = [
        {"name": "answers_but_200_and_429_with_retry_after", "ours": faults, "unit": "answers", "goal": "0",
         "refused": sum(pace.statuses.get(429, 0) for pace in paces), "holds": faults == 0},
    ]  # fmt: skip
    for name, goal in (("first_event_s", 1.5), ("between_s", 1.5), ("served_per_s", None)):
        ours, peer = (median(getattr(pace, name) for pace in group) for group in (over, full))
        ratio = ours / peer
        rows.append(
            {"name": f"p95_{name}" if goal else name, "ours": round(ours, 5), "peer": round(peer, 5),
             "rude": round(median(getattr(pace, name) for pace in rude), 5),
             "peer_name": f"the same service with {CAPACITY} clients, its capacity; ours: {4 * CAPACITY}",
             "ratio": round(ratio, 3), "unit": "requests/s" if goal is None else "s",
             "goal": "<= 1.5 times the peer's" if goal else ">= 0.67 times the peer's",
             "holds": ratio <= goal if goal else ratio >= 0.67}
        )  # fmt: skip
    return rows


def wrong_requests(num_requests: int) -> list[dict[str, Any]]:
    """The rows of part 2. Raises what the first bad answer raises, with the request."""
    statuses: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as name:
        api = create_scripted_api(write_tiny_model(Path(name)))
    with Door(api).listening() as door:

        @settings(max_examples=num_requests, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(asked=REQUESTS)
        def ask(asked: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
            path, required, others = asked
            statuses[door.post(path, json.dumps(required | others))] += 1

        ask()
    total = sum(statuses.values())
    return [
        {"name": "wrong_requests", "ours": total, "by_status": dict(statuses), "unit": "requests", "holds": True,
         "goal": f"{num_requests} of them, no 5xx, no leak (the first would have ended the run)"}
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 seconds a loop, 1000 requests")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each loop; 0: no overload")
    parser.add_argument("--requests", type=int, default=10_000, help="0: none")
    arguments = parser.parse_args()
    seconds = min(arguments.seconds, 5.0) if arguments.quick else arguments.seconds
    num_requests = min(arguments.requests, 1000) if arguments.quick else arguments.requests
    rows = overload(seconds) if seconds else []
    rows += wrong_requests(num_requests) if num_requests else []
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch")}
    versions["hypothesis"] = hypothesis.__version__
    print(json.dumps({"benchmark": "serve_load", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
