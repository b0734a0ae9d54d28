"""Random SIGKILLs over one generation run: is anything paid for twice, is anything lost?

python benchmarks/kills.py [--quick] [--kills 50] [--seed 0]

A run on a local cluster of two nodes against the referee, its driver, generation actors, limiter and second node
killed at random points of its progress; then the referee's ledger is held against the journal, and the dataset against
that of a run nobody disturbed. The peer is a plain run's own bill: requests paid for twice over requests needed.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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
INSTRUCTIONS_PER_KILL = 100  # some 50 requests
MAX_IN_FLIGHT = 36  # 3 actors with 12 requests each


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
) -> list[tuple[str, float]]:
    """Run to the end; kill each target once the referee has paid for so many requests. Gives targets and Unix times."""
    rng, done = random.Random(seed), list[tuple[str, float]]()
    while not driver.finished():
        killed_at = time.time()
        if plan and referee.summary()["requests"] >= plan[0][0] and kill(plan[0][1], cluster, driver, rng):
            done.append((plan.pop(0)[1], killed_at))
            print(f"killed {done[-1][0]}, the {len(done)}th, {referee.summary()['requests']} requests", file=sys.stderr)
        time.sleep(POLL_S)
    return done


@dataclass(frozen=True)
class Aftermath:
    """Of all kills of one target."""

    repaid: int  # requests that went out once more after one and before the next kill
    silence_s: float  # the longest time in which nothing reached the teacher


def aftermath(ledger: Sequence[dict[str, Any]], kills: Sequence[tuple[str, float]]) -> dict[str, Aftermath]:
    """What the teacher saw of each target's kills. `ledger`: without what it has refused."""
    found: dict[str, Aftermath] = {}
    ends = [at for _, at in kills[1:]] + [float("inf")]
    for (target, from_at), until_at in zip(kills, ends, strict=True):
        before = {entry["key"] for entry in ledger if entry["arrived_at"] <= from_at}
        after = [entry for entry in ledger if from_at < entry["arrived_at"] <= until_at]
        new = {entry["key"] for entry in after} - before
        times = [from_at, *(entry["arrived_at"] for entry in after)]
        silence_s = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
        old = found.get(target, Aftermath(0, 0.0))
        found[target] = Aftermath(old.repaid + len(after) - len(new), max(old.silence_s, silence_s))
    return found


def violations(ledger: list[dict[str, Any]], journal: list[dict[str, Any]]) -> tuple[int, int]:
    """Requests that went out after an answer to the same was in the journal; keys with two answers in it."""
    answered = [record for record in journal if record["kind"] == "answered"]
    bodies = {entry["response_id"]: entry["key"] for entry in ledger if entry["response_id"]}
    durable_at = {bodies[record["completion"]["response_id"]]: record["at"] for record in answered}
    late = sum(entry["arrived_at"] > durable_at.get(entry["key"], float("inf")) for entry in ledger)
    return late, len(answered) - len({record["key"] for record in answered})


def paid(referee: RefereeProcess) -> list[dict[str, Any]]:
    """The ledger's requests for answers; asking which models there are costs nothing."""
    return [entry for entry in referee.ledger() if entry["method"] == "POST"]


@dataclass(frozen=True)
class Outcome:
    """What a disturbed run did, beside one of the same config that nobody disturbed."""

    kills: Counter[str]
    driver_starts: int
    needed: int  # requests of the undisturbed run
    paid: int
    late: int
    twice: int
    refused: int  # 429s
    counted: int  # requests that the run itself says it has lost in flight
    same_dataset: bool
    after: dict[str, Aftermath]


def trial(here: Path, kinds: list[str], seed: int) -> Outcome:
    """Kill one of each of `kinds` in order, spread over one run, and hold its books against the referee's."""
    rng = random.Random(seed)
    num_instructions = INSTRUCTIONS_PER_KILL * len(kinds)
    answers = {"num_tasks": [2, 3], "latency_s": [0.1, 1.0]}
    with Nodes(3, 2) as cluster, RefereeProcess(answers=answers, ledger=str(here / "ledger.jsonl")) as referee:
        environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
        quiet = Driver(job(referee, here / "quiet", num_instructions), environment, here / "quiet.log")
        while not quiet.finished():
            time.sleep(POLL_S)
        needed = len(paid(referee))
        print(f"undisturbed: {needed} requests", file=sys.stderr)
        referee.reset()
        referee.configure(limits={"requests_per_minute": REQUESTS_PER_MINUTE})
        points = [int((k + rng.random()) * 0.97 * needed / len(kinds)) for k in range(len(kinds))]
        options = ["--generate.limits.requests-per-minute", str(REQUESTS_PER_MINUTE)]
        driver = Driver(job(referee, here / "kills", num_instructions, *options), environment, here / "kills.log")
        done = disturbed(cluster, referee, driver, list(zip(points, kinds, strict=True)), seed)
        ledger = paid(referee)
    run = open_run(str(here / "kills"), "kills")
    late, twice = violations(ledger, list(records(run, "generate/journal")))
    manifest = run.read_json("generate/manifest.json")
    undisturbed = open_run(str(here / "quiet"), "kills").read_json("generate/manifest.json")
    refused = sum(entry["status"] == 429 for entry in ledger)
    return Outcome(
        kills=Counter(target for target, _ in done),
        driver_starts=driver.starts,
        needed=needed,
        paid=len(ledger) - refused,
        late=late,
        twice=twice,
        refused=refused,
        counted=manifest["counts"]["repaid"],
        same_dataset=manifest["outputs"] == undisturbed["outputs"],
        after=aftermath([entry for entry in ledger if entry["status"] != 429], done),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 kills")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kills = 8 if arguments.quick else arguments.kills
    os.environ.setdefault("OPENAI_API_KEY", "good-key")
    kinds = random.Random(arguments.seed).choices(list(TARGETS), list(TARGETS.values()), k=kills)
    with tempfile.TemporaryDirectory() as directory:
        outcome = trial(Path(directory), kinds, arguments.seed)
    repaid, killed = outcome.paid - outcome.needed, sum(outcome.kills.values())
    rows = [
        {"name": "kills", "ours": killed, "by_target": dict(outcome.kills), "driver_starts": outcome.driver_starts,
         "unit": "SIGKILLs", "goal": f">= {kills}", "holds": killed >= kills},
        {"name": "second_requests_for_journaled_answers", "ours": outcome.late, "unit": "requests", "goal": "0",
         "holds": outcome.late == 0},
        {"name": "answers_journaled_twice", "ours": outcome.twice, "unit": "answers", "goal": "0",
         "holds": outcome.twice == 0},
        {"name": "repaid_in_flight", "ours": repaid, "counted_by_the_run": outcome.counted, "peer": outcome.needed,
         "peer_name": "requests of the undisturbed run", "ratio": round(repaid / outcome.needed, 4),
         "unit": "requests", "goal": f"at most those in flight, {MAX_IN_FLIGHT} a kill",
         "holds": repaid <= MAX_IN_FLIGHT * kills},
        {"name": "refused_for_the_rate", "ours": outcome.refused, "unit": "429s", "goal": "0",
         "holds": outcome.refused == 0},
        {"name": "same_dataset_as_undisturbed", "ours": outcome.same_dataset, "unit": "bool", "goal": "true",
         "holds": outcome.same_dataset},
        *({"name": f"after_{target}", "ours": after.repaid, "silence_s": round(after.silence_s, 1),
           "unit": "requests repaid", "goal": f"at most {MAX_IN_FLIGHT} a kill",
           "holds": after.repaid <= MAX_IN_FLIGHT * outcome.kills[target]} for target, after in outcome.after.items()),
    ]  # fmt: skip
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "openai")}
    print(json.dumps({"benchmark": "kills", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
