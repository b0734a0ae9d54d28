"""OpenAI's Batch API: the same requests, journal and budget, at half the price and within a day.

Each batch has a state file in the run:

    upload the input, write its id, create the batch, write its id, wait, journal the answers, write how it ended

A try that is killed anywhere goes on from there. If it was killed between creating a batch and writing its id, the
provider's list of batches has it, with our input file. A pending batch is not lost in flight, so the journal holds no
`sent` record of it; its state file counts against the budget, at the worst case, until its answers are journaled.
"""

import asyncio
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

from openai.types import Batch

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig, UserError
from alpaca_ray.provider.batch_api import BatchApi, Sleep
from alpaca_ray.provider.batch_files import input_line, read_rows, split, url
from alpaca_ray.provider.budget import Budget, Charge, Spent, exhausted, pico_usd, price_of
from alpaca_ray.provider.client import sdk
from alpaca_ray.provider.failures import FATAL_ERRORS, FINAL_ERRORS
from alpaca_ray.provider.journal import Cost, Journal, Writer
from alpaca_ray.provider.request import Request, request_key
from alpaca_ray.provider.sender import ask_for, charge_of
from alpaca_ray.schema import Completion

_NO_ATTEMPT = 0  # in the journal: there is no `sent` record to close

log = logging.getLogger("alpaca_ray")


@dataclass(frozen=True)
class State:
    """What is known of a batch. `digest`: of its keys, and of how many batches the run had before it."""

    digest: str
    endpoint: str
    input_file_id: str
    uploaded_at: int  # Unix time, s, by the provider's clock
    worst: Mapping[str, Charge]  # by the keys of its requests
    batch_id: str | None = None
    ended: str | None = None  # its last status, once all that it gave is in the journal


async def answer_batch(  # noqa: PLR0913 - the places that it reads and writes
    requests: Sequence[tuple[int, Request]],
    config: GenerateConfig,
    base_url: str,
    journal: tuple[RunDirectory, str],
    directory: str,
    *,
    sleep: Sleep = asyncio.sleep,
) -> list[dict[str, Any]]:
    """Rows of COMPLETION_SCHEMA, one a request, in their order. The requests are alike in form.

    `directory`: of the state files, in the journal's run. A request that fails is asked again in a further batch,
    `max_attempts` times in all. Raises UserError where the provider refuses, where a batch fails or is cancelled, and
    where the budget has no room. What was answered until then is in the journal.
    """
    teacher = config.teacher
    api_key = os.environ.get(teacher.api_key_env, "").strip()
    if not api_key:
        raise UserError(f"{teacher.api_key_env} is not set: export the key of the teacher's API under that name")
    keys = [request_key(request, teacher, base_url) for _, request in requests]
    asked = dict(zip(keys, (request for _, request in requests), strict=True))
    async with sdk(teacher.model_copy(update={"base_url": base_url}), api_key) as client:
        api = BatchApi(client, teacher.max_wait_s, sleep)
        found = await _Batches(api, config, journal, directory).answer(asked)
    return [{"request": row[0], "key": key, **asdict(found[key])} for row, key in zip(requests, keys, strict=True)]


def refuse_pending(run: RunDirectory, directory: str, journal: Journal) -> None:
    """Raises UserError while a batch is pending: asked online as well, its requests would be paid for twice."""
    for state in read_states(run, directory):
        if state.ended is None and any(journal.answer(key) is None for key in state.worst):
            raise UserError(
                f"batch {state.batch_id or state.digest} is pending with {len(state.worst)} requests of this run: go "
                "on with generate.mode=batch. To give it up, cancel it at the provider, and go on once in that mode"
            )


def read_states(run: RunDirectory, directory: str) -> list[State]:
    """Every batch of a run, the ended ones too."""
    values = [run.read_json(path) for path in run.files(directory, ".json")]
    return [State(**v | {"worst": {key: Charge(**worst) for key, worst in v["worst"].items()}}) for v in values]


class _Batches:
    """All batches of a run."""

    def __init__(
        self, api: BatchApi, config: GenerateConfig, journal: tuple[RunDirectory, str], directory: str
    ) -> None:
        self._api, self._config, self._teacher = api, config, config.teacher
        self._run, self._directory = journal[0], directory
        self._journal, self._writer = Journal(*journal), Writer(*journal)
        self._price = price_of(self._teacher.model, self._teacher.price)

    async def answer(self, asked: Mapping[str, Request]) -> dict[str, Completion]:
        """Answers, and the last failures of the requests that were given up."""
        found: dict[str, Completion] = {}
        tries: Counter[str] = Counter()
        while True:
            found |= self._journaled(asked.keys() - found.keys())
            missing = [key for key in asked if key not in found]
            if not missing:
                return found
            states = [await self._created(state) for state in await self._begin(asked, missing)]
            for state in states:
                failures = await self._finish(state)
                tries.update(failures.keys())
                found |= {key: said for key, said in failures.items() if tries[key] >= self._teacher.max_attempts}

    async def _begin(self, asked: Mapping[str, Request], missing: Sequence[str]) -> list[State]:
        """The pending batches with these requests, and new ones for as many others as the budget has room for."""
        pending = list(self._pending())
        budget = self._budget()
        room = [budget.reserve(state.digest, _sum(state.worst)) for state in pending].count("reserved") == len(pending)
        waiting = {key for state in pending for key in state.worst}
        worst = {key: ask_for(key, asked[key], self._teacher).worst for key in missing if key not in waiting}
        fitting = list(takewhile(lambda key: room and budget.reserve(key, worst[key]) == "reserved", worst))
        states = [state for state in pending if not state.worst.keys().isdisjoint(missing)]
        if not fitting and not states:
            raise UserError(exhausted(self._config.budget, budget.spent))
        if len(fitting) < len(worst):
            log.info("the budget has room for the worst case of %d of %d requests", len(fitting), len(worst))
        for part in split((key, input_line(key, asked[key], self._teacher)) for key in fitting):
            where = url(asked[next(iter(part))])
            states.append(await self._uploaded(part, where, {key: worst[key] for key in part}))
        return states

    async def _uploaded(self, lines: Mapping[str, bytes], where: str, worst: Mapping[str, Charge]) -> State:
        number = len(self._run.files(self._directory, ".json"))
        digest = hashlib.sha256("\n".join([str(number), *sorted(lines)]).encode()).hexdigest()[:16]
        file = await self._api.upload(digest, b"".join(lines.values()))
        return self._write(State(digest, where, file.id, file.created_at, worst))

    async def _created(self, state: State) -> State:
        if state.batch_id is not None:
            return state
        batch_id = await self._api.find_or_create(
            state.input_file_id, state.uploaded_at, state.endpoint, state.digest
        )  # fmt: skip
        return self._write(replace(state, batch_id=batch_id))

    async def _finish(self, state: State) -> dict[str, Completion]:
        """Wait for a batch and journal what it gave; returns the failures."""
        batch = await self._api.ended(str(state.batch_id))
        said: dict[str, Completion] = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            content = await self._api.content(file_id) if file_id else b""
            for key, completion in read_rows(content, "chat" in state.endpoint, self._teacher, self._api.api_key):
                said.setdefault(key, completion)
        if strange := said.keys() - state.worst.keys():
            log.warning("batch %s answers %d requests that it was not asked: left out", batch.id, len(strange))
        failures = await self._file(state, said, f"batch_{batch.status}")
        self._write(replace(state, ended=batch.status))
        _refuse(batch, failures)
        return failures

    async def _file(self, state: State, said: Mapping[str, Completion], end: str) -> dict[str, Completion]:
        """Journal what each request got, once; those that got nothing failed by the batch's `end`."""
        error = "bad_response" if end == "batch_completed" else end
        prices = Budget(None, None, self._price, batch=True)
        answers: dict[str, Completion] = {}
        failures: dict[str, Completion] = {}
        costs: dict[str, Cost] = {}
        already = self._journaled(state.worst)
        for key, worst in state.worst.items():
            if key not in already:
                completion = said.get(key) or Completion(None, error, error_detail="the batch has no line of it")
                charged = charge_of(completion, worst)
                costs[key] = Cost(charged.tokens, prices.usd(charged))
                final = completion.error is None or completion.error in FINAL_ERRORS
                (answers if final else failures)[key] = replace(completion, usd=costs[key].usd)
        try:
            await asyncio.gather(*(self._writer.answered(key, _NO_ATTEMPT, answers[key]) for key in answers))
            for key, failure in failures.items():
                self._writer.failed(key, _NO_ATTEMPT, str(failure.error), costs[key])
        except OSError as error:
            raise UserError(
                f"the journal cannot be written ({error}): free space, or choose another --storage-path"
            ) from None
        return failures

    def _pending(self) -> Iterator[State]:
        """Batches that have not ended. One whose try was killed after its last answer has nothing more to give."""
        for state in read_states(self._run, self._directory):
            if state.ended is None and len(self._journaled(state.worst)) == len(state.worst):
                self._write(replace(state, ended="answered"))
            elif state.ended is None:
                yield state

    def _journaled(self, keys: Iterable[str]) -> dict[str, Completion]:
        self._journal.refresh()
        sent = self._journal.sent_keys()
        found = ((key, self._journal.answer(key)) for key in keys if key in sent)
        return {key: completion for key, completion in found if completion is not None}

    def _budget(self) -> Budget:
        """As the journal has it now; what was sent in another mode and never heard of counts at its worst."""
        spent = self._journal.spent
        for worst in self._journal.in_flight():
            spent += Spent(pico_usd(worst.usd), worst.tokens)
        limits = self._config.budget
        return Budget(limits.max_usd, limits.max_tokens, self._price, spent, batch=True)

    def _write(self, state: State) -> State:
        self._run.write_json(f"{self._directory}/{state.digest}.json", asdict(state))
        return state


def _sum(worst: Mapping[str, Charge]) -> Charge:
    charges = worst.values()
    return Charge(sum(c.prompt_tokens for c in charges), sum(c.completion_tokens for c in charges))


def _refuse(batch: Batch, failures: Mapping[str, Completion]) -> None:
    """Raises UserError for what a further batch would meet again, and for what someone has decided."""
    if batch.status == "failed":
        errors = (batch.errors.data if batch.errors else None) or []
        told = "; ".join(f"{error.message} ({error.code}, line {error.line})" for error in errors[:3])
        raise UserError(
            f"the teacher refuses batch {batch.id}: {told or 'it gives no reason'}. Nothing was billed. Where too many "
            "tokens are enqueued, wait until other batches have ended; the same command creates a new one, and "
            "generate.mode=online needs none"
        )
    fatal = next((failure for failure in failures.values() if failure.error in FATAL_ERRORS), None)
    if fatal is not None:
        raise UserError(f"the teacher refuses ({fatal.error}): {fatal.error_detail}")
    if batch.status == "cancelled" and failures:
        raise UserError(
            f"batch {batch.id} was cancelled at the provider with {len(failures)} requests unanswered. The answers are "
            "kept, and the same command asks for the others in a new batch"
        )
