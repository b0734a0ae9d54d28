"""[RAY TRAIN] What each worker runs: the loop, and around its steps the metrics, checkpoints and notices of a drain."""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.train import CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero
from ray.util.metrics import Gauge
from transformers.utils import logging as transformers_logging

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.train import card, checkpoint, estimate, export, loop, metrics, model
from alpaca_ray.train.checkpoint import Pending, Shelf
from alpaca_ray.train.deepspeed import DeepSpeed
from alpaca_ray.train.encoding import Encoded
from alpaca_ray.train.examples import Examples
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.heldout import heldout_loss
from alpaca_ray.train.loop import StepMetrics
from alpaca_ray.train.metrics import MetricsLog, Row
from alpaca_ray.train.strategy import Strategy
from alpaca_ray.train.trackers import Trackers

log = logging.getLogger("alpaca_ray")

MODEL = "train/model"
TENSORBOARD = "train/tensorboard"
NOTICES_EVERY_S = 2.0  # asking is a barrier over all ranks of some 10 ms; a cloud gives 30 to 120 s notice
GAUGES = ("step", "loss", "heldout_loss", "grad_norm", "tokens_per_s", "mfu", "checkpoint_stall_s", "memory_gb")


@dataclass(frozen=True)
class Job:
    """What every worker needs to know. The tables lie in Ray's object store, once on each node."""

    config: TrainConfig
    run: RunDirectory
    training: "ray.ObjectRef[pa.Table]"
    heldout: "ray.ObjectRef[pa.Table]"
    on_step: Callable[[StepMetrics], None]  # called on every rank after each step, to watch the run
    view: Callable[[Sequence[Encoded]], Sequence[Encoded]]  # through which every rank reads its examples


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is not."""

    training: Examples
    heldout: Examples


def train_worker(loop_config: dict[str, Any]) -> dict[str, str]:
    """Rank 0's answer counts: the exported model's hash, or why training cannot go on."""
    job: Job = loop_config["job"]
    _quieten()
    data = Data(Examples(ray.get(job.training)), Examples(ray.get(job.heldout)))
    try:
        state, flops = _build(job.config, data.training.mean_length)
    except UserError as error:  # another try would end the same
        return {"failure": str(error)}
    shelf = Shelf(job.run, job.config.checkpoints_to_keep, job.config.keep_best)
    _resume(state, job.run, shelf)
    rounds = Rounds(job, state, shelf, data, flops)
    try:
        loop.train(state, job.view(data.training), job.config, rounds.on_step, rounds.checkpoint)
    except loop.NotFinite as error:
        # An answer, not an exception: every rank has it, and to try again would end the same.
        return {"failure": str(error)}
    finally:
        rounds.close()
    rounds.wait()
    return {"model": _export(state, job)}


class Rounds:
    """One worker's part in what is done between the steps. All ranks do the same in the same order."""

    def __init__(self, job: Job, state: Strategy, shelf: Shelf, data: Data, flops: float) -> None:
        self._job, self._state, self._shelf = job, state, shelf
        self._training, self._heldout, self._flops = data.training, data.heldout, flops
        self._world_size = ray.train.get_context().get_world_size()
        self._is_first = ray.train.get_context().get_world_rank() == 0
        self._num_steps = loop.total_steps(len(data.training), job.config)
        self._rows = MetricsLog(job.run, state.step, self._num_steps) if self._is_first else None
        self._gauges = _gauges() if self._is_first else {}
        self._tracking = _Tracking(job) if self._is_first else None
        self._pending: Pending | None = None
        self._stall_s = 0.0
        self._heldout_loss: tuple[int, float] | None = None  # (step, loss), the last that was taken
        self._saved_step = state.step
        self._notices = Notices()

    def on_step(self, step: StepMetrics) -> None:
        """Take the step's metrics and the held-out loss where it is due; save at once if a node is to go."""
        loss = self._evaluate(step.step) if self._evaluates_at(step.step) else None
        if self._rows is not None:
            self._add(self._rows, step, loss)
        self._stall_s = self._training.read_s = 0.0
        self._job.on_step(step)
        if self._notices.ask(step.step):
            log.warning("a node is about to go: checkpoint at step %d", step.step)
            self.checkpoint()
            self.wait()

    def checkpoint(self) -> None:
        """Begin a checkpoint of this step; the last one must have come to its end. Collective."""
        if self._saved_step == self._state.step:
            return
        started_s = time.perf_counter()
        self.wait()
        self.write()  # before the checkpoint: a resumed run does not make these rows again
        self._begin()
        self._stall_s += time.perf_counter() - started_s

    def wait(self) -> None:
        """Until no checkpoint is being written. Raises what the writing raised."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def write(self) -> None:
        """The rows so far, to the run."""
        if self._rows is not None:
            self._rows.write()

    def close(self) -> None:
        """The rows and what trackers hold, to where they belong."""
        self.write()
        if self._tracking is not None:
            self._tracking.close()

    def _begin(self) -> None:
        step = self._state.step
        scored = self._heldout_loss is not None and self._heldout_loss[0] == step
        loss = self._heldout_loss[1] if scored and self._heldout_loss is not None else None
        pending = checkpoint.begin(self._state, self._job.run, self._shelf, loss)
        self._pending, self._saved_step = pending, step
        stored = ray.train.Checkpoint(self._shelf.path(step), filesystem=self._job.run.fs)

        def upload(_local: ray.train.Checkpoint, _name: str) -> ray.train.Checkpoint:
            pending.finish()
            return stored

        ray.train.report(
            {"step": step},
            stored,
            checkpoint_dir_name=Path(stored.path).name,
            checkpoint_upload_mode=_upload_mode(self._job.config),
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # on a local filesystem this is where it stays
        )

    def _evaluates_at(self, step: int) -> bool:
        config = self._job.config
        every = config.evaluate_every_steps or config.checkpoint_every_steps
        return len(self._heldout) > 0 and (step % every == 0 or step == self._num_steps)

    def _evaluate(self, step: int) -> float:
        loss = heldout_loss(self._state, self._heldout, self._job.config)
        self._heldout_loss = (step, loss)
        return loss

    def _add(self, rows: MetricsLog, step: StepMetrics, loss: float | None) -> None:
        row = Row(
            **asdict(step),
            num_workers=self._world_size,
            heldout_loss=loss,
            mfu=metrics.utilization(step, self._flops, self._world_size, self._job.config),
            data_wait_s=self._training.read_s,
            checkpoint_stall_s=self._stall_s,
            memory_gb=metrics.memory_gb(),
        )
        rows.add(row)
        if self._tracking is not None:
            self._tracking.log(row)
        for name, gauge in self._gauges.items():
            value = getattr(row, name)
            if value is not None:
                gauge.set(value)


class _Tracking:
    """The run's trackers. TensorBoard writes files: beside the run's others where these lie on a shared disk, else they
    are uploaded at the end, those of the last try only. metrics.jsonl has all.
    """

    def __init__(self, job: Job) -> None:
        self._run, self._local = job.run, None if checkpoint.is_shared(job.run) else tempfile.TemporaryDirectory()
        self._directory = Path(self._local.name if self._local else job.run.path(TENSORBOARD))
        settings = job.config.model_dump(mode="json")
        self._trackers = Trackers.start(job.config.trackers, Path(job.run.root).name, settings, self._directory)

    def log(self, row: Row) -> None:
        values = asdict(row)
        self._trackers.log(values.pop("step"), values)

    def close(self) -> None:
        self._trackers.close()
        if self._local is not None:
            self._run.upload(self._directory, TENSORBOARD)
            self._local.cleanup()


class Notices:
    """Asks now and then whether a node of the group is about to be taken away."""

    def __init__(self) -> None:
        self._next_step = 0
        self._asked: tuple[int, float] | None = None  # (step, when), the last time
        self._seen: Any = None

    def ask(self, step: int) -> bool:
        """True once for each notice, on all ranks after the same step. Collective."""
        if step < self._next_step:
            return False
        info = ray.train.get_preemption_info()
        # Rank 0's clock decides for all: each rank measures another time.
        pause: int = broadcast_from_rank_zero(self._pause(step, time.monotonic()))
        self._next_step = step + pause
        is_new = info is not None and info != self._seen
        self._seen = info
        return is_new

    def _pause(self, step: int, now_s: float) -> int:
        """Steps until the next time, by the pace since the last: data, evaluation and checkpoints take time too."""
        last, self._asked = self._asked, (step, now_s)
        if last is None:
            return 1
        return max(1, int(NOTICES_EVERY_S * (step - last[0]) / (now_s - last[1])))


def _build(config: TrainConfig, mean_length: float) -> tuple[Strategy, float]:
    """The strategy that the config names, and the operations that a token takes."""
    on_gpu, context = config.placement.num_gpus > 0, ray.train.get_context()
    if on_gpu:
        estimate.refuse_unfit(
            config, estimate.shapes_of(config.base_model), torch.cuda.get_device_properties(0).total_memory
        )
    else:
        _prepare_cpu(config)
    if config.strategy == "deepspeed":
        plain = model.load(config)
        return DeepSpeed(plain, config), metrics.flops_per_token(plain, mean_length)
    plain = model.load(config, with_weights=context.get_world_rank() == 0)  # the others get their parts of it
    flops = metrics.flops_per_token(plain, mean_length)
    return Fsdp(plain, config, model.make_mesh("cuda" if on_gpu else "cpu", context.get_world_size())), flops


def _resume(state: Strategy, run: RunDirectory, shelf: Shelf) -> None:
    """From our own marks, not from Ray's list of checkpoints: that one does not know what a dead try has left."""
    last = checkpoint.choose(shelf)
    if last is None:
        return
    with _as_directory(run, shelf.path(last.step)) as directory:
        state.load(Path(directory))
    log.info("going on after step %d", state.step)


def _as_directory(run: RunDirectory, path: str) -> AbstractContextManager[str]:
    return ray.train.Checkpoint(path, filesystem=run.fs).as_directory()


def _upload_mode(config: TrainConfig) -> CheckpointUploadMode:
    return CheckpointUploadMode.ASYNC if config.checkpoint_async else CheckpointUploadMode.SYNC


def _export(state: Strategy, job: Job) -> str:
    first = ray.train.get_context().get_world_rank() == 0
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) if first else None
        export.write_trained(state, job.config, target)
        if target is None:
            return ""
        card.write(card.collect(job.run, job.config), target)
        job.run.upload(target, MODEL)
        return export.directory_hash(target)


def _gauges() -> dict[str, Gauge]:
    return {name: Gauge(f"alpaca_ray_train_{name}", f"{name} of the training run's last step") for name in GAUGES}


def _prepare_cpu(config: TrainConfig) -> None:
    torch.set_num_threads(max(1, int(config.placement.num_cpus)))  # the workers of a node share its cores
    if config.compute_dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("this CPU has no fast bfloat16: train.compute_dtype float32 takes a seventh of the time here")


def _quieten() -> None:
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
