"""[RAY DATA] Rounds of plan -> completions -> candidates, until enough are kept; then the dataset."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from ray.util.metrics import Gauge
from rich.console import Console

from alpaca_ray.artifacts import Stage
from alpaca_ray.config import GenerateConfig, UserError
from alpaca_ray.generate.filters import check_filter_names
from alpaca_ray.generate.harvest import Harvest
from alpaca_ray.generate.outputs import write_outputs
from alpaca_ray.generate.plan import plan_request, request_form, round_size
from alpaca_ray.generate.progress import Figures, Progress
from alpaca_ray.inputs import of_generate
from alpaca_ray.provider.batch import answer_batch, refuse_pending
from alpaca_ray.provider.budget import Estimate, PilotRow, estimate, price_of
from alpaca_ray.provider.client import check_access
from alpaca_ray.provider.gate import GateState
from alpaca_ray.provider.gate_actor import start_gate
from alpaca_ray.provider.journal import Journal
from alpaca_ray.provider.pool import ask, base_url_of
from alpaca_ray.provider.request import request_key
from alpaca_ray.provider.sender import NOT_ASKED
from alpaca_ray.schema import (
    COMPLETION_SCHEMA,
    REJECT_SCHEMA,
    REQUEST_SCHEMA,
    SeedTask,
    read_evaluation_tasks,
    read_seed_tasks,
)

STATE_TIMEOUT_S = 2.0
PILOT_REQUESTS = 8

log = logging.getLogger("alpaca_ray")

Rows = list[dict[str, Any]]


def inputs(config: GenerateConfig) -> dict[str, str]:
    """What the stage starts from. Raises UserError for a file that cannot be used and for an unknown filter."""
    check_filter_names(config.skip_filters)
    return of_generate(config)


def generate(stage: Stage) -> None:
    """Ask until `num_instructions` are kept, then write the dataset, its papers and the manifest.

    Raises UserError when the teacher refuses, when too many requests fail, when the budget is spent, and when
    `max_requests` did not suffice. What was answered until then stays: the next try pays only for what is missing.
    """
    run = _Generation(stage)
    try:
        run.fill()
    finally:
        run.write_rejects()  # they say why a run did not get there
    write_outputs(stage, run.harvest, run.completions, run.journal)


def dry_run(stage: Stage) -> Estimate:
    """What the stage will ask for, cost and take, judged by a pilot of its first requests.

    The pilot is paid for and goes to the journal: the run itself finds it there. Nothing else is written. Raises
    UserError like `generate`.
    """
    run, config = _Generation(stage), stage.config.generate
    run.config = config.model_copy(update={"mode": "online"})  # nobody waits a day for a pilot
    requests = [
        plan_request(config.seed, k, run.seeds, config) for k in range(min(PILOT_REQUESTS, config.max_requests))
    ]
    answered = {row["request"]: row for rows in run.ask_round(0, requests) for row in rows}
    run.refuse_failures(list(answered.values()))
    pilot = []
    for request in requests:
        row, kept = answered[request["request"]], len(run.harvest.kept)
        run.judge(request, row)
        kept = len(run.harvest.kept) - kept
        pilot.append(PilotRow(row["prompt_tokens"], row["completion_tokens"], row["latency_s"], kept))
    return estimate(
        pilot,
        config.num_instructions,
        price_of(config.teacher.model, config.teacher.price),
        limits=config.limits,
        concurrency=config.num_actors * config.concurrent_requests_per_actor,
        rng=random.Random(config.seed),
        batch=config.mode == "batch",
    )


class _Generation:
    """One try at the stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.run, self.config = stage, stage.run, stage.config.generate
        self.seeds = _seeds(self.config)
        self.harvest = Harvest.start(self.config, self.seeds, read_evaluation_tasks(self.config.evaluation_tasks))
        self.completions: Rows = []  # of all rounds, each with its `round`
        self.journal_place = (stage.run, stage.path("journal"))
        self.journal = Journal(*self.journal_place)
        self.gate = start_gate(self.config, *self.journal_place)
        self.round_asked = self.round_answered = self.round_had = self.answered_before = 0
        self.gauges = gauges()

    def fill(self) -> None:
        """Rounds until enough are kept."""
        lost = len(self.journal.in_flight())
        if lost:
            log.info("an earlier try left %d requests in flight: they are paid for again at most", lost)
        number = 0
        while not self.harvest.full:
            requests = self.plan_round(number)
            self.answer_round(number, requests)
            number += 1

    def plan_round(self, number: int) -> Rows:
        """The round's requests, written before anything is asked; an earlier try's plan stands."""
        path = self.stage.path(f"plan/round={number:03d}.parquet")
        if self.run.exists(path):
            return self.run.read_table(path).to_pylist()  # type: ignore[no-any-return]
        kept, first = len(self.harvest.kept), len(self.completions)
        size = round_size(kept, first, first, self.config)
        if size == 0:
            raise UserError(
                f"kept {kept} of {self.config.num_instructions} instructions after {first} requests, which is "
                f"generate.max_requests; rejected: {self.harvest.counted()}. Raise generate.max_requests to go on, or "
                f"look at them in {self.run.path(self.stage.path('rejects.parquet'))}"
            )
        rows = [plan_request(self.config.seed, k, self.seeds, self.config) for k in range(first, first + size)]
        self.run.write_table(path, pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA))
        return rows

    def answer_round(self, number: int, requests: Rows) -> None:
        """Answer and judge a round, each answer as soon as all before it are there."""
        path = self.stage.path(f"completions/round={number:03d}/part-000.parquet")
        done = self.run.exists(path)
        arriving = iter([self.run.read_table(path).to_pylist()]) if done else self.ask_round(number, requests)
        found: dict[int, dict[str, Any]] = {}
        self.round_asked, self.round_answered, judged = len(requests), 0, 0
        for rows in arriving:
            found |= {row["request"]: row for row in rows}
            self.round_answered = len(found)
            while judged < len(requests) and requests[judged]["request"] in found:
                self.judge(requests[judged], found[requests[judged]["request"]])
                judged += 1
        answered = [found[request["request"]] for request in requests]
        if not done:
            self.refuse_failures(answered)
            self.run.write_table(path, pa.Table.from_pylist(answered, schema=COMPLETION_SCHEMA))
        self.completions += [row | {"round": number} for row in answered]
        self.log_round(number, answered)

    def ask_round(self, number: int, requests: Rows) -> Iterator[Rows]:
        """Rows of COMPLETION_SCHEMA: first what the journal has, then what is asked for now."""
        form, base_url = request_form(self.config), base_url_of(self.config)
        had: Rows = []
        missing: Rows = []
        for row in requests:
            key = request_key(form.of(row["prompt"], row["seed"]), self.config.teacher, base_url)
            completion = self.journal.answer(key)
            if completion is None:
                missing.append(row)
            else:
                had.append({"request": row["request"], "key": key, **vars(completion)})
        yield had
        if not missing:
            return
        asyncio.run(check_access(self.config.teacher))
        told = f", {len(had)} are in the journal" if had else ""
        log.info("round %d: asking %s for %d completions%s", number, self.config.teacher.model, len(missing), told)
        batches = self.stage.path("batches")
        if self.config.mode == "batch":
            asked = [(row["request"], form.of(row["prompt"], row["seed"])) for row in missing]
            yield asyncio.run(answer_batch(asked, self.config, base_url, self.journal_place, batches))
            return
        refuse_pending(self.run, batches, self.journal)
        self.round_had = len(had)
        table = pa.Table.from_pylist(missing, schema=REQUEST_SCHEMA)
        with Progress(self.figures, Console(stderr=True)):
            yield from ask(table, form, self.config, self.gate, self.journal_place)

    def judge(self, request: dict[str, Any], completion: dict[str, Any]) -> None:
        """Take what an answer holds; a failure holds nothing."""
        if completion["text"] is not None:
            self.harvest.add(request, completion)
            self.gauges["kept"].set(len(self.harvest.kept))
            self.gauges["rejected"].set(len(self.harvest.rejects))

    def refuse_failures(self, rows: Rows) -> None:
        """A stopped run and a round with too many failures end here; what was answered is in the journal."""
        stopped = next((row["error_detail"] for row in rows if row["error"] == NOT_ASKED), None)
        state = self.gate.state()
        if state:
            self.answered_before, stopped = state.answered, stopped or state.stopped
        if stopped:
            raise UserError(stopped)
        failed = [row for row in rows if row["text"] is None]
        if len(failed) > self.config.max_failed_share * len(rows):
            errors = dict(Counter(row["error"] for row in failed))
            raise UserError(
                f"{len(failed)} of {len(rows)} requests of a round failed: {errors}, the last with "
                f"{failed[-1]['error_detail']}. generate.max_failed_share allows fewer; the answers are kept, and the "
                "same command asks again"
            )

    def figures(self) -> Figures:
        """For the progress view; called from its thread, once a period."""
        state = self.gate.state(STATE_TIMEOUT_S)
        limiter = state.limiter if state else None
        for reason, count in self.harvest.counted().items():
            self.gauges["rejects"].set(count, {"reason": reason})
        return Figures(
            kept=len(self.harvest.kept),
            wanted=self.config.num_instructions,
            reasons=self.harvest.counted(),
            asked=self.round_asked,
            # A block comes when its slowest row is there; the gate hears of each.
            answered=max(self.round_answered, self.round_had + state.answered - self.answered_before if state else 0),
            failed=state.failed if state else 0,
            requests_per_minute=limiter.requests_in_window if limiter else 0,
            tokens_per_minute=limiter.tokens_in_window if limiter else 0,
            requests_limit=limiter.requests_limit if limiter else None,
            tokens_limit=limiter.tokens_limit if limiter else None,
            usd=state.usd if state else 0.0,
            max_usd=self.config.budget.max_usd,
            waits=_waits(state),
        )

    def log_round(self, number: int, answered: Rows) -> None:
        """One line, for a terminal and for a log."""
        failed = sum(row["text"] is None for row in answered)
        log.info(
            "round %d: %d answered, %d failed; kept %d of %d so far; rejected so far: %s",
            number,
            len(answered) - failed,
            failed,
            len(self.harvest.kept),
            self.config.num_instructions,
            self.harvest.counted() or "none",
        )

    def write_rejects(self) -> None:
        """Every reject so far."""
        table = pa.Table.from_pylist(self.harvest.rejects, schema=REJECT_SCHEMA)
        self.run.write_table(self.stage.path("rejects.parquet"), table)


def gauges() -> dict[str, Gauge]:
    """What the driver tells Ray's metrics; the gate tells the rest."""
    made = {name: Gauge(f"alpaca_ray_generate_{name}", f"Instructions {name}") for name in ("kept", "rejected")}
    made["rejects"] = Gauge("alpaca_ray_generate_rejects", "Instructions rejected, by reason", ("reason",))
    return made


def _seeds(config: GenerateConfig) -> list[SeedTask]:
    seeds = read_seed_tasks(config.seed_tasks)
    if len(seeds) < config.num_examples_per_prompt:
        raise UserError(
            f"generate.num_examples_per_prompt is {config.num_examples_per_prompt}, but there are only "
            f"{len(seeds)} seed tasks"
        )
    return seeds


def _waits(state: GateState | None) -> str | None:
    """Why nothing goes out just now, in words for a progress line."""
    if state is None:
        return "the limiter does not answer, it may be starting again"
    if state.limiter.breaker != "closed":
        return "outage: the teacher fails, one request at a time tries whether it is back"
    return None
