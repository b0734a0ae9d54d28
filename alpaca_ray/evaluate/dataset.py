"""[RAY DATA] What the base and the trained model make of the same examples: losses, responses, a page to read.

One actor a model. Both are branches of one dataset, so they run side by side where there is room for two, and one
after the other where there is not.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import ActorDiedError

from alpaca_ray.artifacts import RunDirectory, Stage, finished
from alpaca_ray.config import EvaluateConfig, UserError
from alpaca_ray.evaluate.report import render
from alpaca_ray.evaluate.scores import compare_losses, response_scores
from alpaca_ray.evaluate.worker import LOSSES, RESPONSES, WORK_SCHEMA, ModelWorker, loss_of, response_of
from alpaca_ray.inputs import evaluated_tasks, of_evaluate
from alpaca_ray.schema import Example, as_examples

log = logging.getLogger("alpaca_ray")

MODELS = ("base", "trained")

Results = dict[tuple[str, str], list[dict[str, Any]]]  # (model, part) -> rows of RESULT_SCHEMA, by position


def inputs(run: RunDirectory, config: EvaluateConfig) -> dict[str, str]:
    """What the stage starts from. Raises UserError if train is not done or the instructions cannot be used."""
    return of_evaluate(run, config)


def evaluate(stage: Stage) -> None:
    """Score both models on the held-out examples and the evaluation instructions; then report and manifest.

    Raises UserError if a model cannot be loaded.
    """
    trained = finished(stage.run, "train")
    # The manifest says what was trained and how, whatever this job's own --train options are.
    base_model, max_length = trained["config"]["base_model"], trained["config"]["max_length"]
    references = {"base": base_model, "trained": stage.run.reference("train/model", trained["outputs"]["model"])}
    parts = _parts(stage)
    log.info("evaluate: %s", ", ".join(f"{len(examples)} {part}" for part, examples in parts.items()))
    results = _collect(_results(stage.config.evaluate, references, max_length, parts), parts)
    _write(stage, _scores(results, base_model), _side_by_side(parts[RESPONSES], results))


def _parts(stage: Stage) -> dict[str, list[Example]]:
    """The examples of each part. The losses stand first: a worker then changes its precision once."""
    heldout = [Example(**row) for row in stage.run.read_table("train/heldout.parquet").to_pylist()]
    reference = as_examples(evaluated_tasks(stage.config.evaluate))
    return {"heldout": heldout, "reference": reference, RESPONSES: reference}


def _results(
    config: EvaluateConfig, references: Mapping[str, str], max_length: int, parts: Mapping[str, Sequence[Example]]
) -> Iterator[pa.Table]:
    """Tables of RESULT_SCHEMA as they come, one a block. `references`: where each model lies."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # a job's log gets our lines, not redrawn bars
    context.print_on_execution_start = False
    # Of every task, and of what Ray Data asks the autoscaler for: without it they start whichever nodes are cheapest.
    context.execution_options.label_selector = dict(config.placement.label_selector) or None
    blocks = list(_blocks(parts, config.batch_size))
    base, trained = (_branch(blocks, config, (name, references[name], config, max_length)) for name in MODELS)
    try:
        # No prefetch: a table would be held back until the next one is there.
        yield from base.union(trained).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ActorDiedError as error:
        raise _user_error(error) or error from None


def _branch(blocks: list[pa.Table], config: EvaluateConfig, worker_args: tuple[Any, ...]) -> ray.data.Dataset:
    return ray.data.from_arrow(blocks).map_batches(
        ModelWorker,
        fn_constructor_args=worker_args,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=config.placement.num_cpus,
        num_gpus=config.placement.num_gpus or None,
    )


def _blocks(parts: Mapping[str, Sequence[Example]], batch_size: int) -> Iterator[pa.Table]:
    """WORK_SCHEMA. One batch of one part a block, so that every batch is seen when it is done."""
    for part, examples in parts.items():
        rows = [{"part": part, "position": i, **asdict(example)} for i, example in enumerate(examples)]
        for start in range(0, len(rows), batch_size):
            yield pa.Table.from_pylist(rows[start : start + batch_size], schema=WORK_SCHEMA)


def _collect(tables: Iterator[pa.Table], parts: Mapping[str, Sequence[Example]]) -> Results:
    """All rows in order, and a line in the log for every table."""
    results: Results = {(model, part): [] for model in MODELS for part in parts}
    for table in tables:
        rows = table.to_pylist()
        for row in rows:
            results[row["model"], row["part"]].append(row)
        for model, part in Counter((row["model"], row["part"]) for row in rows):
            done, of = len(results[model, part]), len(parts[part])
            log.info("evaluate: %s model, %s: %d of %d", model, part, done, of)
    return {key: sorted(rows, key=lambda row: row["position"]) for key, rows in results.items()}


def _scores(results: Results, base_model: str) -> dict[str, Any]:
    losses = {part: compare_losses(*([loss_of(row) for row in results[m, part]] for m in MODELS)) for part in LOSSES}
    responses = {model: response_scores([response_of(row) for row in results[model, RESPONSES]]) for model in MODELS}
    return {
        "models": {"base": base_model, "trained": "train/model"},
        "unit": "nats per target token; difference: after - before",
        "losses": losses,
        "responses": responses,
    }


def _side_by_side(examples: Sequence[Example], results: Results) -> list[dict[str, Any]]:
    """One row per instruction with the reference answer and what both models responded."""
    rows = []
    for position, example in enumerate(examples):
        row = {"id": example.id, "instruction": example.instruction, "input": example.input}
        row["reference"] = example.output
        base, trained = (response_of(results[model, RESPONSES][position]) for model in MODELS)
        row |= {"base": base.text, "trained": trained.text}
        cuts = {"base_cut": base.cut, "trained_cut": trained.cut}
        rows.append({**row, **cuts, "base_num_tokens": base.num_tokens, "trained_num_tokens": trained.num_tokens})
    return rows


def _write(stage: Stage, scores: dict[str, Any], responses: list[dict[str, Any]]) -> None:
    stage.run.write_table(stage.path("responses/part-000.parquet"), pa.Table.from_pylist(responses))
    stage.run.write_json(stage.path("scores.json"), scores)
    page = render(stage.config.name, scores, responses)
    stage.run.write_bytes(stage.path("report.html"), page.encode())
    digest = hashlib.sha256(stage.run.read_bytes(stage.path("scores.json"))).hexdigest()[:16]
    stage.finish(_counts(scores), {"scores.json": digest})


def _counts(scores: Mapping[str, Any]) -> dict[str, Any]:
    losses = {f"{part}_loss_{w}": scores["losses"][part][w]["loss"] for part in LOSSES for w in ("before", "after")}
    rounded = {name: None if loss is None else round(loss, 4) for name, loss in losses.items()}
    return rounded | {"responses": scores["responses"]["trained"]["responses"]}


def _user_error(error: ActorDiedError) -> UserError | None:
    """The UserError that a worker's `__init__` raised, or None: Ray wraps it into two errors of its own."""
    cause = getattr(error.args[0], "cause", None) if error.args else None
    return cause if isinstance(cause, UserError) else None
