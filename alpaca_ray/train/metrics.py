"""metrics.jsonl, one row a step, and the progress line that goes with it."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.train.loop import StepMetrics

logger = logging.getLogger(__name__)

PATH = "train/metrics.jsonl"
PROGRESS_EVERY_S = 5.0
# The whole file is written anew each time, since an object store cannot append; a row is about 150 bytes.
WRITE_EVERY_S = 30.0


class MetricsLog:
    """Takes each step's metrics. Rows after `first_step`, of steps that a resumed run does again, are dropped."""

    def __init__(
        self, run: RunDirectory, first_step: int, num_steps: int, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.rows = [row for row in read(run) if row.step <= first_step]
        self._run = run
        self._num_steps = num_steps
        self._now_s = now_s
        self._written_s = self._shown_s = -float("inf")

    def add(self, row: StepMetrics) -> None:
        """Keep the row; write the file and log the progress if that was not done for a while."""
        self.rows.append(row)
        if self._now_s() - self._shown_s >= PROGRESS_EVERY_S or row.step == self._num_steps:
            logger.info(progress(row, self._num_steps))
            self._shown_s = self._now_s()
        if self._now_s() - self._written_s >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        lines = [json.dumps(asdict(row)) + "\n" for row in self.rows]
        self._run.write_bytes(PATH, "".join(lines).encode())
        self._written_s = self._now_s()


def read(run: RunDirectory) -> list[StepMetrics]:
    """The rows written so far, in order."""
    if not run.exists(PATH):
        return []
    return [StepMetrics(**json.loads(line)) for line in run.read_bytes(PATH).decode().splitlines()]


def progress(row: StepMetrics, num_steps: int) -> str:
    """Step, loss, speed, and the time left if all steps take as long as this one."""
    left_s = round((num_steps - row.step) * row.step_time_s)
    left = f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"
    return f"step {row.step}/{num_steps}: loss {row.loss:.4f}, {row.tokens_per_s:.0f} tokens/s, {left} left"
