"""A pipeline killed again and again and submitted again: does it end with the same artifacts, and repeat no stage?

python -m benchmarks.pipeline_kills [--quick] [--kills 10] [--seed 0] [--model tiny|embedded] [--twin]

On a local head with token authentication (`--twin`: on the local twin of cluster.yaml, whose nodes come and go), runs
of three stages. By turns, at random moments of random stages: SIGKILL
to the pipeline's driver, SIGKILL to a stage's driver, `ray job stop` of the pipeline. What two runs that nobody
disturbs have alike, byte by byte, is what a run decides; a disturbed run has to have it too. The teacher is scripted,
the model that is trained and compared a random Llama of 2 layers (`--model embedded`: SmolLM2-135M, some ten minutes
a run). The peer is the time of the undisturbed run.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.job_submission import JobSubmissionClient, JobType

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.cluster import ledger, local, twin
from alpaca_ray.cluster.render import read_definition
from alpaca_ray.config import STAGES
from tests.patience import PATIENT
from tests.teacher import Teacher
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[1]
KINDS = ("pipeline", "stage", "stop")  # what is done, by turns
KILLS_A_RUN = 10  # all of them on one run, as long as it lasts
POLL_S = 0.1
DEADLINE_S = 1200.0
STOP_S = 60.0  # a stage's job has to be stopped so soon after its pipeline
API_KEY = "good-key"  # the teacher's, in the environment of the head
NUM_CPUS = 4  # of Ray; more than the machine may have: what waits for a core is not what is measured
# Whatever else is alike: without these there would be nothing to compare.
CORE = (
    "generate/dataset.parquet", "generate/alpaca_data.json", "generate/rejects.parquet", "train/encoded.parquet",
    "train/heldout.parquet", "train/model/model.safetensors", "evaluate/scores.json",
    "evaluate/responses/part-000.parquet",
)  # fmt: skip
SMALL = (
    "--train.max-length", "512", "--train.num-epochs", "1", "--evaluate.num-instructions", "4",
    "--evaluate.max-new-tokens", "8", "--generate.num-actors", "1", "--train.num-workers", "1",
)  # fmt: skip
UNKNOWN_WORK_S = 20.0  # of a stage's job, where no undisturbed run was made


@dataclass
class Site:
    """A local head, its teacher and a place for runs."""

    cluster: local.LocalCluster
    storage: Path
    options: list[str]
    client: JobSubmissionClient

    def entrypoint(self, name: str) -> list[str]:
        return [
            "python", "jobs/pipeline.py", "--recipe", "tiny_cpu", "--storage-path", str(self.storage / name),
            *self.options,
        ]  # fmt: skip

    def run(self, name: str) -> RunDirectory:
        return open_run(str(self.storage / name), "tiny_cpu")

    def submit(self, name: str) -> str:
        command = " ".join(self.entrypoint(name))
        return self.client.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT)})

    def status(self, job: str) -> str:
        return str(self.client.get_job_status(job).value)

    def wait_for_end(self, job: str) -> str:
        """Its last status. Raises RuntimeError after a long time."""
        until_s = time.monotonic() + DEADLINE_S
        while (status := self.status(job)) in ("PENDING", "RUNNING"):
            if time.monotonic() > until_s:
                raise RuntimeError(f"job {job} does not end:\n{self.client.get_job_logs(job)[-3000:]}")
            time.sleep(POLL_S)
        return status

    def stage_jobs(self, name: str) -> list[Any]:
        """Ray's own records of the jobs of a run's stages."""
        return [
            job
            for job in self.client.list_jobs()
            if job.type is JobType.SUBMISSION
            and f"{self.storage / name} " in job.entrypoint
            and "jobs/pipeline.py" not in job.entrypoint
        ]

    def driver(self, script: str) -> psutil.Process | None:
        """The process that runs jobs/SCRIPT.py, not the shell around it."""
        head = psutil.Process(self.cluster.pid)
        for process in head.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if f"jobs/{script}.py" in command and "-c" not in command:
                    return process
        return None


@contextlib.contextmanager
def site(directory: Path, model: str, is_twin: bool = False) -> Iterator[Site]:
    """`model`: a directory, or embedded:NAME."""
    environment = PATIENT | {"OPENAI_API_KEY": API_KEY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = (
        "0"  # a process at each start of the workers; no node is drained
    )
    options = [] if model.startswith("embedded:") else list(SMALL)
    with Teacher() as teacher:
        if is_twin:
            cluster = twin.up(directory / "head", read_definition(ROOT / "cluster.yaml"), environment=environment)
        else:
            cluster = local.start(directory / "head", NUM_CPUS, environment, timeout_s=300)
        token = (directory / "head" / "token").read_text()
        try:
            client = JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {token}"})
            options += [
                "--train.base-model", model, "--generate.teacher.base-url", teacher.base_url,
                "--generate.teacher.model", "scripted", "--generate.num-instructions", "24",
                "--generate.requests-per-round", "16",
            ]  # fmt: skip
            yield Site(cluster, directory / "runs", options, client)
        finally:
            local.stop(cluster)
            teacher.shutdown()


@dataclass
class Outcome:
    """What became of one run."""

    took_s: float
    kills: list[tuple[str, str]] = field(default_factory=list)  # what was done, and in which stage
    pipelines: int = 1
    stage_left_by_a_stop: int = 0  # stages that went on after `ray job stop` of a pipeline that had begun
    stopped_too_soon: int = 0  # pipelines stopped in the seconds before their first line: nothing of theirs heard it
    manifests_rewritten: int = 0
    overlaps: int = 0  # jobs of one stage that began before the one before had ended
    succeeded: Counter[str] = field(default_factory=Counter)  # jobs of each stage that ended well
    jobs: int = 0
    leaks: int = 0  # records that hold the teacher's key


def undisturbed(site: Site, name: str) -> Outcome:
    """By the command that users give."""
    began_s = time.monotonic()
    local.submit(site.cluster, "pipeline", site.entrypoint(name), ROOT)
    return books(site, name, Outcome(time.monotonic() - began_s))


def disturbed(site: Site, name: str, kinds: Sequence[str], rng: random.Random, work_s: dict[str, float]) -> Outcome:
    """One run; `work_s`: how long an undisturbed job of each stage takes. Fewer kills where it is sooner done."""
    outcome = Outcome(0.0)
    plan = sorted((rng.randrange(len(STAGES)), rng.random(), kind) for kind in kinds)
    began_s, manifests = time.monotonic(), dict[str, bytes]()
    job = site.submit(name)
    while True:
        note_manifests(site.run(name), manifests)
        if site.status(job) == "SUCCEEDED":
            break
        if site.status(job) in ("FAILED", "STOPPED"):
            job = site.submit(name)
            outcome.pipelines += 1
        elif plan and is_due(site, plan[0], work_s):
            outcome.kills.append(hurt(site, name, job, plan.pop(0), outcome))
        time.sleep(POLL_S)
        if time.monotonic() - began_s > DEADLINE_S:
            raise RuntimeError(f"the run does not end:\n{site.client.get_job_logs(job)[-3000:]}")
    note_manifests(site.run(name), manifests, outcome)
    outcome.took_s = time.monotonic() - began_s
    return books(site, name, outcome)


def is_due(site: Site, planned: tuple[int, float, str], work_s: dict[str, float]) -> bool:
    """Whether the stage's driver has run for its share of what the work takes, or a later stage's runs already."""
    number, share, _ = planned
    if any(site.driver(stage) for stage in STAGES[number + 1 :]):
        return True
    driver = site.driver(STAGES[number])
    return driver is not None and time.time() - driver.create_time() > share * work_s[STAGES[number]]


def hurt(site: Site, name: str, job: str, planned: tuple[int, float, str], outcome: Outcome) -> tuple[str, str]:
    """Kill or stop, and wait until a killed pipeline's job has ended."""
    kind = planned[2]
    at_work = next((stage for stage in reversed(STAGES) if site.driver(stage)), "none")
    if kind == "stop":
        has_begun = "pipeline: " in site.client.get_job_logs(job)
        running = [one.submission_id for one in site.stage_jobs(name) if not one.status.is_terminal()]
        site.client.stop_job(job)
        site.wait_for_end(job)
        outcome.stage_left_by_a_stop += has_begun and not stops(site, running)
        outcome.stopped_too_soon += not has_begun
    else:
        process = site.driver("pipeline" if kind == "pipeline" else at_work)
        if process is None:
            return f"{kind}, too late", at_work
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        if kind == "pipeline":
            site.wait_for_end(job)
    say(f"{kind} in {at_work}")
    return kind, at_work


def stops(site: Site, running: Sequence[str]) -> bool:
    """Whether all these jobs are stopped soon; one that ends well by itself is not."""
    until_s = time.monotonic() + STOP_S
    while time.monotonic() < until_s:
        if all(site.status(job) in ("STOPPED", "SUCCEEDED", "FAILED") for job in running):
            break
        time.sleep(POLL_S)
    return all(site.status(job) == "STOPPED" for job in running)


def note_manifests(run: RunDirectory, known: dict[str, bytes], outcome: Outcome | None = None) -> None:
    for stage in STAGES:
        if run.exists(f"{stage}/manifest.json"):
            content = run.read_bytes(f"{stage}/manifest.json")
            if outcome is not None:
                outcome.manifests_rewritten += known.get(stage, content) != content
            known.setdefault(stage, content)


def books(site: Site, name: str, outcome: Outcome) -> Outcome:
    """What Ray's job table says of the run's stages."""
    jobs = sorted(site.stage_jobs(name), key=lambda job: job.start_time)
    outcome.jobs = len(jobs)
    kept = [repr(job) for job in site.client.list_jobs()] + [site.run(name).read_bytes(ledger.PATH).decode()]
    outcome.leaks = sum(API_KEY in record for record in kept)
    for stage in STAGES:
        own = [job for job in jobs if job.submission_id.startswith(stage)]
        outcome.succeeded[stage] = sum(job.status == "SUCCEEDED" for job in own)
        outcome.overlaps += sum(b.start_time < a.end_time for a, b in itertools.pairwise(own))
    return outcome


def hashes(run: RunDirectory) -> dict[str, str]:
    """SHA-256 of every file of a run."""
    root = Path(run.root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def alike(runs: Sequence[dict[str, str]]) -> dict[str, str]:
    """What undisturbed runs have in common; of a single one its core. Raises RuntimeError if the core is not in it."""
    first, *others = runs
    same = {name: digest for name, digest in first.items() if all(other.get(name) == digest for other in others)}
    if missing := [name for name in CORE if name not in same]:
        raise RuntimeError(f"undisturbed runs lack, or differ in, {missing}")
    return same if others else {name: same[name] for name in CORE}


def differing(expected: dict[str, str], run: RunDirectory) -> list[str]:
    found = hashes(run)
    return [name for name, digest in expected.items() if found.get(name) != digest]


def work_of(run: RunDirectory) -> dict[str, float]:
    """Seconds that each stage's job took."""
    attempts = ledger.read(run).attempts
    return {a.stage: a.ended_s - a.started_s for a in attempts if a.ended_s is not None}


def rows(kills: int, quiet: Sequence[Outcome], hurts: Sequence[Outcome], expected: int, wrong: list[str]) -> list[Any]:
    done = Counter(kind for outcome in hurts for kind, _ in outcome.kills if kind in KINDS)
    where = Counter(f"{kind} in {stage}" for outcome in hurts for kind, stage in outcome.kills)
    repeated = sum(max(0, n - 1) for o in hurts for n in o.succeeded.values()) + sum(
        o.manifests_rewritten for o in hurts
    )
    hurt_s = statistics.mean(o.took_s for o in hurts)
    quiet_s = statistics.mean(o.took_s for o in quiet) if quiet else None
    stops, left = done["stop"], sum(o.stage_left_by_a_stop for o in hurts)
    return [
        row("kills", done.total(), "", f">= {kills}", done.total() >= kills, by_kind=dict(done), where=dict(where),
            runs=len(hurts), pipelines=sum(o.pipelines for o in hurts), jobs_of_stages=sum(o.jobs for o in hurts)),
        row("artifacts_that_differ", len(wrong), f"of {expected} files", "0", not wrong, which=wrong[:20]),
        row("finished_stages_repeated", repeated, "stages", "0", repeated == 0),
        row("jobs_of_one_stage_at_once", sum(o.overlaps for o in hurts), "jobs", "0",
            all(o.overlaps == 0 for o in hurts)),
        row("stages_that_outlived_a_stop", left, f"of {stops} stops", "0", left == 0,
            stopped_before_it_began=sum(o.stopped_too_soon for o in hurts)),
        row("records_with_the_key", sum(o.leaks for o in [*quiet, *hurts]), "jobs and ledgers", "0",
            all(o.leaks == 0 for o in [*quiet, *hurts])),
        row("run_s", round(hurt_s, 1), "s", "measured", True, peer=quiet_s,
            ratio=quiet_s and round(hurt_s / quiet_s, 2), peer_name="the same run, undisturbed",
            each=[round(o.took_s, 1) for o in hurts]),
    ]  # fmt: skip


def row(name: str, ours: Any, unit: str, goal: str, holds: bool, **more: Any) -> dict[str, Any]:
    return {"name": name, "ours": ours, "unit": unit, "goal": goal, "holds": holds, **more}


def trial(  # noqa: PLR0913 - settings of a run
    directory: Path, model: str, kinds: Sequence[str], seed: int, *, num_quiet: int = 2, is_twin: bool = False
) -> list[dict[str, Any]]:
    """Runs that nobody disturbs, then as many disturbed ones as `kinds` need.

    One undisturbed run tells of the core alone, none of no file.
    """
    rng, hurts, left = random.Random(seed), list[Outcome](), list(kinds)
    wrong: list[str] = []
    with site(directory, model, is_twin) as here:
        # As long as the others' names: a checkpoint holds its own path, so the sizes of its files tell its length.
        names = [f"calm-{k + 1}" for k in range(num_quiet)]
        quiet = [undisturbed(here, name) for name in names]
        expected = alike([hashes(here.run(name)) for name in names]) if names else {}
        work_s = work_of(here.run(names[-1])) if names else dict.fromkeys(STAGES, UNKNOWN_WORK_S)
        say(f"undisturbed: {[round(o.took_s) for o in quiet]} s; jobs: {work_s}; {len(expected)} files alike")
        while left and len(hurts) < len(kinds):
            name = f"hurt-{len(hurts) + 1}"
            hurts.append(disturbed(here, name, left[:KILLS_A_RUN], rng, work_s))
            for kind, _ in hurts[-1].kills:
                if kind in left:
                    left.remove(kind)
            wrong += [f"{name}/{file}" for file in differing(expected, here.run(name))]
            say(f"{name}: {hurts[-1]}; differing: {wrong}")
    return rows(len(kinds), quiet, hurts, len(expected), wrong)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills in one run")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=("tiny", "embedded"), default="tiny")
    parser.add_argument("--twin", action="store_true", help="on the local twin of cluster.yaml")
    arguments = parser.parse_args()
    kinds = [KINDS[k % len(KINDS)] for k in range(3 if arguments.quick else arguments.kills)]
    with tempfile.TemporaryDirectory(prefix="pk", dir="/tmp") as directory:
        tiny = Path(directory) / "model"
        model = str(write_tiny_model(tiny)) if arguments.model == "tiny" else "embedded:smollm2-135m"
        measured = trial(Path(directory), model, kinds, arguments.seed, is_twin=arguments.twin)
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch")}
    settings = {"model": arguments.model, "is_twin": arguments.twin, "seed": arguments.seed, "teacher": "scripted"}
    print(
        json.dumps(
            {"benchmark": "pipeline_kills", "machine": machine, "versions": versions, **settings, "rows": measured}
        )
    )
    return 0 if all(one["holds"] for one in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
