"""metrics.jsonl, one row a step, and the progress line that goes with it."""

import json
import logging
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from transformers import PreTrainedModel

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import TrainConfig
from alpaca_ray.train.loop import StepMetrics

logger = logging.getLogger(__name__)

PATH = "train/metrics.jsonl"
PROGRESS_EVERY_S = 5.0
# The whole file is written anew each time, since an object store cannot append; a row is about 300 bytes.
WRITE_EVERY_S = 30.0
RECENT_STEPS = 20  # the time left goes by their median, which one slow step does not move


@dataclass(frozen=True)
class Row(StepMetrics):
    """A step of the loop and what the run saw around it. Rank 0 measures; None: not measured at this step."""

    num_workers: int = 1
    heldout_loss: float | None = None  # after the step, nats per target token
    mfu: float | None = None  # share of the devices' peak that useful tokens took; needs train.peak_tflops
    data_wait_s: float = 0.0  # of the step's time, until its examples were read
    checkpoint_stall_s: float = 0.0  # that training stood still for a checkpoint, just before the step
    memory_gb: float | None = None  # most so far: of the GPU's, else resident in the worker


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

    def add(self, row: Row) -> None:
        """Keep the row; write the file and log the progress if that was not done for a while."""
        self.rows.append(row)
        if self._now_s() - self._shown_s >= PROGRESS_EVERY_S or row.step == self._num_steps:
            logger.info(progress(self.rows[-RECENT_STEPS:], self._num_steps))
            self._shown_s = self._now_s()
        if self._now_s() - self._written_s >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        lines = [json.dumps({name: v for name, v in asdict(row).items() if v is not None}) + "\n" for row in self.rows]
        self._run.write_bytes(PATH, "".join(lines).encode())
        self._written_s = self._now_s()


def read(run: RunDirectory) -> list[Row]:
    """The rows written so far, in order."""
    if not run.exists(PATH):
        return []
    known = {field.name for field in fields(Row)}  # a resumed run may have rows of another version
    lines = [json.loads(line) for line in run.read_bytes(PATH).decode().splitlines()]
    return [Row(**{name: value for name, value in line.items() if name in known}) for line in lines]


def progress(recent: Sequence[Row], num_steps: int) -> str:
    """Step, losses, speed, and the time left if each step takes as long as the middle one of the recent."""
    last = recent[-1]
    middle_s = sorted(row.step_time_s for row in recent)[len(recent) // 2]
    left_s = round((num_steps - last.step) * middle_s)
    heldout = "" if last.heldout_loss is None else f", held-out {last.heldout_loss:.4f}"
    mfu = "" if last.mfu is None else f", MFU {last.mfu:.1%}"
    left = f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d} left"
    return f"step {last.step}/{num_steps}: loss {last.loss:.4f}{heldout}, {last.tokens_per_s:.0f} tokens/s{mfu}, {left}"


def flops_per_token(model: PreTrainedModel, mean_length: float) -> float:
    """Floating-point operations of a training step per token, forward and backward.

    2 per weight forward, 2 for the gradient of the activations, 2 for that of a trained weight (Kaplan et al. 2020,
    section 2.1); plus attention over half of the document on average, 6 x layers x width x length (Chowdhery et al.
    2022, appendix B, halved for the causal mask). A lookup in the embedding table is none; a tied table is the head.
    `mean_length`: of a token's document, in tokens. Recomputed activations do not count: MFU, not HFU.
    """
    config = model.config
    lookup = model.get_input_embeddings().weight
    is_head = getattr(model.get_output_embeddings(), "weight", None) is lookup  # type: ignore[no-untyped-call]
    used = [p for p in model.parameters() if is_head or p is not lookup]
    weights = sum(p.numel() for p in used)
    trained = sum(p.numel() for p in used if p.requires_grad)
    return float(4 * weights + 2 * trained + 6 * config.num_hidden_layers * config.hidden_size * mean_length)


def utilization(row: StepMetrics, flops: float, num_workers: int, config: TrainConfig) -> float | None:
    """MFU of a step at `flops` per token; None without `peak_tflops`."""
    if config.peak_tflops is None:
        return None
    return row.tokens_per_s * flops / (config.peak_tflops * 1e12 * num_workers)


def memory_gb() -> float:
    """The most that was in use so far: the GPU's memory where there is one, else the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
