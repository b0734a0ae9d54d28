"""A job stopped; the head, and its GCS alone, killed under a job and a served model.

About a minute each, of which most goes into starting heads.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import yaml

from alpaca_ray.artifacts import open_run
from alpaca_ray.cluster import local
from alpaca_ray.provider.journal import records
from benchmarks.kills import MAX_IN_FLIGHT, job, paid, violations
from tests.faults.kept import kept_head
from tests.faults.submitted import Job, ask
from tests.faults.table import FaultRow
from tests.nodes import kill_all
from tests.patience import PATIENT, START_TIMEOUT_S
from tests.referee.process import RefereeProcess
from tests.waiting import POLL_S, wait

ROOT = Path(__file__).parents[2]
NUM_INSTRUCTIONS = 160  # some 80 requests
SLOWLY = ("--generate.limits.requests-per-minute", "300")
ENVIRONMENT = PATIENT | {"OPENAI_API_KEY": "good-key", "RAY_health_check_period_ms": "1000"}

pytestmark = pytest.mark.slow_fault


@dataclass
class Place:
    """A durable head, a teacher, and what a run gives that nobody disturbs."""

    directory: Path
    cluster: local.LocalCluster
    referee: RefereeProcess
    undisturbed: dict[str, str]
    needed: int

    def start(self) -> None:
        """The head again, where it was."""
        self.cluster = local.start(self.directory / "head", 4, ENVIRONMENT, START_TIMEOUT_S, is_durable=True)

    def entrypoint(self, name: str) -> list[str]:
        """A generation of some 20 s."""
        return job(self.referee, self.directory / name, NUM_INSTRUCTIONS, *SLOWLY)

    def books(self, name: str) -> tuple[int, int, int, bool]:
        """Requests paid again, those of them whose answer was durable, answers filed twice, whether the rows agree."""
        run = open_run(str(self.directory / name), "kills")
        late, twice = violations(paid(self.referee), list(records(run, "generate/journal")))
        same = run.read_json("generate/manifest.json")["outputs"] == self.undisturbed
        return self.referee.summary()["requests"] - self.needed, late, twice, same


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("place")
    answers = {"num_tasks": [2, 3], "latency_s": [0.1, 1.0]}
    with RefereeProcess(answers=answers, ledger=str(directory / "ledger.jsonl")) as referee:
        cluster = local.start(directory / "head", 4, ENVIRONMENT, START_TIMEOUT_S, is_durable=True)
        found = Place(directory, cluster, referee, {}, 0)
        try:
            quiet = Job(cluster, job(referee, directory / "quiet", NUM_INSTRUCTIONS))
            assert quiet.ends(cluster) == "SUCCEEDED", quiet.log(cluster)
            manifest = open_run(str(directory / "quiet"), "kills").read_json("generate/manifest.json")
            found.undisturbed, found.needed = manifest["outputs"], len(paid(referee))
            yield found
        finally:
            local.stop(found.cluster)


@pytest.fixture
def fresh(place: Place) -> Place:
    place.referee.reset()
    return place


def submitted_again(place: Place, name: str) -> float:
    """Submit once more; when its next request reached the teacher, on the clock of time.monotonic."""
    before = place.referee.summary()["requests"]
    again = Job(place.cluster, place.entrypoint(name))
    wait(lambda: place.referee.summary()["requests"] > before, "a request of the job that was submitted again")
    at_s = time.monotonic()
    assert again.ends(place.cluster) == "SUCCEEDED", again.log(place.cluster)
    return at_s


def test_a_stopped_job_goes_on_when_it_is_submitted_again(fresh: Place, fault_row: FaultRow) -> None:
    stopped = Job(fresh.cluster, fresh.entrypoint("stopped"))
    wait(lambda: fresh.referee.summary()["requests"] >= 10, "ten requests")
    stopped_s = time.monotonic()
    stopped.stop(fresh.cluster)
    assert stopped.ends(fresh.cluster) == "STOPPED"
    after_s = submitted_again(fresh, "stopped") - stopped_s
    repaid, late, twice, same = fresh.books("stopped")
    fault_row(
        "job stop",
        lost="nothing" if same else "rows",
        repeated=f"{repaid} requests, of {MAX_IN_FLIGHT} that may be in flight",
        recovery_s=after_s,
        until="the next request of the job submitted again",
    )
    assert (late, twice, same) == (0, 0, True)
    assert repaid <= MAX_IN_FLIGHT


def test_a_head_that_is_killed_comes_back_with_its_jobs_and_its_applications(
    fresh: Place, tiny_model: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    local.deploy(fresh.cluster, serve_config(tmp_path, fresh.cluster, tiny_model), START_TIMEOUT_S)
    said = ask_model(fresh.cluster)
    assert said
    running = Job(fresh.cluster, fresh.entrypoint("headless"))
    wait(lambda: fresh.referee.summary()["requests"] >= 10, "ten requests")
    assert running.status(fresh.cluster) == "RUNNING"
    killed_s = time.monotonic()
    kill_all(fresh.cluster.pid)  # the GCS, its raylet, and all that ran there: drivers, the limiter, replicas
    fresh.start()
    wait(lambda: ask_model(fresh.cluster) == said, "an answer of the application that nobody deployed again")
    served_s = time.monotonic() - killed_s
    # The driver died with its head. That the table says so is what a pipeline can build on.
    assert running.ends(fresh.cluster) == "FAILED"
    submitted_again(fresh, "headless")
    repaid, late, twice, same = fresh.books("headless")
    fault_row(
        "head killed",
        lost="nothing" if same else "rows",
        repeated=f"{repaid} requests, of {MAX_IN_FLIGHT} that may be in flight",
        recovery_s=served_s,
        until="the served model answers; jobs are submitted again",
    )
    assert (late, twice, same) == (0, 0, True)
    assert repaid <= MAX_IN_FLIGHT


def test_a_gcs_that_dies_is_started_again_and_nobody_has_to_do_anything(
    fresh: Place, tiny_model: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    local.end(fresh.cluster)  # two cores; the next test would start it again
    with kept_head(4, ENVIRONMENT) as head:
        wait(lambda: answers(head.cluster), "the dashboard")
        local.deploy(head.cluster, serve_config(tmp_path, head.cluster, tiny_model), START_TIMEOUT_S)
        said = ask_model(head.cluster)
        running = Job(head.cluster, fresh.entrypoint("kept"))
        wait(lambda: fresh.referee.summary()["requests"] >= 10, "ten requests")
        with asking(head.cluster) as heard:
            gcs = head.gcs()
            killed_s = time.monotonic()
            gcs.kill()
            wait(lambda: [e["event"] for e in head.events()][-1:] == ["gcs_started"], "the keeper's word")
            wait(lambda: answers(head.cluster), "the dashboard")
            back_s = time.monotonic() - killed_s
            status = running.status(head.cluster)
            assert running.ends(head.cluster) == "SUCCEEDED", running.log(head.cluster)
    repaid, late, twice, same = fresh.books("kept")
    fault_row(
        "GCS restarted",
        lost="nothing" if same else "rows",
        repeated=f"{repaid} requests; {heard.count(said)} of {len(heard)} answers of the served model came meanwhile",
        recovery_s=back_s,
        until="the head answers; the job and the served model never stop",
    )
    assert status == "RUNNING"
    assert heard == [said] * len(heard)
    assert (repaid, late, twice, same) == (0, 0, 0, True)


@contextlib.contextmanager
def asking(cluster: local.LocalCluster) -> Iterator[list[str | None]]:
    """Answers of the served model, one after another while the block lasts."""
    heard: list[str | None] = []
    is_over = threading.Event()

    def ask_on() -> None:
        while not is_over.wait(POLL_S):
            heard.append(ask_model(cluster))

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        yield heard
    finally:
        is_over.set()
        thread.join()


def answers(cluster: local.LocalCluster) -> bool:
    """Whether the dashboard can ask the GCS for its jobs."""
    with contextlib.suppress(OSError):
        return isinstance(ask(cluster, "/api/jobs/"), list)
    return False


def serve_config(directory: Path, cluster: local.LocalCluster, model: Path) -> Path:
    """serve_config.yaml with a tiny model, on the cluster's port."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = cluster.serve_port
    config["applications"][0]["args"] |= {"model": str(model), "model_name": "tiny", "max_length": 2048}
    config["applications"][0]["args"]["watermark"]["enabled"] = False
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ask_model(cluster: local.LocalCluster) -> str | None:
    """A greedy answer; None while there is none."""
    with (
        contextlib.suppress(openai.APIError),
        openai.OpenAI(base_url=f"{cluster.serve_url}/v1", api_key="none-needed", max_retries=0, timeout=30) as client,
    ):
        answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=8, temperature=0)
        return repr(answer.choices[0].text)
    return None
