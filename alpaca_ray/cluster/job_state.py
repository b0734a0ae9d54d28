"""What the pipeline asks of Ray's jobs, and what a job's end means for its stage: done, to be tried again, or not."""

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from alpaca_ray.cluster.ledger import State
from alpaca_ray.config import Placement

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
USER_ERROR_CODE = 2  # a job ends so when a user has something to mend (cli.run_job)
REASON_CHARS = 300

UPLOAD_AGAIN = "its runtime environment cannot be made; submitted again, the pipeline uploads it anew"


class Unreachable(RuntimeError):
    """The dashboard did not answer, or not to the question: it may be starting again."""


@dataclass(frozen=True)
class Seen:
    """A job as Ray's table has it. `status` is PENDING, RUNNING or one of ENDED."""

    status: str
    started_s: float = 0.0
    ended_s: float | None = None
    exit_code: int | None = None  # of the driver; None if it has none, or was never heard of again
    error_type: str | None = None
    message: str = ""


class Jobs(Protocol):
    """What the pipeline asks of Ray. All raise Unreachable."""

    def submit(self, submission_id: str, entrypoint: str, driver: Placement | None) -> None:
        """Ask for a job of this id; nothing is said of whether there is one now. `driver` None: on the head."""

    def find(self, prefix: str) -> dict[str, Seen]:
        """All jobs whose id begins so."""

    def look(self, submission_id: str) -> Seen | None:
        """One job; None if the cluster has none of this id."""

    def stop(self, submission_id: str) -> bool:
        """Whether there was something to stop."""

    def log(self, submission_id: str, write: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
        """The job's log goes to `write`, line by line, from its begin and until the context ends."""


@dataclass(frozen=True)
class Verdict:
    """`state`: as the ledger has it. Only a failure may be tried again."""

    state: State
    reason: str | None = None
    may_retry: bool = False
    is_user_error: bool = False


def judge(seen: Seen | None) -> Verdict:
    """The verdict on a job that has ended; None: the cluster does not know it any more."""
    if seen is None:
        return Verdict("lost", "the cluster has forgotten the job: its head has lost its state", may_retry=True)
    if seen.status == "SUCCEEDED":
        return Verdict("succeeded")
    if seen.status == "STOPPED":
        return Verdict("stopped", "the job was stopped")
    return _failure(seen)


def _failure(seen: Seen) -> Verdict:
    if seen.exit_code == USER_ERROR_CODE:
        return Verdict("failed", "exit code 2: the stage's log says what to mend", is_user_error=True)
    if seen.exit_code is not None:
        return Verdict("failed", f"the driver {_ending(seen.exit_code)}", may_retry=True)
    if seen.error_type == "RUNTIME_ENV_SETUP_FAILURE":  # the next try would meet the same
        return Verdict("failed", f"{UPLOAD_AGAIN}: {_first_line(seen.message)}")
    return Verdict("failed", f"the driver was lost: {_first_line(seen.message)}", may_retry=True)


def _ending(exit_code: int) -> str:
    # -9: Ray's child was killed; 137: the shell says so of its own.
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in set(signal.Signals):
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with exit code {exit_code}"


def _first_line(message: str) -> str:
    # Not more: what follows is the end of a log.
    return message.strip().partition("\n")[0][:REASON_CHARS]
