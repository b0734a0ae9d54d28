"""[RAY TRAIN] Split and encode the dataset, then have a group of workers train on it and export the model."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group

from alpaca_ray import models
from alpaca_ray.artifacts import RunDirectory, Stage
from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.inputs import of_train
from alpaca_ray.schema import EXAMPLE_SCHEMA, Example
from alpaca_ray.train import checkpoint, deepspeed, metrics, report, trackers
from alpaca_ray.train.elastic import StartLimit, no_room
from alpaca_ray.train.encoding import ENCODED_SCHEMA, REJECT_SCHEMA, Encoded, Encoder
from alpaca_ray.train.loop import StepMetrics
from alpaca_ray.train.order import split
from alpaca_ray.train.worker import Job, train_worker

log = logging.getLogger("alpaca_ray")

HELDOUT = "train/heldout.parquet"
ENCODED = "train/encoded.parquet"
ENCODED_HELDOUT = "train/heldout_encoded.parquet"
REJECTS = "train/rejects.parquet"
REPORT = "train/report.html"
GROW_EVERY_S = 60.0  # an elastic run looks for more room as often; to grow costs the steps since the last checkpoint
# How long one try waits for the workers' resources. A try that counted on a node that is gone waits in vain, and the
# next one counts anew.
GROUP_START_TIMEOUT_S = 15.0


def inputs(run: RunDirectory) -> dict[str, str]:
    """What the stage starts from. Raises UserError if there is no finished dataset."""
    return of_train(run)


def train(
    stage: Stage,
    on_step: Callable[[StepMetrics], None] = lambda _: None,
    view: Callable[[Sequence[Encoded]], Sequence[Encoded]] = lambda examples: examples,
    grow_every_s: float = GROW_EVERY_S,
) -> None:
    """Fine-tune, export and write the manifest. A run that was interrupted goes on from its last checkpoint.

    Each worker calls `on_step` after each step, and reads its examples through `view`. Raises UserError for a model
    or dataset that cannot be used, and if there is no room for the workers for `start_timeout_s`, at the start or
    later; ray's TrainingFailedError when the workers failed more often than `max_failures`.
    """
    config = _with_absolute_model(stage.config.train)
    _check_model(config)
    if not ray.is_initialized():
        ray.init()
    if not stage.run.exists(ENCODED):
        _write_encoded(stage.run, config)
    _wait_for_room(config)
    training, heldout = (ray.put(stage.run.read_table(path).combine_chunks()) for path in (ENCODED, ENCODED_HELDOUT))
    model_hash = _fit(Job(config, stage.run, training, heldout, on_step, view), grow_every_s)
    counts = _counts(stage.run)
    facts = {"Counts": counts, "Settings": dict(trackers.flat(config.model_dump(mode="json")))}
    rows = [asdict(row) for row in metrics.read(stage.run)]
    stage.run.write_bytes(REPORT, report.render(rows, facts, f"Training of {stage.config.name}").encode())
    stage.finish(counts, {"model": model_hash})


def _check_model(config: TrainConfig) -> None:
    if config.strategy == "deepspeed":
        deepspeed.refuse(config)
    trackers.check(config.trackers)
    models.check(config.base_model)
    longest = models.load_config(config.base_model).max_position_embeddings
    if config.max_length > longest:
        raise UserError(
            f"train.max_length is {config.max_length}, but {config.base_model} takes {longest} tokens at most"
        )
    if models.load_tokenizer(config.base_model).eos_token_id is None:
        raise UserError(f"the tokenizer of {config.base_model} has no end-of-sequence token: no answer could end")


def _with_absolute_model(config: TrainConfig) -> TrainConfig:
    # Ray Train gives its workers a working directory of their own.
    path = Path(config.base_model).expanduser()
    return config.model_copy(update={"base_model": str(path.absolute())}) if path.is_dir() else config


def _write_encoded(run: RunDirectory, config: TrainConfig) -> None:
    dataset = run.read_table("generate/dataset.parquet").select(EXAMPLE_SCHEMA.names).to_pylist()
    training, heldout = split([Example(**row) for row in dataset], config.heldout_fraction)
    rows = _encode([*training, *heldout], config)
    is_heldout = {example.id for example in heldout}
    rejects = pa.Table.from_pylist(
        [r for r in rows if r["reason"] is not None and r["id"] not in is_heldout], schema=REJECT_SCHEMA
    )
    usable = [r for r in rows if r["reason"] is None]
    encoded = pa.Table.from_pylist([r for r in usable if r["id"] not in is_heldout], schema=ENCODED_SCHEMA)
    run.write_table(HELDOUT, pa.Table.from_pylist([asdict(e) for e in heldout], schema=EXAMPLE_SCHEMA))
    run.write_table(
        ENCODED_HELDOUT, pa.Table.from_pylist([r for r in usable if r["id"] in is_heldout], schema=ENCODED_SCHEMA)
    )
    run.write_table(REJECTS, rejects)
    reasons = dict(Counter(rejects["reason"].to_pylist()))
    log.info(
        "encoded %d examples; held out %d; rejected %d %s", len(encoded), len(heldout), len(rejects), reasons or ""
    )
    if len(encoded) == 0:
        raise UserError(
            f"no example is left to train on; rejected: {reasons}. Raise train.max_length, now {config.max_length}"
        )
    run.write_table(ENCODED, encoded)  # last: where it stands, the others do


def _encode(examples: list[Example], config: TrainConfig) -> list[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # Of every task, and of what Ray Data asks the autoscaler for: without it they start whichever nodes are cheapest.
    context.execution_options.label_selector = dict(config.placement.label_selector) or None
    table = pa.Table.from_pylist([asdict(e) for e in examples], schema=EXAMPLE_SCHEMA)
    rows = ray.data.from_arrow(table).map_batches(
        Encoder,
        fn_constructor_kwargs={
            "base_model": config.base_model,
            "prompt_format": "alpaca",
            "max_length": config.max_length,
        },
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),  # 52K examples take it about a minute
        num_cpus=1,
    )
    return sorted(rows.take_all(), key=lambda row: row["id"])


def _wait_for_room(config: TrainConfig) -> None:
    """Have the workers' resources placed once before Ray Train is asked for them, which says too little too late.

    Ray frees a placement group with its driver, so a killed job leaves the autoscaler no demand behind.
    """
    bundle, selector, num_workers = _resources(config), dict(config.placement.label_selector), config.workers[0]
    timeout_s = config.start_timeout_s
    group = placement_group([bundle] * num_workers, bundle_label_selector=[selector] * num_workers)
    try:
        if group.wait(min(timeout_s, 5.0)):
            return
        log.info("waiting up to %.0f s for room for %s", timeout_s, _wanted(config))
        if not group.wait(timeout_s):
            raise UserError(no_room(_wanted(config), timeout_s))
    finally:
        remove_placement_group(group)


def _wanted(config: TrainConfig) -> str:
    selector = dict(config.placement.label_selector)
    return f"{config.workers[0]} workers of {_resources(config)}" + (f" on nodes with {selector}" if selector else "")


def _resources(config: TrainConfig) -> dict[str, float]:
    wanted = {"CPU": config.placement.num_cpus, "GPU": config.placement.num_gpus}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def _fit(job: Job, grow_every_s: float) -> str:
    """Run the workers and return the exported model's hash."""
    _forget_rays_checkpoints(job.run)
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(min(GROUP_START_TIMEOUT_S, job.config.start_timeout_s))
    )
    try:
        answer: dict[str, str] = _trainer(job, grow_every_s).fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        cause = getattr(error, "controller_failure", None)
        if isinstance(cause, UserError):
            raise cause from None
        error.add_note(f"What was done is kept in {job.run.path('train')}: the same command again goes on from there.")
        raise
    if "failure" in answer:
        raise UserError(answer["failure"])
    return answer["model"]


def _trainer(job: Job, grow_every_s: float) -> TorchTrainer:
    config = job.config
    on_gpu = config.placement.num_gpus > 0
    fewest, most = config.workers
    # ray.train's type hints are those of its first version: label_selector and others are new in the second.
    return TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=grow_every_s,  # type: ignore[call-arg]
            use_gpu=on_gpu,
            resources_per_worker=_resources(config),
            label_selector=dict(config.placement.label_selector) or None,
        ),
        run_config=ray.train.RunConfig(
            name=Path(checkpoint.ROOT).name,
            storage_path=job.run.path("train"),
            storage_filesystem=job.run.fs,
            # StartLimit bounds the tries to start the workers by time, preemptions are not the run's fault
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[StartLimit(_wanted(config), config.start_timeout_s)],  # type: ignore[list-item]
        ),
    )


def _forget_rays_checkpoints(run: RunDirectory) -> None:
    # checkpoint.py keeps its own marks. Ray's list is written in place, so a kill can leave half of it, and names
    # checkpoints that were since removed; the next start would end at either.
    for name in run.files(checkpoint.ROOT, ".json"):
        run.fs.delete_file(run.path(name))


def _counts(run: RunDirectory) -> dict[str, Any]:
    rows = metrics.read(run)
    num_tokens = sum(row.tokens_per_s * row.step_time_s for row in rows)
    return {
        "examples": len(run.read_table(ENCODED)),
        "heldout": len(run.read_table(HELDOUT)),
        "rejected": len(run.read_table(REJECTS)),
        "steps": rows[-1].step,
        "first_loss": round(rows[0].loss, 4),
        "last_loss": round(rows[-1].loss, 4),
        "target_tokens": sum(row.target_tokens for row in rows),
        "tokens_per_s": round(num_tokens / sum(row.step_time_s for row in rows), 1),
    }
