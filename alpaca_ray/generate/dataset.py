"""[RAY DATA] Rounds of plan -> completions -> candidates, until enough are kept; then the dataset."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from alpaca_ray.artifacts import Stage, table_hash
from alpaca_ray.config import GenerateConfig, UserError
from alpaca_ray.generate.filters import reject_reason
from alpaca_ray.generate.novelty import NoveltyFilter
from alpaca_ray.generate.parse import Candidate, parse_completion
from alpaca_ray.generate.plan import plan_request, round_size
from alpaca_ray.prompts import stop_sequence
from alpaca_ray.provider.client import FATAL_ERRORS, check_access
from alpaca_ray.provider.pool import answers, ask
from alpaca_ray.schema import (
    DATASET_SCHEMA,
    REJECT_SCHEMA,
    REQUEST_SCHEMA,
    Reject,
    SeedTask,
    content_hash,
    read_seed_tasks,
)

log = logging.getLogger("alpaca_ray")


@dataclass
class Harvest:
    """What the completions so far gave, in (request, position) order."""

    novelty: NoveltyFilter
    config: GenerateConfig
    kept: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)

    def add(self, completion: dict[str, Any]) -> None:
        """Judge every task of one completion (a row of COMPLETION_SCHEMA with a text)."""
        parsed = parse_completion(completion["text"], completion["finish_reason"], self.config.num_examples_per_prompt)
        for position, item in enumerate(parsed):
            self._judge(item, {"request": completion["request"], "position": position})

    def _judge(self, item: Candidate | Reject, where: dict[str, int]) -> None:
        if isinstance(item, Reject):
            self.rejects.append({**where, **asdict(item)})
        elif len(self.kept) == self.config.num_instructions:
            self.rejects.append({**where, "reason": "surplus", "text": _text(item)})
        elif reason := reject_reason(item):
            self.rejects.append({**where, "reason": reason, "text": _text(item)})
        else:
            self._offer(item, where)

    def _offer(self, item: Candidate, where: dict[str, int]) -> None:
        novelty = self.novelty.offer(item.instruction)
        similar = {"rouge_l": novelty.rouge_l, "nearest": novelty.nearest}
        if novelty.kept:
            row_id = f"{where['request']:06d}-{where['position']:02d}"
            self.kept.append({"id": row_id, **asdict(item), **where, **similar})
        else:
            self.rejects.append({**where, "reason": "duplicate", "text": _text(item), **similar})


def inputs(config: GenerateConfig) -> dict[str, str]:
    """What the stage starts from. Raises UserError for a seed file that cannot be used."""
    return {"seed_tasks": content_hash(read_seed_tasks(config.seed_tasks))}


def generate(stage: Stage) -> None:
    """Ask until `num_instructions` are kept, then write the dataset and the manifest.

    Raises UserError when the teacher refuses, when too many requests fail, and when `max_requests` did not suffice.
    What was answered until then stays: the next try pays only for what is missing.
    """
    config = stage.config.generate
    seeds = _seeds(config)
    novelty = NoveltyFilter((seed.instruction for seed in seeds), config.novelty_threshold)
    harvest = Harvest(novelty, config)
    try:
        completions = _fill(stage, harvest, seeds)
    except UserError:
        _write_rejects(stage, harvest)  # they say why a run did not get there
        raise
    _write_rejects(stage, harvest)
    _write(stage, harvest, completions)


def _fill(stage: Stage, harvest: Harvest, seeds: Sequence[SeedTask]) -> list[dict[str, Any]]:
    """Rounds until enough are kept; returns all completions in order."""
    completions: list[dict[str, Any]] = []
    number = 0
    while len(harvest.kept) < harvest.config.num_instructions:
        requests = _plan_round(stage, number, harvest, completions, seeds)
        answered = _answer_round(stage, number, requests)
        for row in answered:
            if row["text"] is not None:
                harvest.add(row)
        completions += answered
        _log_round(number, answered, harvest)
        number += 1
    return completions


def _seeds(config: GenerateConfig) -> list[SeedTask]:
    seeds = read_seed_tasks(config.seed_tasks)
    if len(seeds) < config.num_examples_per_prompt:
        raise UserError(
            f"generate.num_examples_per_prompt is {config.num_examples_per_prompt}, but there are only "
            f"{len(seeds)} seed tasks"
        )
    return seeds


def _plan_round(
    stage: Stage, number: int, harvest: Harvest, completions: list[dict[str, Any]], seeds: Sequence[SeedTask]
) -> pa.Table:
    """The round's requests (REQUEST_SCHEMA), written before anything is asked; an earlier try's plan stands."""
    config, path = stage.config.generate, stage.path(f"plan/round={number:03d}.parquet")
    if stage.run.exists(path):
        return stage.run.read_table(path)
    first = len(completions)
    size = round_size(len(harvest.kept), first, first, config)
    if size == 0:
        raise UserError(
            f"kept {len(harvest.kept)} of {config.num_instructions} instructions after {first} requests, which is "
            f"generate.max_requests; rejected: {_reasons(harvest.rejects)}. Raise generate.max_requests to go on, or "
            f"look at them in {stage.run.path(stage.path('rejects.parquet'))}"
        )
    rows = [plan_request(config.seed, k, seeds, config) for k in range(first, first + size)]
    requests = pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)
    stage.run.write_table(path, requests)
    return requests


def _answer_round(stage: Stage, number: int, requests: pa.Table) -> list[dict[str, Any]]:
    """The answers (rows of COMPLETION_SCHEMA) to all requests of a round, in order; asks only for those not had."""
    config, target = stage.config.generate, stage.path(f"completions/round={number:03d}")
    found = answers(stage.run, target)
    missing = [row for row in requests.to_pylist() if found.get(row["request"], {}).get("text") is None]
    if missing:
        asyncio.run(check_access(config.teacher))
        log.info("round %d: asking %s for %d completions", number, config.teacher.model, len(missing))
        stop = stop_sequence(config.num_tasks_per_prompt)
        ask(stage.run, pa.Table.from_pylist(missing, schema=REQUEST_SCHEMA), config, stop, target)
        found = answers(stage.run, target)
    rows = [found[request] for request in requests["request"].to_pylist()]
    _refuse_failures(rows, config)
    return rows


def _refuse_failures(rows: list[dict[str, Any]], config: GenerateConfig) -> None:
    failed = [row for row in rows if row["text"] is None]
    fatal = next((row for row in failed if row["error"] in FATAL_ERRORS), None)
    if fatal:
        raise UserError(f"the teacher refuses ({fatal['error']}): {fatal['error_detail']}")
    if len(failed) > config.max_failed_share * len(rows):
        errors = dict(Counter(row["error"] for row in failed))
        raise UserError(
            f"{len(failed)} of {len(rows)} requests of a round failed: {errors}, last: {failed[-1]['error_detail']}. "
            "generate.max_failed_share allows fewer; the answers are kept, and the same command asks again"
        )


def _log_round(number: int, answered: list[dict[str, Any]], harvest: Harvest) -> None:
    failed = sum(row["text"] is None for row in answered)
    log.info(
        "round %d: %d answered, %d failed; kept %d of %d so far; rejected so far: %s",
        number,
        len(answered) - failed,
        failed,
        len(harvest.kept),
        harvest.config.num_instructions,
        _reasons(harvest.rejects) or "none",
    )


def _write_rejects(stage: Stage, harvest: Harvest) -> None:
    stage.run.write_table(stage.path("rejects.parquet"), pa.Table.from_pylist(harvest.rejects, schema=REJECT_SCHEMA))


def _write(stage: Stage, harvest: Harvest, completions: list[dict[str, Any]]) -> None:
    run = stage.run
    dataset = pa.Table.from_pylist(harvest.kept, schema=DATASET_SCHEMA)
    run.write_table(stage.path("dataset.parquet"), dataset)
    alpaca_data = dataset.select(["instruction", "input", "output"]).to_pylist()
    run.write_json(stage.path("alpaca_data.json"), alpaca_data)
    counts = {
        "requests": len(completions),
        "failed": sum(row["text"] is None for row in completions),
        "kept": len(harvest.kept),
        "rejected": len(harvest.rejects),
        "prompt_tokens": sum(row["prompt_tokens"] for row in completions),
        "completion_tokens": sum(row["completion_tokens"] for row in completions),
        "reasons": _reasons(harvest.rejects),
    }
    stage.finish(counts, {"dataset.parquet": table_hash(dataset)})


def _reasons(rejects: list[dict[str, Any]]) -> dict[str, int]:
    """How often each reason stands, the commonest first."""
    return dict(Counter(reject["reason"] for reject in rejects).most_common())


def _text(candidate: Candidate) -> str:
    """A rejected candidate as one text."""
    return f"Instruction: {candidate.instruction}\nInput: {candidate.input}\nOutput: {candidate.output}"
