"""The pipeline against a job table of the tests: each stage made once, never twice at a time, whatever dies."""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.cluster import ledger
from alpaca_ray.cluster.definition import Group
from alpaca_ray.cluster.job_state import ENDED, Seen, Unreachable, judge
from alpaca_ray.cluster.pipeline import OUTAGE_S, Pipeline, StageFailed, Stopped
from alpaca_ray.cluster.stage_jobs import JOB_CONFIG, OwnJob, stage_entrypoint
from alpaca_ray.config import STAGES, Placement, RunConfig, UserError, result_fields
from alpaca_ray.lint.together import of_recipe, unmet
from alpaca_ray.settings import load_config

DONE = Seen("SUCCEEDED", 1.0, 2.0, 0)
KILLED = Seen("FAILED", 1.0, 2.0, -9, "JOB_ENTRYPOINT_COMMAND_ERROR", "Job entrypoint command failed\nand its log")
SUPERVISOR_DIED = Seen("FAILED", 1.0, 2.0, None, "JOB_SUPERVISOR_ACTOR_DIED", "Job supervisor actor died: ...")
USER_ERROR = Seen("FAILED", 1.0, 2.0, 2, "JOB_ENTRYPOINT_COMMAND_ERROR", "")
STOPPED = Seen("STOPPED", 1.0, 2.0)
FORGOTTEN = Seen("FAILED", message="forgotten")  # the table then has no such job
INPUTS = dict.fromkeys(STAGES, lambda _run, _config: {"from": "0123"})
LIFE = 3  # looks until a job ends


class Killed(BaseException):
    """SIGKILL to the pipeline: nothing of it runs any more."""


def die() -> None:
    raise Killed


class Cluster:
    """Ray's job table. Jobs end as `outcomes` say, in order, then well; a job that ends well leaves its manifest."""

    def __init__(self, run: RunDirectory, config: RunConfig, outcomes: list[Seen] | None = None) -> None:
        self.run, self.config, self.outcomes = run, config, list(outcomes or [])
        self.table: dict[str, Seen] = {}
        self.left: dict[str, int] = {}
        self.drivers: dict[str, Placement | None] = {}
        self.before: Callable[[str], None] = lambda _: None  # is told the name of each call
        self.lose_answers = False
        self.lock = threading.RLock()

    def submit(self, submission_id: str, entrypoint: str, driver: Placement | None) -> None:
        self.before("submit")
        with self.lock:
            if submission_id in self.table:
                raise Unreachable(f"Job with submission_id {submission_id} already exists")
            stage = submission_id.partition("-")[0]
            assert not self.running(stage), "two jobs of one stage at once"
            assert not self.run.exists(f"{stage}/manifest.json"), "a finished stage is repeated"
            self.table[submission_id], self.left[submission_id] = Seen("RUNNING", 1.0), LIFE
            self.drivers[stage] = driver
        if self.lose_answers:
            raise Unreachable("read timed out")

    def find(self, prefix: str) -> dict[str, Seen]:
        self.before("find")
        with self.lock:
            return {name: seen for name, seen in self.table.items() if name.startswith(prefix)}

    def look(self, submission_id: str) -> Seen | None:
        self.before("look")
        with self.lock:
            seen = self.table.get(submission_id)
            if seen is not None and seen.status not in ENDED:
                self.left[submission_id] -= 1
                if self.left[submission_id] == 0:
                    self.end(submission_id)
            return self.table.get(submission_id)

    def end(self, submission_id: str) -> None:
        outcome = self.outcomes.pop(0) if self.outcomes else DONE
        self.table[submission_id] = outcome
        if outcome == FORGOTTEN:
            del self.table[submission_id]
        if outcome == DONE:
            write_manifest(self.run, self.config, submission_id.partition("-")[0])

    def stop(self, submission_id: str) -> bool:
        self.before("stop")
        with self.lock:
            if submission_id in self.running(""):
                self.table[submission_id] = STOPPED
                return True
            return False

    @contextlib.contextmanager
    def log(self, submission_id: str, write: Callable[[str], None]) -> Iterator[None]:
        write(f"log of {submission_id}")
        yield

    def running(self, stage: str) -> list[str]:
        return [name for name, seen in self.table.items() if name.startswith(stage) and seen.status not in ENDED]

    def submitted(self) -> Counter[str]:
        return Counter(name.partition("-")[0] for name in self.left)


def write_manifest(run: RunDirectory, config: RunConfig, stage: str) -> None:
    manifest = {
        "config": result_fields(getattr(config, stage)), "inputs": {"from": "0123"}, "wall_time_s": 1.5,
        "counts": {"kept": 12, "usd": 0.25}, "finished_at": "2026-11-23T12:00:00+00:00",
    }  # fmt: skip
    run.write_json(f"{stage}/manifest.json", manifest)


class Clock:
    """Seconds that pass only where somebody waits."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


CONFIG = load_config(["--recipe", "tiny_cpu"])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path), "tiny_cpu")


def pipeline(cluster: Cluster, clock: Clock | None = None, said: list[str] | None = None) -> Pipeline:
    clock = clock or Clock()
    commands = {stage: ["python", f"jobs/{stage}.py", "--name", "a b"] for stage in STAGES}
    lines = list[str]() if said is None else said
    return Pipeline(
        cluster.run,
        cluster.config,
        cluster,
        commands,
        INPUTS,
        now_s=lambda: clock.now_s,
        sleep=clock.sleep,
        say=lines.append,
    )


def stop(which: Pipeline) -> None:
    which.stop.is_set = True


def attempts(run: RunDirectory) -> list[tuple[str, int, str]]:
    return [(a.stage, a.number, a.state) for a in ledger.read(run).attempts]


def test_the_stages_are_made_in_order_and_never_again(run: RunDirectory) -> None:
    cluster, said = Cluster(run, CONFIG), list[str]()
    pipeline(cluster, said=said).make_all()
    assert attempts(run) == [(stage, 1, "succeeded") for stage in STAGES]
    assert [name.partition("-")[0] for name in cluster.table] == list(STAGES)
    assert ledger.read(run).attempts[0].usd == 0.25
    assert any(line.startswith("[train] log of train-") for line in said)

    pipeline(cluster).make_all()
    pipeline(Cluster(run, CONFIG)).make_all()  # nor on a cluster that knows nothing of them
    assert cluster.submitted() == Counter(STAGES)


def test_a_lost_driver_is_tried_again_and_told(run: RunDirectory) -> None:
    cluster, said = Cluster(run, CONFIG, [KILLED, SUPERVISOR_DIED, DONE, FORGOTTEN]), list[str]()
    pipeline(cluster, said=said).make_all()
    assert attempts(run) == [
        ("generate", 1, "failed"), ("generate", 2, "failed"), ("generate", 3, "succeeded"),
        ("train", 1, "lost"), ("train", 2, "succeeded"), ("evaluate", 1, "succeeded"),
    ]  # fmt: skip
    assert ledger.read(run).attempts[0].reason == "the driver was killed by SIGKILL"
    assert any("try 1 of 3: the driver was killed by SIGKILL" in line for line in said)


def test_attempts_are_limited_and_the_next_pipeline_has_its_own(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG, [KILLED] * 3)
    with pytest.raises(StageFailed, match=r"generate failed 3 times \(pipeline.max_attempts\)"):
        pipeline(cluster).make_all()
    pipeline(cluster).make_all()
    assert cluster.submitted() == Counter(generate=4, train=1, evaluate=1)


def test_what_a_user_has_to_mend_is_not_tried_again(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG, [DONE, USER_ERROR])
    with pytest.raises(UserError, match="stage train: exit code 2"):
        pipeline(cluster).make_all()
    assert cluster.submitted() == Counter(generate=1, train=1)


def test_a_stopped_stage_is_no_success_and_is_not_tried_again(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG, [STOPPED])
    with pytest.raises(StageFailed, match="the job was stopped"):
        pipeline(cluster).make_all()
    assert attempts(run) == [("generate", 1, "stopped")]


def test_a_job_that_ends_well_without_a_manifest_has_failed(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG, [Seen("SUCCEEDED", 1.0, 2.0, 0, message="an empty script")] * 3)
    with pytest.raises(StageFailed, match="left no manifest"):
        pipeline(cluster).make_all()


def test_a_run_of_another_config_is_refused_before_a_job_is_submitted(run: RunDirectory) -> None:
    write_manifest(run, load_config(["--recipe", "tiny_cpu", "--generate.seed", "1"]), "generate")
    cluster = Cluster(run, CONFIG)
    with pytest.raises(UserError, match=r"generate.seed: 1 there, 0 now"):
        pipeline(cluster).make_all()
    assert not cluster.table


def test_drivers_ask_for_what_the_config_says(run: RunDirectory) -> None:
    config = load_config(["--recipe", "tiny_cpu", "--pipeline.drivers", '{"train": {"num_cpus": 2}}'])
    cluster = Cluster(run, config)
    pipeline(cluster).make_all()
    assert cluster.drivers == {"generate": None, "train": Placement(num_cpus=2), "evaluate": None}


def test_a_driver_for_whom_there_is_no_node_is_found_by_lint() -> None:
    asked = '{"generate": {"num_cpus": 9, "label_selector": {"group": "generate"}}}'
    config = load_config(["--recipe", "tiny_cpu", "--pipeline.drivers", asked])
    groups = [Group("generate", {"group": "generate"}, {"CPU": 8.0}, 4)]
    [(path, says)] = unmet(of_recipe(config), groups, "cluster.yaml")
    assert path == ("pipeline", "drivers", "generate", "num_cpus")
    assert "9 CPU for one worker" in says


def test_a_stopped_pipeline_stops_its_stage_and_the_next_goes_on(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG)
    first = pipeline(cluster)
    cluster.before = lambda call: stop(first) if call == "look" and cluster.running("train") else None
    with pytest.raises(Stopped):
        first.make_all()
    assert not cluster.running("")
    assert attempts(run) == [("generate", 1, "succeeded"), ("train", 1, "stopped")]
    cluster.before = lambda _: None
    pipeline(cluster).make_all()
    assert cluster.submitted() == Counter(generate=1, train=2, evaluate=1)


def test_a_pipeline_that_is_stopped_before_it_has_looked_stops_what_a_dead_one_left(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG)
    cluster.before = lambda call: die() if call == "look" and cluster.running("train") else None
    with pytest.raises(Killed):
        pipeline(cluster).make_all()
    assert cluster.running("train")
    cluster.before = lambda _: None
    second = pipeline(cluster)
    stop(second)
    with pytest.raises(Stopped):
        second.make_all()
    assert not cluster.running("")
    assert attempts(run)[-1] == ("train", 1, "stopped")


def test_a_pipeline_that_is_stopped_while_it_submits_leaves_no_job_behind(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG)
    first = pipeline(cluster)
    cluster.before = lambda call: stop(first) if call == "submit" else None
    with pytest.raises(Stopped):
        first.make_all()
    assert cluster.submitted() == Counter(generate=1)
    assert not cluster.running("")


def test_a_lost_answer_is_no_second_job(run: RunDirectory) -> None:
    cluster = Cluster(run, CONFIG)
    cluster.lose_answers = True
    pipeline(cluster).make_all()
    assert cluster.submitted() == Counter(STAGES)


def test_an_outage_of_the_head_is_waited_for_up_to_a_limit(run: RunDirectory) -> None:
    cluster, clock = Cluster(run, CONFIG), Clock()
    last_s = clock.now_s + OUTAGE_S / 2

    def away(_: str) -> None:
        if clock.now_s < last_s:
            raise Unreachable("connection refused")

    cluster.before = away
    pipeline(cluster, clock).make_all()
    last_s = float("inf")
    other = Cluster(open_run(str(Path(run.root).parent), "other"), CONFIG)
    other.before = away
    with pytest.raises(StageFailed, match="no answer for 900 s: connection refused"):
        pipeline(other, clock).make_all()


def test_a_job_of_a_cluster_that_is_gone_is_lost_and_one_that_lives_is_left_alone(run: RunDirectory) -> None:
    there = Cluster(run, CONFIG)

    def die(call: str) -> None:
        if call == "look" and ledger.read(run).attempts:
            raise Killed

    there.before = die
    with pytest.raises(Killed):
        pipeline(there).make_all()
    [before] = ledger.read(run).attempts
    assert before.state == "running"

    class Elsewhere(Clock):
        def sleep(self, duration_s: float) -> None:
            super().sleep(duration_s)
            ledger.put(run, before.model_copy(update={"seen_s": before.seen_s + 15}))

    with pytest.raises(UserError, match="runs on another cluster"):
        pipeline(Cluster(run, CONFIG), Elsewhere()).make_all()

    clock = Clock()
    pipeline(Cluster(run, CONFIG), clock).make_all()
    assert attempts(run)[:2] == [("generate", 1, "lost"), ("generate", 2, "succeeded")]


@pytest.mark.parametrize("seed", range(10))
def test_pipelines_beside_each_other_make_each_stage_once(run: RunDirectory, seed: int) -> None:
    cluster, rng = Cluster(run, CONFIG, [KILLED, DONE, SUPERVISOR_DIED]), random.Random(seed)
    cluster.before = lambda _: time.sleep(rng.random() / 1000)  # another one's turn, anywhere
    failures: list[BaseException] = []

    def make_all() -> None:
        try:
            pipeline(cluster).make_all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures
    assert cluster.submitted() == Counter(generate=2, train=2, evaluate=1)


def test_a_pipeline_that_is_overtaken_follows_the_other_ones_job(run: RunDirectory) -> None:
    class Overtaken(Cluster):
        """Behind the first look at the table another pipeline submits, writes that down, and is killed."""

        is_overtaken = False

        def find(self, prefix: str) -> dict[str, Seen]:
            there = super().find(prefix)
            if not self.is_overtaken:
                self.is_overtaken = True
                self.before = lambda call: die() if call == "look" and ledger.read(run).attempts else None
                with pytest.raises(Killed):
                    pipeline(self).make_all()
                self.before = lambda _: None
            return there

    cluster = Overtaken(run, CONFIG)
    pipeline(cluster).make_all()
    assert cluster.submitted() == Counter(STAGES)


@given(
    outcomes=st.lists(st.sampled_from([DONE, KILLED, SUPERVISOR_DIED, STOPPED, USER_ERROR, FORGOTTEN]), max_size=8),
    seed=st.integers(0, 2**32),
    deadliness=st.floats(0, 0.3),
)
@settings(max_examples=60)
def test_submitted_again_after_any_death_a_run_ends(
    tmp_path_factory: pytest.TempPathFactory, outcomes: list[Seen], seed: int, deadliness: float
) -> None:
    run = open_run(str(tmp_path_factory.mktemp("deaths")), "r")
    cluster, rng, clock = Cluster(run, CONFIG, outcomes), random.Random(seed), Clock()

    def die(_: str) -> None:
        if rng.random() < deadliness:
            raise Killed

    cluster.before = die
    for _ in range(400):
        with contextlib.suppress(Killed, StageFailed, UserError):
            pipeline(cluster, clock).make_all()
            break
    else:
        pytest.fail("it does not end")
    # The cluster's own asserts say that no stage ran twice at a time, and none again after its end.
    assert all(ledger.read(run).last(stage).state == "succeeded" for stage in STAGES)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("seen", "reason", "may_retry"),
    [
        (KILLED, "the driver was killed by SIGKILL", True),
        (Seen("FAILED", exit_code=137), "the driver was killed by SIGKILL", True),
        (Seen("FAILED", exit_code=1), "the driver ended with exit code 1", True),
        (Seen("FAILED", exit_code=200), "the driver ended with exit code 200", True),
        (SUPERVISOR_DIED, "the driver was lost: Job supervisor actor died: ...", True),
        (None, "the cluster has forgotten the job: its head has lost its state", True),
        (USER_ERROR, "exit code 2: the stage's log says what to mend", False),
        (STOPPED, "the job was stopped", False),
        (DONE, None, False),
    ],
)
def test_what_may_be_tried_again(seen: Seen | None, reason: str | None, may_retry: bool) -> None:
    verdict = judge(seen)
    assert (verdict.reason, verdict.may_retry) == (reason, may_retry)


def test_a_reason_holds_no_log() -> None:
    failed = Seen("FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE", message="no package\nfirst line of a log")
    verdict = judge(failed)
    assert not verdict.may_retry
    assert verdict.reason is not None
    assert verdict.reason.endswith("anew: no package")


def test_a_stage_takes_over_the_working_dir_and_no_variable_but_config_values() -> None:
    given = (
        '{"runtime_env": {"working_dir": "gcs://a.zip", "_ray_commit": "x", "env_vars": {"OPENAI_API_KEY": "secret",'
        ' "ALPACA_RAY__TRAIN__SEED": "1", "RAY_worker_niceness": "0"}}, "metadata": {"job_submission_id": "p"}}'
    )
    own = OwnJob.read({JOB_CONFIG: given, "HF_TOKEN": "secret"})
    assert own.runtime_env == {"working_dir": "gcs://a.zip", "env_vars": {"ALPACA_RAY__TRAIN__SEED": "1"}}
    assert own.left_out == ["OPENAI_API_KEY"]
    with pytest.raises(UserError, match="ray job submit"):
        OwnJob.read({})


def test_a_stage_is_called_as_the_pipeline_was() -> None:
    argv = ["/code/jobs/pipeline.py", "--recipe", "tiny_cpu"]
    assert stage_entrypoint("train", argv, "python3") == ["python3", "/code/jobs/train.py", "--recipe", "tiny_cpu"]


def test_a_ledger_that_is_none_is_named_with_what_to_do(run: RunDirectory) -> None:
    run.write_json(ledger.PATH, {"attempts": [{"stage": "generate"}]})
    with pytest.raises(UserError, match=r"pipeline.json: attempts.0.number: Field required. .* take it away"):
        pipeline(Cluster(run, CONFIG)).make_all()
