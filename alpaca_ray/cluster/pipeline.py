"""The stages in order, each as a job of its own, until all are done; after any death the next pipeline goes on.

What is done, the manifests say; what runs, Ray's job table; the ledger tells people, and a pipeline elsewhere. A
stage's job has an id that two pipelines would both give it, and Ray takes each id once: so no stage runs twice at a
time on a cluster, and the second pipeline follows the job of the first.
"""

import contextlib
import hashlib
import logging
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from alpaca_ray.artifacts import RunDirectory, done
from alpaca_ray.cluster import ledger
from alpaca_ray.cluster.job_state import ENDED, Jobs, Seen, Unreachable, Verdict, judge
from alpaca_ray.cluster.ledger import Attempt
from alpaca_ray.config import STAGES, RunConfig, UserError, config_hash

POLL_S = 1.0
OUTAGE_S = 900.0  # how long a head or a storage that does not answer is waited for
RETRY_PAUSE_S = 5.0  # Ray ends what a dead driver left within 1 s or 2
SUBMIT_TRIES = 3
STOP_POLL_S = 0.2
STOP_S = 2.5  # of the 3 s that Ray gives a stopped job

GOES_ON = "Submitted again, the pipeline goes on there"

log = logging.getLogger("alpaca_ray")

Inputs = Mapping[str, Callable[[RunDirectory, RunConfig], Mapping[str, str]]]
T = TypeVar("T")


@dataclass
class Stop:
    """Whether to end. No threading.Event: a signal's handler could wait for ever for the lock that it interrupted."""

    is_set: bool = False


class Stopped(Exception):
    """This pipeline was told to end."""


class StageFailed(RuntimeError):
    """A stage that another try of this pipeline would not make."""


@dataclass
class Pipeline:
    """One run's way through its stages. `commands`: the entrypoint of each stage, `inputs`: what each starts from."""

    run: RunDirectory
    config: RunConfig
    jobs: Jobs
    commands: Mapping[str, Sequence[str]]
    inputs: Inputs
    stop: Stop = field(default_factory=Stop)
    now_s: Callable[[], float] = time.time
    sleep: Callable[[float], object] = time.sleep
    # One write a line: the log's thread speaks too.
    say: Callable[[str], None] = lambda line: print(f"{line}\n", end="", flush=True)

    def make_all(self) -> None:
        """Raises StageFailed, Stopped, and UserError for what a user has to mend."""
        try:
            for stage in STAGES:
                self._make(stage)
        except Stopped:
            self._stop_jobs()
            raise

    def _make(self, stage: str) -> None:
        """Have a stage made, unless it is done: follow its job if one runs, else submit one."""
        self._settle(stage)
        failures: list[Verdict] = []
        while True:
            # In this order. The table is newer than the ledger, so any job that comes later has our number, which Ray
            # takes once. The manifest is looked for last: a job that the table shows as ended well has written it.
            in_ledger = self._patiently(lambda: ledger.read(self.run)).last(stage)
            in_table = self._patiently(lambda: self._in_table(stage))
            if self._is_done(stage):
                return
            number = max([*in_table, in_ledger.number if in_ledger else 0]) + 1
            running = self._running(stage, in_table)
            if running is not None:
                self.say(f"pipeline: {stage} runs already as job {running.submission_id}: following it")
            attempt = running or self._submitted(stage, number)
            verdict = self._followed(attempt)
            if verdict.state == "succeeded" and not self._has_manifest(stage):
                verdict = Verdict("failed", "it ended well and left no manifest", may_retry=True)
            if verdict.state != "succeeded":
                failures.append(verdict)
                self._go_on_or_raise(stage, failures)

    def _is_done(self, stage: str) -> bool:
        manifest = self._patiently(
            lambda: done(self.run, self.config, stage, self.inputs[stage](self.run, self.config))
        )
        if manifest is None:
            return False
        self.say(f"pipeline: {stage} is done ({manifest['wall_time_s']} s); artifacts in {self.run.path(stage)}")
        return True

    def _has_manifest(self, stage: str) -> bool:
        return self._patiently(lambda: self.run.exists(f"{stage}/manifest.json"))

    def _go_on_or_raise(self, stage: str, failures: Sequence[Verdict]) -> None:
        last, most, so_far = failures[-1], self.config.pipeline.max_attempts, len(failures)
        if last.is_user_error:
            raise UserError(f"stage {stage}: {last.reason}. {GOES_ON}")
        if not last.may_retry:
            raise StageFailed(f"stage {stage}, not tried again: {last.reason}. {GOES_ON}")
        if so_far >= most:
            raise StageFailed(f"stage {stage} failed {so_far} times (pipeline.max_attempts): {last.reason}. {GOES_ON}")
        self.say(f"pipeline: {stage} failed, try {so_far} of {most}: {last.reason}; it is submitted again")
        self._wait(RETRY_PAUSE_S)

    # Submitting

    def _prefix(self, stage: str) -> str:
        # The place too: runs of one config in two places are two runs.
        place = f"{config_hash(getattr(self.config, stage))} {self.run.uri or self.run.root}"
        return f"{stage}-{hashlib.sha256(place.encode()).hexdigest()[:16]}-"

    def _in_table(self, stage: str) -> dict[int, Seen]:
        prefix = self._prefix(stage)
        return {int(name.removeprefix(prefix)): seen for name, seen in self.jobs.find(prefix).items()}

    def _running(self, stage: str, in_table: Mapping[int, Seen]) -> Attempt | None:
        """The stage's job that runs, if one does: of a pipeline that died, or of one beside this."""
        numbers = [number for number, seen in in_table.items() if seen.status not in ENDED]
        return self._attempt(stage, max(numbers), in_table[max(numbers)]) if numbers else None

    def _submitted(self, stage: str, number: int) -> Attempt:
        """The stage's next job. Where another pipeline was first, it is that one's."""
        attempt = self._attempt(stage, number, Seen("PENDING", self.now_s()))
        said = ""
        for _ in range(SUBMIT_TRIES):
            self._check_stop()
            said = self._submit(attempt)
            seen = self._patiently(lambda: self.jobs.look(attempt.submission_id))
            if seen is not None:
                return self._attempt(stage, number, seen)
            self._wait(RETRY_PAUSE_S)
        raise StageFailed(f"stage {stage}: Ray takes no job: {said[-2000:]}")

    def _submit(self, attempt: Attempt) -> str:
        """What Ray said against it. It may have taken the job all the same: its table tells."""
        command = shlex.join(self.commands[attempt.stage])
        drivers = {str(stage): placement for stage, placement in self.config.pipeline.drivers.items()}
        self.say(f"pipeline: {attempt.stage}: job {attempt.submission_id}: {command}")
        try:
            self.jobs.submit(attempt.submission_id, command, drivers.get(attempt.stage))
        except Unreachable as error:
            return str(error).strip()
        return ""

    def _settle(self, stage: str) -> None:
        """Write down how an attempt ended that no pipeline saw the end of.

        One that this cluster does not know died with its head, or runs elsewhere: raises UserError if a pipeline there
        still writes of it.
        """
        before = self._patiently(lambda: ledger.read(self.run)).last(stage)
        if before is None or before.state != "running":
            return
        seen = self._patiently(lambda: self.jobs.look(before.submission_id))
        if seen is not None and seen.status not in ENDED:
            return
        verdict = judge(seen)
        if seen is None and self._has_manifest(stage):
            verdict = Verdict("succeeded")
        elif seen is None:
            self._refuse_another_cluster(before)
        self._record(self._outcome(before, seen, verdict))

    def _refuse_another_cluster(self, before: Attempt) -> None:
        self.say(
            f"pipeline: this cluster does not know job {before.submission_id}: looking whether another one runs it"
        )
        self._wait(ledger.SILENT_AFTER_S)
        after = self._patiently(lambda: ledger.read(self.run)).last(before.stage)
        if after != before:
            raise UserError(
                f"job {before.submission_id} of {self.run.root} runs on another cluster, whose pipeline has just "
                "written to pipeline.json. Let it end, or stop it there"
            )

    # Following

    def _followed(self, attempt: Attempt) -> Verdict:
        """Pass the job's log on until it ends; then write down how."""
        self._record(attempt)
        with self.jobs.log(attempt.submission_id, lambda line: self.say(f"[{attempt.stage}] {line}")):
            seen = self._ended(attempt)
        verdict = judge(seen)
        self._record(self._outcome(attempt, seen, verdict))
        return verdict

    def _ended(self, attempt: Attempt) -> Seen | None:
        """The job when it has ended; None if the cluster has forgotten it."""
        written_s = self.now_s()
        while True:
            seen = self._patiently(lambda: self.jobs.look(attempt.submission_id))
            if seen is None or seen.status in ENDED:
                return seen
            if self.now_s() - written_s >= ledger.HEARTBEAT_S:
                written_s = self.now_s()
                self._record(attempt.model_copy(update={"seen_s": written_s}))
            self._wait(POLL_S)

    def _stop_jobs(self) -> None:
        """Stop with this pipeline the job that runs, whoever submitted it. What it did stays, and the next goes on."""
        until_s = self.now_s() + STOP_S
        while self.now_s() < until_s:
            with contextlib.suppress(Unreachable):
                running = [found for stage in STAGES if (found := self._running(stage, self._in_table(stage)))]
                stopped = [attempt for attempt in running if self.jobs.stop(attempt.submission_id)]
                for attempt in stopped:
                    now_s, reason = self.now_s(), "the pipeline was stopped"
                    known = {"state": "stopped", "reason": reason, "seen_s": now_s, "ended_s": now_s}
                    self._record(attempt.model_copy(update=known))
                if len(stopped) == len(running):
                    return
            self.sleep(STOP_POLL_S)  # no supervisor yet: it was submitted a moment ago

    def _attempt(self, stage: str, number: int, seen: Seen) -> Attempt:
        return Attempt(
            stage=stage,
            number=number,
            submission_id=f"{self._prefix(stage)}{number}",
            state="running",
            started_s=seen.started_s,
            seen_s=self.now_s(),
        )

    def _outcome(self, attempt: Attempt, seen: Seen | None, verdict: Verdict) -> Attempt:
        known: dict[str, Any] = {"state": verdict.state, "reason": verdict.reason, "seen_s": self.now_s()}
        if seen is not None:
            known |= {"ended_s": seen.ended_s, "exit_code": seen.exit_code}
        if verdict.state == "succeeded" and self._has_manifest(attempt.stage):
            manifest = self._patiently(lambda: self.run.read_json(f"{attempt.stage}/manifest.json"))
            known |= {"counts": manifest["counts"], "usd": manifest["counts"].get("usd")}
        return attempt.model_copy(update=known)

    def _record(self, attempt: Attempt) -> None:
        """A ledger that cannot be written stops no run: what it says, manifests and job table say too."""
        try:
            ledger.put(self.run, attempt)
        except (OSError, UserError) as error:
            log.warning("pipeline: %s cannot be written: %s", self.run.path(ledger.PATH), error)

    # Waiting

    def _patiently(self, ask: Callable[[], T]) -> T:
        """The answer of a head or a storage that may be away for a while. Raises Stopped, and what it says at last."""
        since_s, pause_s = self.now_s(), POLL_S
        while True:
            self._check_stop()
            try:
                return ask()
            except (Unreachable, OSError) as error:
                if self.now_s() - since_s > OUTAGE_S:
                    raise StageFailed(f"no answer for {OUTAGE_S:.0f} s: {error}. The jobs may go on") from error
                if pause_s == POLL_S:
                    self.say(f"pipeline: no answer ({error}); waiting for up to {OUTAGE_S:.0f} s")
                self._wait(pause_s)
                pause_s = min(2 * pause_s, 10 * POLL_S)

    def _wait(self, duration_s: float) -> None:
        until_s = self.now_s() + duration_s
        self._check_stop()
        while (left_s := until_s - self.now_s()) > 0:
            self.sleep(min(left_s, STOP_POLL_S))
            self._check_stop()

    def _check_stop(self) -> None:
        if self.stop.is_set:
            raise Stopped


@contextlib.contextmanager
def stopped_by_sigterm(stop: Stop) -> Iterator[Stop]:
    """`ray job stop` sends SIGTERM, and SIGKILL after 3 s. A request under way is finished first."""
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(stop, "is_set", True))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
