"""pipeline.json in the run directory: every attempt at a stage, what became of it, when, and what it cost.

It is for people and for a pipeline on another cluster. Whether a stage is done, its manifest says; whether its job
runs, Ray does.
"""

from typing import Any, Literal

from pydantic import ValidationError

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import STAGES, Strict, UserError

PATH = "pipeline.json"
HEARTBEAT_S = 15.0  # between two looks that are written down
SILENT_AFTER_S = 60.0  # a running attempt that no pipeline has seen for so long may have no pipeline any more

State = Literal["running", "succeeded", "failed", "stopped", "lost"]


class Attempt(Strict):
    """One job of one stage. Times are Unix times in s; `reason`: why it failed, in a line."""

    stage: str
    number: int
    submission_id: str
    state: State
    started_s: float
    seen_s: float  # when a pipeline last saw it
    ended_s: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    counts: dict[str, Any] | None = None  # those of the manifest
    usd: float | None = None


class Ledger(Strict):
    """All attempts, by stage and number."""

    attempts: tuple[Attempt, ...] = ()

    def last(self, stage: str) -> Attempt | None:
        """The latest attempt at a stage."""
        return max((a for a in self.attempts if a.stage == stage), key=lambda a: a.number, default=None)


def read(run: RunDirectory) -> Ledger:
    """What stands there; empty where there is none. Raises UserError if it is not a ledger of this version."""
    if not run.exists(PATH):
        return Ledger()
    try:
        return Ledger.model_validate_json(run.read_bytes(PATH))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{run.path(PATH)}: {where}: {first['msg']}. The pipeline writes this file; take it away and submit again: "
            "what is done is known by the manifests"
        ) from None


def put(run: RunDirectory, attempt: Attempt) -> None:
    """Add an attempt, or take it in the place of what was known of it; the file is replaced as a whole.

    Two pipelines that follow the same job write the same of it: the later one stands.
    """
    others = [a for a in read(run).attempts if (a.stage, a.number) != (attempt.stage, attempt.number)]
    attempts = sorted([*others, attempt], key=lambda a: (STAGES.index(a.stage), a.number))
    run.write_json(PATH, Ledger(attempts=tuple(attempts)).model_dump(exclude_none=True))
