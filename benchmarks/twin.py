"""How the shipped groups grow and shrink: the local twin of cluster.yaml, under Ray's real autoscaler.

python benchmarks/twin.py [--quick] [--parts generate train evaluate room serve] [--repeats 5]

generate  jobs/generate.py with the shipped recipe's labels: 0 -> 2 -> 0 CPU nodes, and no GPU node at any time
train     jobs/train.py with the shipped recipe's labels, on CPUs, for a fake node's GPUs are names: 0 -> 1 -> 0
evaluate  jobs/evaluate.py on such a run, likewise; by turns with train, whose group it shares
room      what the shipped recipe's trainer asks for, 16 times {CPU 8, GPU 1}, without the training: 0 -> 2 -> 0
serve     an application without replicas: its first request waits for a node, a replica and the model; then back to 0

Tiny models and a scripted teacher. Nodes are counted by Ray's own list, dead ones included. Last line: one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import yaml

from alpaca_ray.artifacts import open_run
from alpaca_ray.cluster import local, twin
from alpaca_ray.cluster.render import read_definition
from alpaca_ray.settings import load_config
from tests.patience import PATIENT
from tests.teacher import Teacher
from tests.tiny import READABLE, write_tiny_model
from tests.training import dataset, finish_generate

ROOT = Path(__file__).parents[1]
RECIPE = "alpaca_7b"
GROUP = "alpaca-ray.io/group"
DEADLINE_S = 600.0
POLL_S = 0.25
ENVIRONMENT = {
    "OPENAI_API_KEY": "good-key",
    "OMP_NUM_THREADS": "1",
    # Serve's autoscaler hears of requests so often; Ray's own 10 s would be most of what is waited for here.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
SCALE = {
    "min_replicas": 0, "max_replicas": 1, "target_ongoing_requests": 2, "upscale_delay_s": 0, "downscale_delay_s": 2,
    "downscale_to_zero_delay_s": 2, "look_back_period_s": 2,
}  # fmt: skip
# As the trainer does it before it starts its workers; behind it they would look for CUDA.
ROOM = """
import sys, ray
from alpaca_ray.settings import load_config
from alpaca_ray.train import trainer
ray.init()
trainer._wait_for_room(load_config(sys.argv[1:]).train)
"""


@dataclass(frozen=True)
class Growth:
    """A group that grew from no node and went back, by Ray's own record. `started`: all nodes that began, by group."""

    up_s: float  # from the asking to the last node wanted
    done_s: float  # from the asking to the end of the work
    down_s: float  # from the end of the work to no node; 0 where they went before
    started: dict[str, int]


class Twin:
    """A twin that runs, and what its parts share."""

    def __init__(self, cluster: local.LocalCluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.model = write_tiny_model(directory / "model", alphabet=READABLE)
        self.trained: list[list[str]] = []  # options of runs that `evaluate` may go on with
        self._names = iter(range(10**6))

    def storage(self) -> Path:
        """A new directory for a run."""
        return self.directory / f"runs{next(self._names)}"

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes but the head that this cluster ever had, as Ray's state API lists them."""
        answer = local.ask_dashboard(self.cluster, "/api/v0/nodes?detail=1&limit=1000")
        return [node for node in answer["data"]["result"]["result"] if not node["is_head_node"]]

    def alive(self) -> Counter[str]:
        """Nodes by group."""
        return Counter(node["labels"][GROUP] for node in self.nodes() if node["state"] == "ALIVE")

    def wait(self, group: str, count: int, work: "Future[Any] | None" = None) -> None:
        """Until the group has so many nodes. Raises what the work raised, RuntimeError where it is over before."""
        until_s = time.monotonic() + DEADLINE_S
        while self.alive()[group] != count:
            if work is not None and work.done():
                work.result()
                raise RuntimeError(f"the work was over before {group} had {count} nodes")
            if time.monotonic() > until_s:
                raise RuntimeError(f"{group} never had {count} nodes: {self.alive()}")
            time.sleep(POLL_S)

    def growth(self, group: str, count: int, work: Callable[[], float], on_nodes: Callable[[], None]) -> Growth:
        """Do the work, which tells when it was done, and watch.

        `on_nodes` is called when the group has `count` nodes, and also if it never has.
        """
        before, asked_s = {node["node_id"] for node in self.nodes()}, time.time()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                self.wait(group, count, future)
            finally:
                on_nodes()
            done_s = future.result(DEADLINE_S)
        self.wait(group, 0)
        new = [node for node in self.nodes() if node["node_id"] not in before]
        began = sorted(node["start_time_ms"] / 1000 for node in new if node["labels"][GROUP] == group)
        ended_s = max(node["end_time_ms"] / 1000 for node in new if node["labels"][GROUP] == group)
        started = dict(Counter(node["labels"][GROUP] for node in new))
        return Growth(began[count - 1] - asked_s, done_s - asked_s, max(0.0, ended_s - done_s), started)

    def submit(self, name: str, *entrypoint: str) -> float:
        """`ray job submit`, to its end; when that was, seconds since the epoch."""
        local.submit(self.cluster, name, ["python", *entrypoint], ROOT)
        jobs = local.ask_dashboard(self.cluster, "/api/jobs/")
        ends = [int(job["end_time"]) for job in jobs if str(job["submission_id"]).startswith(f"{name}-")]
        return max(ends) / 1000


@contextmanager
def running(environment: dict[str, str]) -> Iterator[Twin]:
    """A twin of cluster.yaml of this checkout, ended with the block."""
    directory = Path(tempfile.mkdtemp(prefix="atw", dir="/tmp"))
    cluster = twin.up(directory / "twin", read_definition(ROOT / "cluster.yaml"), environment=environment)
    try:
        yield Twin(cluster, directory)
    finally:
        twin.down(directory / "twin")
        shutil.rmtree(directory, ignore_errors=True)


def generate(here: Twin) -> Growth:
    """Two actors that take a whole node each, whose teacher waits for both."""
    with Teacher() as teacher:
        teacher.may_answer.clear()
        options = [
            "jobs/generate.py", "--recipe", RECIPE, "--storage-path", str(here.storage()),
            "--generate.teacher.base-url", teacher.base_url, "--generate.teacher.model", "scripted",
            "--generate.num-instructions", "12", "--generate.requests-per-round", "16",
            "--generate.limits.requests-per-minute", "6000", "--generate.num-actors", "2",
            "--generate.concurrent-requests-per-actor", "1", "--generate.placement.num-cpus", "8",
        ]  # fmt: skip
        found = here.growth("generate", 2, lambda: here.submit("generate", *options), teacher.may_answer.set)
        teacher.shutdown()
    return found


def train(here: Twin) -> Growth:
    """A whole train stage on two workers."""
    options = [
        "--recipe", RECIPE, "--storage-path", str(here.storage()), "--train.base-model", str(here.model),
        "--train.heldout-fraction", "0.15", "--train.max-length", "256", "--train.num-epochs", "1",
        "--train.global-batch-size", "4", "--train.micro-batch-size", "1", "--train.compute-dtype", "float32",
        "--train.num-workers", "2", "--train.placement.num-cpus", "1", "--train.placement.num-gpus", "0",
    ]  # fmt: skip
    config = load_config(options)
    finish_generate(open_run(config.storage_path, config.name), config, dataset(13))
    found = here.growth("train", 1, lambda: here.submit("train", "jobs/train.py", *options), lambda: None)
    here.trained.append(options)
    return found


def evaluate(here: Twin) -> Growth:
    """A whole evaluate stage on a run that was trained, or is trained first."""
    if not here.trained:
        train(here)
    options = [
        "jobs/evaluate.py", *here.trained.pop(), "--evaluate.num-instructions", "2", "--evaluate.max-new-tokens", "4",
        "--evaluate.placement.num-cpus", "1", "--evaluate.placement.num-gpus", "0",
    ]  # fmt: skip
    return here.growth("train", 1, lambda: here.submit("evaluate", *options), lambda: None)


def room(here: Twin) -> Growth:
    """The placement group of two nodes' workers."""
    options = ["-c", ROOM, "--recipe", RECIPE, "--train.num-workers", "16"]
    return here.growth("train", 2, lambda: here.submit("room", *options), lambda: None)


def serve(here: Twin) -> Growth:
    """One request to an application that sleeps; `done_s` is when its answer is there."""
    deploy(here)
    return here.growth("serve", 1, lambda: ask(here), lambda: None)


def ask(here: Twin) -> float:
    """One request to the application; when its answer was there. Raises RuntimeError for an empty one."""
    url = f"{here.cluster.serve_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none-needed", max_retries=0, timeout=DEADLINE_S) as client:
        answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=8, temperature=0)
    if not answer.choices[0].text:
        raise RuntimeError("the answer is empty")
    return time.time()


def deploy(here: Twin) -> None:
    """serve_config.yaml with the tiny model, no replicas, and the label of its group; nothing if that is there."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = here.cluster.serve_port
    args = config["applications"][0]["args"]
    args |= {"model": str(here.model), "model_name": "tiny", "autoscaling": SCALE}
    args["watermark"]["enabled"] = False
    args["placement"] = {"num_cpus": 1, "label_selector": {GROUP: "serve"}}
    file = here.directory / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    local.deploy(here.cluster, file, DEADLINE_S)


PARTS: dict[str, tuple[Callable[[Twin], Growth], str]] = {  # and the group that may start nodes
    "generate": (generate, "generate"),
    "train": (train, "train"),
    "evaluate": (evaluate, "train"),
    "room": (room, "train"),
    "serve": (serve, "serve"),
}


def rows(name: str, found: Sequence[Growth]) -> list[dict[str, Any]]:
    """Of one part's repeats."""
    _, group = PARTS[name]
    times = {"asked_to_nodes_s": "up_s", "asked_to_done_s": "done_s", "done_to_no_node_s": "down_s"}
    return [
        row(f"{name}_nodes_started", [growth.started for growth in found], "nodes", f"of {group} only",
            all(set(growth.started) == {group} for growth in found)),
        *(row(f"{name}_{title}", **quantiles([getattr(growth, field) for growth in found]))
          for title, field in times.items()),
    ]  # fmt: skip


def row(name: str, ours: Any, unit: str, goal: str, holds: bool, **more: Any) -> dict[str, Any]:
    return {"name": name, "ours": ours, "unit": unit, "goal": goal, "holds": holds, **more}


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Fields of a row; each has to be there within the deadline, which the watching sees to."""
    ordered = sorted(seconds)
    p50, p95 = (round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 95))
    return {"ours": p50, "unit": "s", "goal": f"<= {DEADLINE_S:.0f}", "holds": p95 <= DEADLINE_S, "p50": p50,
            "p95": p95, "each": [round(s, 1) for s in seconds]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each part once")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout, help="file of the JSON object")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    began_s = time.monotonic()
    with running(PATIENT | ENVIRONMENT) as here:
        started_s = time.monotonic() - began_s
        for name in arguments.parts:
            growths = []
            for _ in range(1 if arguments.quick else arguments.repeats):
                growths.append(PARTS[name][0](here))
                print(f"{name}: {growths[-1]}", file=sys.stderr, flush=True)
            found += rows(name, growths)
        processes, began_s = local.processes(here.cluster), time.monotonic()
    left = [process for process in processes if process.is_running()]
    found += [
        row("up_s", round(started_s, 1), "s", "<= 300", started_s <= 300),
        row("down_s", round(time.monotonic() - began_s, 1), "s", "<= 60", time.monotonic() - began_s <= 60),
        row("processes_left", len(left), "processes", "0", not left, of=len(processes)),
    ]
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch")}
    whole = {"benchmark": "twin", "machine": machine, "versions": versions, "rows": found}
    print(json.dumps(whole), file=arguments.out, flush=True)
    return 0 if all(each["holds"] for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
