"""[RAY TRAIN] Split and encode the dataset, then run the training loop on a group of workers and export the model."""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group
from transformers.utils import logging as transformers_logging

from alpaca_ray import models
from alpaca_ray.artifacts import RunDirectory, Stage, finished
from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.schema import EXAMPLE_SCHEMA, Example
from alpaca_ray.train import export, loop, metrics, model
from alpaca_ray.train.encoding import ENCODED_SCHEMA, REJECT_SCHEMA, Encoded, Encoder
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.loop import StepMetrics
from alpaca_ray.train.metrics import MetricsLog
from alpaca_ray.train.order import split
from alpaca_ray.train.strategy import Strategy

log = logging.getLogger("alpaca_ray")

HELDOUT = "train/heldout.parquet"
ENCODED = "train/encoded.parquet"
REJECTS = "train/rejects.parquet"
MODEL = "train/model"
START_TIMEOUT_S = 600.0  # a GPU node takes minutes to come up
CHECKPOINTS_TO_KEEP = 2  # the newest, and the one before as a spare


@dataclass(frozen=True)
class Job:
    """What every worker needs to know. `on_step` is called on every rank after each step, to watch the run."""

    config: TrainConfig
    run: RunDirectory
    on_step: Callable[[StepMetrics], None]


def inputs(run: RunDirectory) -> dict[str, str]:
    """What the stage starts from. Raises UserError if there is no finished dataset."""
    return {"dataset": finished(run, "generate")["outputs"]["dataset.parquet"]}


def train(
    stage: Stage,
    on_step: Callable[[StepMetrics], None] = lambda _: None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Fine-tune, export and write the manifest. A run that was interrupted goes on from its last checkpoint.

    Raises UserError for a model or dataset that cannot be used, and if the cluster has no room for the workers
    within `start_timeout_s`; ray's TrainingFailedError when the workers failed more often than `max_failures`.
    """
    config = _with_absolute_model(stage.config.train)
    _check_model(config)
    if not ray.is_initialized():
        ray.init()
    if not stage.run.exists(ENCODED):
        _write_encoded(stage.run, config)
    _wait_for_room(config, start_timeout_s)
    model_hash = _fit(Job(config, stage.run, on_step))
    stage.finish(_counts(stage.run), {"model": model_hash})


def train_worker(loop_config: dict[str, Any]) -> dict[str, str]:
    """What each worker runs. Rank 0's answer counts: the exported model's hash, or why training cannot go on."""
    job: Job = loop_config["job"]
    config, context = job.config, ray.train.get_context()
    _quieten()
    on_gpu = config.placement.num_gpus > 0
    if not on_gpu:
        _prepare_cpu(config)
    mesh = model.make_mesh("cuda" if on_gpu else "cpu", context.get_world_size())
    state = Fsdp(model.load(config), config, mesh)
    _resume(state)
    examples = [Encoded(**row) for row in job.run.read_table(ENCODED).to_pylist()]
    rows = MetricsLog(job.run, state.step, loop.total_steps(len(examples), config))
    is_first = context.get_world_rank() == 0

    def on_step(row: StepMetrics) -> None:
        if is_first:
            rows.add(row)
        job.on_step(row)

    def on_checkpoint() -> None:
        if is_first:
            rows.write()  # before the checkpoint: a resumed run does not make these rows again
        _save(state)

    try:
        loop.train(state, examples, config, on_step, on_checkpoint)
    except loop.NotFinite as error:
        # An answer, not an exception: every rank has it, and to try again would end the same.
        return {"failure": str(error)}
    return {"model": _export(state, job)}


def _check_model(config: TrainConfig) -> None:
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
    rows = _encode(training, config)
    rejects = pa.Table.from_pylist([r for r in rows if r["reason"] is not None], schema=REJECT_SCHEMA)
    encoded = pa.Table.from_pylist([r for r in rows if r["reason"] is None], schema=ENCODED_SCHEMA)
    run.write_table(HELDOUT, pa.Table.from_pylist([asdict(e) for e in heldout], schema=EXAMPLE_SCHEMA))
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


def _wait_for_room(config: TrainConfig, timeout_s: float) -> None:
    """Have the workers' resources placed once before Ray Train is asked for them, which says too little too late.

    Ray frees a placement group with its driver, so a killed job leaves the autoscaler no demand behind.
    """
    bundle, selector, num_workers = _resources(config), dict(config.placement.label_selector), config.workers[0]
    wanted = f"{num_workers} workers of {bundle}" + (f" on nodes with {selector}" if selector else "")
    group = placement_group([bundle] * num_workers, bundle_label_selector=[selector] * num_workers)
    try:
        if group.wait(min(timeout_s, 5.0)):
            return
        log.info("waiting up to %.0f s for room for %s", timeout_s, wanted)
        if not group.wait(timeout_s):
            raise UserError(
                f"no room for {wanted} within {timeout_s:.0f} s; the cluster has {ray.cluster_resources()}. "  # type: ignore[no-untyped-call]
                "Lower train.num_workers or train.placement, or add nodes"
            )
    finally:
        remove_placement_group(group)


def _resources(config: TrainConfig) -> dict[str, float]:
    wanted = {"CPU": config.placement.num_cpus, "GPU": config.placement.num_gpus}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def _fit(job: Job) -> str:
    """Run the workers and return the exported model's hash. Reusing the name is what makes Ray Train resume."""
    config = job.config
    on_gpu = config.placement.num_gpus > 0
    # ray.train's type hints are those of its first version: label_selector and others are new in the second.
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers[1],
            use_gpu=on_gpu,
            resources_per_worker=_resources(config),
            label_selector=dict(config.placement.label_selector) or None,  # type: ignore[call-arg]
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=job.run.path("train"),
            storage_filesystem=job.run.fs,
            # controller: the workers' start, each try of it 60 s; unbounded by default
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_TO_KEEP),
        ),
    )
    try:
        answer: dict[str, str] = trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        error.add_note(f"What was done is kept in {job.run.path('train')}: the same command again goes on from there.")
        raise
    if "failure" in answer:
        raise UserError(answer["failure"])
    return answer["model"]


def _resume(state: Strategy) -> None:
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as directory:
            state.load(Path(directory))


def _save(state: Strategy) -> None:
    # Ray merges what the ranks report, and only then takes note of the checkpoint: what a dead rank left of one is
    # never resumed from.
    with tempfile.TemporaryDirectory() as directory:
        state.save(Path(directory)).wait()
        name = f"step={state.step:06d}"
        ray.train.report({"step": state.step}, ray.train.Checkpoint(directory), checkpoint_dir_name=name)


def _export(state: Strategy, job: Job) -> str:
    weights = state.gather()
    if ray.train.get_context().get_world_rank() != 0:
        return ""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = models.load_tokenizer(job.config.base_model)
        export.write(weights, state.model.config, tokenizer, job.config.export_dtype, Path(directory))
        job.run.upload(Path(directory), MODEL)
        return export.directory_hash(Path(directory))


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


def _prepare_cpu(config: TrainConfig) -> None:
    torch.set_num_threads(max(1, int(config.placement.num_cpus)))  # the workers of a node share its cores
    if config.compute_dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("this CPU has no fast bfloat16: train.compute_dtype float32 takes a seventh of the time here")


def _quieten() -> None:
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
