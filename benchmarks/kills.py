"""Random SIGKILLs over one generation run: is anything paid for twice, is anything lost?

python benchmarks/kills.py [--quick] [--kills 50] [--seed 0]

A run on a local cluster of two nodes against the referee, its driver, generation actors, limiter and second node
killed at random points of its progress; then the referee's ledger is held against the journal, and the dataset against
that of a run nobody disturbed. The peer is a plain run's own bill: requests paid for twice over requests needed.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from alpaca_ray.artifacts import open_run
from alpaca_ray.provider.journal import records
from tests.nodes import Nodes
from tests.referee.process import RefereeProcess

ROOT = Path(__file__).parents[1]
TARGETS = {"driver": 12, "actor": 20, "limiter": 10, "node": 8}  # weights
WORKER_NAMES = {"actor": "MapWorker", "limiter": "LimiterActor"}
POLL_S = 0.1
REQUESTS_PER_MINUTE = 900


def job(referee: RefereeProcess, storage: Path, num_instructions: int, *options: str) -> list[str]:
    return [
        sys.executable, "jobs/generate.py", "--recipe", "tiny_cpu", "--name", "kills", "--storage-path", str(storage),
        "--generate.num-instructions", str(num_instructions), "--generate.requests-per-round", "150",
        "--generate.max-requests", "100000", "--generate.num-actors", "3",
        "--generate.teacher.model", "referee", "--generate.teacher.base-url", referee.base_url,
        "--generate.teacher.timeout-s", "20", "--generate.placement.num-cpus", "1",
        "--generate.similarity", "false", *options,
    ]  # fmt: skip


class Driver:
    """`jobs/generate.py`, started again whenever it was killed."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log
        self.starts = 0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def finished(self) -> bool:
        """True when the job has done its work; a killed one is started anew. Raises if it ended by itself, badly."""
        code = self.process.poll()
        if code is None or code == 0:
            return code == 0
        if code != -9:
            raise RuntimeError(f"the job ended with {code}; its log: {self.log.read_text()[-3000:]}")
        self.process = self.start()
        return False


def kill(target: str, cluster: Nodes, driver: Driver, rng: random.Random) -> bool:
    """SIGKILL to one of the kind; False if there is none just now."""
    if target == "driver":
        driver.process.kill()
        driver.process.wait()
    elif target == "node":
        cluster.kill_node()
    else:
        workers = cluster.workers(WORKER_NAMES[target])
        if not workers:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(workers).kill()
    return True


def disturbed(
    cluster: Nodes, referee: RefereeProcess, driver: Driver, plan: list[tuple[int, str]], seed: int
) -> Counter[str]:
    """Run to the end; kill each target once the referee has paid for so many requests."""
    rng, done = random.Random(seed), Counter[str]()
    while not driver.finished():
        if plan and referee.summary()["requests"] >= plan[0][0] and kill(plan[0][1], cluster, driver, rng):
            done[plan.pop(0)[1]] += 1
            print(
                f"{sum(done.values())} kills: {dict(done)}, {referee.summary()['requests']} requests", file=sys.stderr
            )
        time.sleep(POLL_S)
    return done


def violations(ledger: list[dict[str, Any]], journal: list[dict[str, Any]]) -> tuple[int, int]:
    """Requests that went out after an answer to the same was in the journal; keys with two answers in it."""
    answered = [record for record in journal if record["kind"] == "answered"]
    bodies = {entry["response_id"]: entry["key"] for entry in ledger if entry["response_id"]}
    durable_at = {bodies[record["completion"]["response_id"]]: record["at"] for record in answered}
    late = sum(entry["arrived_at"] > durable_at.get(entry["key"], float("inf")) for entry in ledger)
    return late, len(answered) - len({record["key"] for record in answered})


def dataset_hash(storage: Path) -> str:
    manifest: dict[str, Any] = json.loads((storage / "kills/generate/manifest.json").read_text())
    return str(manifest["outputs"]["dataset.parquet"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 kills")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kills = 8 if arguments.quick else arguments.kills
    num_instructions = 100 * kills
    rng = random.Random(arguments.seed)
    os.environ.setdefault("OPENAI_API_KEY", "good-key")
    answers = {"num_tasks": [2, 3], "latency_s": [0.1, 1.0]}
    with tempfile.TemporaryDirectory() as directory, Nodes(3, 2) as cluster:
        here = Path(directory)
        environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
        with RefereeProcess(answers=answers, ledger=str(here / "ledger.jsonl")) as referee:
            quiet = Driver(job(referee, here / "quiet", num_instructions), environment, here / "quiet.log")
            while not quiet.finished():
                time.sleep(POLL_S)
            needed = sum(entry["method"] == "POST" for entry in referee.ledger())
            print(f"undisturbed: {needed} requests", file=sys.stderr)
            referee.reset()
            limits = {"requests_per_minute": REQUESTS_PER_MINUTE}
            referee.configure(limits=limits)
            points = [int((k + rng.random()) * 0.97 * needed / kills) for k in range(kills)]
            kinds = rng.choices(list(TARGETS), list(TARGETS.values()), k=kills)
            options = ["--generate.limits.requests-per-minute", str(REQUESTS_PER_MINUTE)]
            driver = Driver(job(referee, here / "kills", num_instructions, *options), environment, here / "kills.log")
            done = disturbed(cluster, referee, driver, list(zip(points, kinds, strict=True)), arguments.seed)
            ledger, summary = referee.ledger(), referee.summary()
        run = open_run(str(here / "kills"), "kills")
        late, twice = violations(ledger, list(records(run, "generate/journal")))
        manifest = run.read_json("generate/manifest.json")
        same = dataset_hash(here / "kills") == dataset_hash(here / "quiet")
    paid = sum(entry["method"] == "POST" and entry["status"] != 429 for entry in ledger)
    rows = [
        {"name": "kills", "ours": sum(done.values()), "by_target": dict(done), "driver_starts": driver.starts,
         "unit": "SIGKILLs", "goal": f">= {kills}", "holds": sum(done.values()) >= kills},
        {"name": "second_requests_for_journaled_answers", "ours": late, "unit": "requests", "goal": "0",
         "holds": late == 0},
        {"name": "answers_journaled_twice", "ours": twice, "unit": "answers", "goal": "0", "holds": twice == 0},
        {"name": "repaid_in_flight", "ours": paid - needed, "peer": needed, "peer_name": "the undisturbed run's requests",
         "ratio": round((paid - needed) / needed, 4), "counted_by_the_run": manifest["counts"]["repaid"],
         "unit": "requests", "goal": "at most those in flight: 36 a kill", "holds": paid - needed <= 36 * kills},
        {"name": "refused_for_the_rate", "ours": summary["by_status"].get("429", 0), "unit": "429s", "goal": "0",
         "holds": summary["by_status"].get("429", 0) == 0},
        {"name": "same_dataset_as_undisturbed", "ours": int(same), "unit": "bool", "goal": "1", "holds": same},
    ]  # fmt: skip
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "openai")}
    print(json.dumps({"benchmark": "kills", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
