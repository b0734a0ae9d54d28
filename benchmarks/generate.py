"""The generation job against the referee: how much of a rate limit it uses, and what Ray costs.

python benchmarks/generate.py [--quick] [--only limits,peers,overhead] [--curator-python PYTHON]

limits: `jobs/generate.py` with 1, 2, 4 and 8 actors, requests per minute binding, then tokens. peers: others under the
same limits, on the same requests. overhead: the job without any limit beside a bare asyncio loop, the same number of
requests under way in all. Everything is counted by the referee's ledger. Referee, Ray and job share this machine.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from alpaca_ray.generate.plan import plan_request, request_form
from alpaca_ray.provider.request import body
from alpaca_ray.schema import read_seed_tasks
from alpaca_ray.settings import load_config
from tests.nodes import Nodes
from tests.referee.process import RefereeProcess

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks/peers"
REQUESTS_PER_S = 20  # the binding limit, which a referee and eight actors reach on two cores
TOKENS_PER_REQUEST = 1390  # prompt and completion, on average: the limit in tokens binds at about the same rate
IN_FLIGHT = 64  # over all actors
SLOW = {"num_tasks": [7, 9], "latency_s": [0.5, 1.5]}
SMALL = {"num_tasks": [2, 3], "output_words": [10, 20]}
START_S, OVERTIME_S = 90.0, 60.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    limits: Sequence[tuple[str, int, float]]  # which limit binds, actors, the referee's window in s
    peers: Sequence[tuple[str, str]]  # script and options
    steady_s: float  # of the peers too
    requests: int  # without a limit
    rounds: int  # A B A B


FULL = Plan(
    limits=[(kind, actors, 60.0) for kind in ("requests", "tokens") for actors in (1, 2, 4, 8)],
    peers=[
        ("asyncio_loop", "requests"), ("asyncio_loop", "tokens"), ("ray_data_llm", "2"), ("ray_data_llm", "8"),
        ("curator", "requests"),
    ],
    steady_s=132.0, requests=6000, rounds=3,
)  # fmt: skip
QUICK = Plan(
    limits=[("requests", 1, 12.0), ("requests", 8, 12.0), ("tokens", 8, 12.0)],
    peers=[("asyncio_loop", "requests"), ("ray_data_llm", "8"), ("curator", "requests")],
    steady_s=36.0, requests=2500, rounds=1,
)  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """What the referee enforces, per `window_s`, and when it is in steady state."""

    kind: str
    window_s: float
    steady_s: float

    @property
    def amount(self) -> int:
        """Requests or tokens in a window."""
        rate = REQUESTS_PER_S * (TOKENS_PER_REQUEST if self.kind == "tokens" else 1)
        return round(rate * self.window_s)

    @property
    def setting(self) -> dict[str, Any]:
        """For the referee."""
        return {f"{self.kind}_per_minute": self.amount, "window_s": self.window_s}

    @property
    def from_s(self) -> float:
        """Requests are even from the start; tokens when the first window is over, and the wave that it made."""
        return 10.0 if self.kind == "requests" else 1.25 * self.window_s

    @property
    def until_s(self) -> float:
        """Since the first request."""
        return self.from_s + self.steady_s

    @property
    def num_requests(self) -> int:
        """Enough until then, and a little more."""
        return round(REQUESTS_PER_S * (self.until_s + 3))


def job(storage: Path, base_url: str, requests: int, actors: int, *options: str) -> list[str]:
    """One round of so many requests, and then enough is kept."""
    return [
        sys.executable, "jobs/generate.py", *overrides(storage, requests, actors),
        "--generate.teacher.base-url", base_url, *options,
    ]  # fmt: skip


def overrides(storage: Path, requests: int, actors: int) -> list[str]:
    """Alpaca's prompt and its max_tokens, the similarity pass off: benchmarks/novelty.py measures it."""
    return [
        "--recipe", "tiny_cpu", "--name", "speed", "--storage-path", str(storage), "--generate.similarity", "false",
        "--generate.num-instructions", str(requests), "--generate.requests-per-round", str(requests),
        "--generate.max-requests", str(2 * requests), "--generate.num-tasks-per-prompt", "20",
        "--generate.num-actors", str(actors), "--generate.concurrent-requests-per-actor", str(IN_FLIGHT // actors),
        "--generate.teacher.model", "referee", "--generate.teacher.max-tokens", "3072",
        "--generate.teacher.timeout-s", "60",
    ]  # fmt: skip


def bodies(requests: int) -> Iterator[str]:
    """What the job sends, for the peers: a JSON object a line."""
    config = load_config(overrides(Path(), requests, 1)).generate
    seeds, form = read_seed_tasks(config.seed_tasks), request_form(config)
    for k in range(requests):
        row = plan_request(config.seed, k, seeds, config)
        yield json.dumps(body(form.of(row["prompt"], row["seed"]), config.teacher)) + "\n"


class Bench:
    """Runs one trial after the other, each with a referee of its own, all on one cluster of two nodes."""

    def __init__(self, here: Path, cluster: Nodes) -> None:
        self._here, self._cluster, self._trials = here, cluster, 0

    def new_directory(self) -> Path:
        """For what a trial writes."""
        self._trials += 1
        directory = self._here / f"{self._trials:03d}"
        directory.mkdir()
        return directory

    def run(self, command: list[str], directory: Path, base_url: str, limit_s: float | None) -> tuple[float, bool]:
        """Wall time and whether it came to its end; past `limit_s` it is killed. Raises if it ended badly."""
        environment = self._cluster.environment | {"PYTHONPATH": str(ROOT), "OPENAI_BASE_URL": base_url}
        log = directory / "log"
        started_s = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return time.monotonic() - started_s, False
        finally:
            process.kill()
            process.wait()
        if code != 0:
            raise RuntimeError(f"{command[1]} ended with {code}; the end of its log: {log.read_text()[-2000:]}")
        return time.monotonic() - started_s, True

    def ours(self, limit: Limit, actors: int) -> Row:
        """The job under a limit, to its end."""
        directory = self.new_directory()
        with RefereeProcess(limits=limit.setting, answers=SLOW) as referee:
            options = [
                f"--generate.limits.{limit.kind}-per-minute", str(limit.amount),
                "--generate.limits.window-s", str(limit.window_s),
            ]  # fmt: skip
            command = job(directory, referee.base_url, limit.num_requests, actors, *options)
            wall_s, _ = self.run(command, directory, referee.base_url, START_S + limit.until_s + OVERTIME_S)
            return seen(referee, limit) | {"wall_s": round(wall_s, 1)}

    def peer(self, limit: Limit, script: str, python: str, *options: str) -> Row:
        """Another one under a limit, until it ends or steady state is over."""
        directory = self.new_directory()
        with RefereeProcess(limits=limit.setting, answers=SLOW) as referee:
            (directory / "bodies").write_text("".join(bodies(limit.num_requests)))
            command = [python, str(PEERS / f"{script}.py"), str(directory / "bodies"), str(directory / "out"), *options]
            _, ended = self.run(command, directory, referee.base_url, limit.until_s + START_S / 3)
            return seen(referee, limit) | {"ended": ended}

    def free(self, requests: int, actors: int) -> Row:
        """The job with no limit; 0 actors: the bare loop."""
        directory = self.new_directory()
        with RefereeProcess(answers=SMALL, limits={"headers": False}) as referee:
            command = job(directory, referee.base_url, requests, actors) if actors else self.bare(directory, requests)
            started_at = time.time()
            wall_s, _ = self.run(command, directory, referee.base_url, None)
            answered, asked_at = referee.summary(), [entry["arrived_at"] for entry in referee.ledger() if entry["key"]]
        assert answered["by_status"] == {"200": requests}, answered["by_status"]
        return {
            "per_s": answered["steady"]["answered_per_minute"] / 60,
            "first_request_s": asked_at[0] - started_at,
            "wall_s": wall_s,
        }

    def bare(self, directory: Path, requests: int) -> list[str]:
        (directory / "bodies").write_text("".join(bodies(requests)))
        loop = [sys.executable, str(PEERS / "asyncio_loop.py"), str(directory / "bodies"), str(directory / "out")]
        return [*loop, "--concurrency", str(IN_FLIGHT)]


def seen(referee: RefereeProcess, limit: Limit) -> Row:
    """The referee's figures under a limit."""
    ledger = [entry for entry in referee.ledger() if entry["key"]]
    last_s = ledger[-1]["arrived_s"] - ledger[0]["arrived_s"]
    until_s = min(limit.until_s, last_s)
    counted = referee.summary(limit.from_s, until_s)
    steady, most = counted["steady"], counted["most"]
    per_minute = limit.amount * 60 / limit.window_s
    used = steady["requests_per_minute"] if limit.kind == "requests" else steady["tokens_per_minute"]
    return {
        "share": round(used / per_minute, 4),
        "share_held": round(held(ledger, limit, until_s) / limit.amount, 4),
        "refused": counted["by_status"].get("429", 0),
        "most_in_window": most["admitted_in_window"] if limit.kind == "requests" else most["held_tokens"],
        "most_in_1s": most["requests_in_1s"],
        "mean_in_1s": round(steady["requests_per_minute"] / 60, 2),
        "most_in_flight": counted["most_in_flight"],
        "requests": counted["requests"],
        "steady_s": round(until_s - limit.from_s, 1),
    }


def held(ledger: list[Row], limit: Limit, until_s: float) -> float:
    """What the server's window held on average: a request counts with what it reserved until it is answered."""
    total = 0.0
    for entry in ledger:
        if entry["attempt"] and limit.from_s <= entry["arrived_s"] - ledger[0]["arrived_s"] < until_s:
            flight_s = (entry["finished_s"] or entry["arrived_s"]) - entry["arrived_s"]
            if limit.kind == "requests":
                total += limit.window_s
            else:
                total += entry["reserved_tokens"] * flight_s + entry["charged_tokens"] * (limit.window_s - flight_s)
    return total / (until_s - limit.from_s)


def limit_rows(bench: Bench, plan: Plan) -> Iterator[Row]:
    """Four rows a trial, one for each promise."""
    for kind, actors, window_s in plan.limits:
        limit = Limit(kind, window_s, plan.steady_s)
        figures = bench.ours(limit, actors)
        name = f"{kind}_limit_{actors}_actors"
        rest = {"window_s": window_s, **figures}
        mean = figures["mean_in_1s"]
        yield {"name": f"{name}_share_held", "ours": figures["share_held"], **rest, "unit": "of the limit",
               "goal": ">= 0.95", "holds": figures["share_held"] >= 0.95}  # fmt: skip
        yield {"name": f"{name}_refused", "ours": figures["refused"], "unit": "429s", "goal": "0",
               "holds": figures["refused"] == 0}  # fmt: skip
        yield {"name": f"{name}_fullest_window", "ours": figures["most_in_window"], "unit": kind,
               "goal": f"<= {limit.amount}", "holds": figures["most_in_window"] <= limit.amount}  # fmt: skip
        yield {"name": f"{name}_fullest_second", "ours": figures["most_in_1s"], "unit": "requests",
               "goal": f"<= {2 * mean:g}, twice the mean", "holds": figures["most_in_1s"] <= 2 * mean}  # fmt: skip


def peer_rows(bench: Bench, plan: Plan, curator_python: str | None) -> Iterator[Row]:
    """Each peer beside ours under the same limit, in windows of a minute."""
    mine: dict[str, Row] = {}
    for script, variant in plan.peers:
        kind = "tokens" if variant == "tokens" else "requests"
        limit = Limit(kind, 60.0, plan.steady_s)
        rate = [f"--{kind}-per-minute", str(limit.amount)]
        python, options = sys.executable, rate
        if script == "ray_data_llm":
            options = [*rate, "--actors", variant]
        elif script == "curator":
            if curator_python is None:
                yield {"name": f"peer_curator_{kind}", "skipped": "no --curator-python", "holds": True}
                continue
            python = curator_python
        if kind not in mine:
            mine[kind] = bench.ours(limit, 8)
        theirs = bench.peer(limit, script, python, *options)
        yield {"name": f"peer_{script}_{variant}", "ours": mine[kind]["share"], "peer": theirs["share"],
               "peer_name": script, "ratio": round(mine[kind]["share"] / theirs["share"], 3),
               "better": better(mine[kind], theirs), "ours_in_full": mine[kind], "peer_in_full": theirs,
               "unit": f"of the limit in {kind}", "goal": "none, for comparison", "holds": True}  # fmt: skip


def better(ours: Row, theirs: Row) -> Row:
    """Who is ahead at what."""
    ahead = {}
    for name, sign in (("share", 1), ("refused", -1), ("most_in_window", -1), ("most_in_1s", -1)):
        difference = sign * (ours[name] - theirs[name])
        ahead[name] = "ours" if difference > 0 else "peer" if difference < 0 else "equal"
    return ahead


def overhead_rows(bench: Bench, plan: Plan) -> Iterator[Row]:
    """Rates without a limit, medians over the rounds."""
    trials: dict[int, list[Row]] = {0: [], 1: [], 8: []}
    for _ in range(plan.rounds):
        for actors, done in trials.items():
            done.append(bench.free(plan.requests, actors))
            print(f"{actors} actors: {done[-1]}", file=sys.stderr)
    for name, unit in (("per_s", "requests/s"), ("first_request_s", "s"), ("wall_s", "s")):
        middle = {actors: statistics.median(row[name] for row in done) for actors, done in trials.items()}
        for actors in (1, 8):
            yield {"name": f"no_limit_{actors}_actors_{name}", "ours": round(middle[actors], 2),
                   "peer": round(middle[0], 2), "peer_name": "bare asyncio loop, openai SDK, one process",
                   "ratio": round(middle[actors] / middle[0], 3), "requests": plan.requests, "in_flight": IN_FLIGHT,
                   "all": [round(row[name], 2) for row in trials[actors]],
                   "peer_all": [round(row[name], 2) for row in trials[0]],
                   "unit": unit, "goal": "none, for comparison", "holds": True}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="windows of 12 s, fewer trials")
    parser.add_argument("--only", default="limits,peers,overhead")
    parser.add_argument("--curator-python", help="of an environment with bespokelabs-curator")
    arguments = parser.parse_args()
    plan, parts = QUICK if arguments.quick else FULL, arguments.only.split(",")
    os.environ.setdefault("OPENAI_API_KEY", "good-key")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # end the cluster too
    busy = psutil.cpu_percent(2)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory, Nodes(4, 4) as cluster:
        bench = Bench(Path(directory), cluster)
        for part, made in (
            ("limits", limit_rows(bench, plan)),
            ("peers", peer_rows(bench, plan, arguments.curator_python)),
            ("overhead", overhead_rows(bench, plan)),
        ):
            for row in made if part in parts else ():
                print(json.dumps(row), file=sys.stderr)
                rows.append(row)
    machine = {
        "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "shared_by": "referee, Ray, job", "busy_before": busy / 100,
    }  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("ray", "openai")}
    print(json.dumps({"benchmark": "generate", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
