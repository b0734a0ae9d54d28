"""Batches cost half, are created once whatever dies when, and give every row its own answer or none.

The referee is a real HTTP server in a process of its own. Nothing here waits: the referee goes on with each poll.
"""

import asyncio
import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from openai import OpenAI

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.config import BudgetConfig, GenerateConfig, Price, TeacherConfig, UserError
from alpaca_ray.prompts import response_format
from alpaca_ray.provider.batch import answer_batch, read_states, refuse_pending
from alpaca_ray.provider.batch_api import MAX_POLL_S, METADATA
from alpaca_ray.provider.batch_files import input_line, read_rows, split
from alpaca_ray.provider.budget import worst_case
from alpaca_ray.provider.journal import Journal, records
from alpaca_ray.provider.request import Request, request_key
from tests.referee.process import RefereeProcess

JOURNAL, BATCHES = "generate/journal", "generate/batches"
PRICE = Price(input_usd_per_million=1.5, output_usd_per_million=2.0)  # the referee's
NUM_REQUESTS, MAX_TOKENS, MAX_ATTEMPTS = 24, 200, 3

Rows = list[dict[str, Any]]
# Its server imports this module once, not for each process that is to be killed.
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RefereeProcess]:
    PROCESSES.set_forkserver_preload([__name__])
    ledger = tmp_path_factory.mktemp("referee") / "ledger.jsonl"
    with RefereeProcess(ledger=str(ledger)) as referee:
        yield referee


@pytest.fixture
def referee(process: RefereeProcess) -> RefereeProcess:
    process.configure(faults=[], batches={"expires_after_rows": None, "polls_per_step": 1})
    process.reset()
    return process


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path), "run")


def settings(model: str = "gpt-3.5-turbo-instruct", max_wait_s: float = 900, **changes: Any) -> GenerateConfig:
    teacher = TeacherConfig(
        model=model, max_tokens=MAX_TOKENS, timeout_s=20, max_attempts=MAX_ATTEMPTS, max_wait_s=max_wait_s, price=PRICE
    )
    return GenerateConfig(num_instructions=1, mode="batch", teacher=teacher, **changes)


def requests(number: int = NUM_REQUESTS, **form: Any) -> list[tuple[int, Request]]:
    form = form or {"stop": "\n9. Instruction:"}
    return [(k, Request(f"Write tasks.\n###\n1. Instruction:{k}", seed=k, **form)) for k in range(number)]


async def no_wait(_: float) -> None:
    return


def answer(
    base_url: str,
    run: RunDirectory,
    asked: Sequence[tuple[int, Request]],
    config: GenerateConfig | None = None,
    sleep: Any = no_wait,
) -> Rows:
    return asyncio.run(answer_batch(asked, config or settings(), base_url, (run, JOURNAL), BATCHES, sleep=sleep))


def billed(referee: RefereeProcess) -> list[dict[str, Any]]:
    return [entry for entry in referee.ledger() if entry["batch"] and entry["charged_tokens"]]


def created(referee: RefereeProcess) -> int:
    return referee.summary()["by_route"].get("POST /v1/batches", 0)  # type: ignore[no-any-return]


def usd(referee: RefereeProcess) -> float:
    return float(referee.summary()["usd"])


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca": ("gpt-3.5-turbo-instruct", {"stop": "\n9. Instruction:"}),
    "chat": ("gpt-4o-mini", {"chat": True}),
    "json": ("gpt-4o-mini", {"chat": True, "response_format": response_format(8)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_request_is_answered_once_at_half_the_price(
    referee: RefereeProcess, run: RunDirectory, form: str
) -> None:
    model, parameters = FORMS[form]
    asked = requests(**parameters)
    rows = answer(referee.base_url, run, asked, settings(model))
    assert [row["request"] for row in rows] == list(range(NUM_REQUESTS))
    assert all(row["text"] and row["error"] is None and row["model"] == model and row["finished_at"] for row in rows)
    by_seed = {entry["seed"]: entry for entry in billed(referee)}
    assert len(by_seed) == len(billed(referee)) == NUM_REQUESTS
    assert all(row["response_id"] == by_seed[row["request"]]["response_id"] for row in rows)
    assert sum(row["usd"] for row in rows) == pytest.approx(usd(referee))
    full_usd = sum(row["prompt_tokens"] * 1.5e-6 + row["completion_tokens"] * 2e-6 for row in rows)
    assert sum(row["usd"] for row in rows) == pytest.approx(full_usd / 2)

    journal = Journal(run, JOURNAL)
    assert journal.spent.usd == pytest.approx(usd(referee))
    assert journal.in_flight() == []
    [state] = read_states(run, BATCHES)
    assert state.ended == "completed"
    assert answer(referee.base_url, run, asked, settings(model)) == rows
    assert created(referee) == 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class MortalRun(RunDirectory):
    """Kills the process before or after a state is written."""

    point: str = ""

    def write_json(self, relative: str, value: Any) -> None:
        stage = "ended" if value["ended"] else "created" if value["batch_id"] else "uploaded"
        if self.point == f"before {stage}":
            die()
        super().write_json(relative, value)
        if self.point == f"after {stage}":
            die()


def die_at(point: str, base_url: str, storage: str, number: int = NUM_REQUESTS) -> None:
    """What the process that is to be killed runs."""
    whole = open_run(storage, "run")
    answer(base_url, MortalRun(whole.fs, whole.root, point=point), requests(number), sleep=mortal_sleep)


async def mortal_sleep(_: float) -> None:
    die()  # the referee goes on with the second poll at the earliest


def killed(referee: RefereeProcess, storage: Path, point: str, number: int = NUM_REQUESTS) -> None:
    if point == "before ended":  # nothing is polled twice
        referee.configure(batches={"polls_per_step": 0})
    child = PROCESSES.Process(target=die_at, args=(point, referee.base_url, str(storage), number))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    referee.configure(batches={"polls_per_step": 1})


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("before uploaded", (0, 0)),
        ("after uploaded", (1, 0)),
        ("before created", (1, 1)),
        ("after created", (1, 1)),
        ("pending", (1, 1)),
        ("before ended", (1, 1)),
    ],
)
def test_a_killed_try_goes_on_with_the_same_batch(
    referee: RefereeProcess, run: RunDirectory, tmp_path: Path, point: str, left: tuple[int, int]
) -> None:
    """`left`: the state files of the run and the batches at the provider after the kill."""
    killed(referee, tmp_path, point)
    assert (len(read_states(run, BATCHES)), created(referee)) == left
    assert Journal(run, JOURNAL).in_flight() == []  # a pending batch is not lost
    rows = answer(referee.base_url, run, requests())
    assert all(row["text"] for row in rows)
    assert created(referee) == 1
    assert len(billed(referee)) == NUM_REQUESTS
    assert Journal(run, JOURNAL).spent.usd == pytest.approx(usd(referee))
    [state] = read_states(run, BATCHES)
    if state.batch_id is not None:
        [batch] = [batch for batch in listing(referee) if batch.id == state.batch_id]
        assert batch.metadata == {METADATA: state.digest}

    more = answer(referee.base_url, run, requests(NUM_REQUESTS + 1))
    assert more[:-1] == rows
    assert len(billed(referee)) == NUM_REQUESTS + 1
    assert all(state.ended for state in read_states(run, BATCHES))


def listing(referee: RefereeProcess) -> list[Any]:
    with OpenAI(base_url=referee.base_url, api_key="good-key") as client:
        return list(client.batches.list())


def test_answers_that_a_killed_try_has_filed_are_not_filed_again(
    referee: RefereeProcess, run: RunDirectory, tmp_path: Path
) -> None:
    killed(referee, tmp_path, "before ended")
    [file] = [path for path in tmp_path.rglob("*.journal") if path.stat().st_size]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:10]) + lines[10][:100])  # as if it had died while it wrote the eleventh
    assert len(Journal(run, JOURNAL).sent_keys()) == 10
    rows = answer(referee.base_url, run, requests())
    assert all(row["text"] for row in rows)
    assert created(referee) == 1
    assert Journal(run, JOURNAL).spent.usd == pytest.approx(usd(referee))
    assert Counter(record["key"] for record in records(run, JOURNAL)) == Counter(row["key"] for row in rows)


def test_a_pending_batch_is_reserved_before_anything_new(
    referee: RefereeProcess, run: RunDirectory, tmp_path: Path
) -> None:
    killed(referee, tmp_path, "pending", number=12)
    referee.configure(batches={"polls_per_step": 2})
    worst_usd = sum(_worst_usd(request) for _, request in requests(12))
    config = settings(budget=BudgetConfig(max_usd=worst_usd * 1.01))
    sizes: list[int] = []

    async def count(_: float) -> None:
        sizes.append(sum(len(state.worst) for state in read_states(run, BATCHES)))

    with pytest.raises(UserError, match="the budget is spent"):
        answer(referee.base_url, run, requests(100), config, sleep=count)
    assert sizes[0] == 12
    assert usd(referee) <= worst_usd * 1.01
    assert len(billed(referee)) > 12
    assert referee.summary()["billed_again"]["bodies"] == 0


def _worst_usd(request: Request) -> float:
    worst = worst_case(request.prompt, MAX_TOKENS)
    return (worst.prompt_tokens * 1.5e-6 + worst.completion_tokens * 2e-6) / 2


@pytest.mark.parametrize("seed", range(20))
def test_spent_never_exceeds_the_budget_and_a_higher_one_repays_nothing(
    referee: RefereeProcess, run: RunDirectory, seed: int
) -> None:
    asked = requests(12)
    most_usd = sum(_worst_usd(request) for _, request in asked)
    max_usd = random.Random(seed).uniform(0, 0.9) * most_usd
    # Answers take less than their worst case, so a budget below the sum of those may do.
    with suppress(UserError):
        answer(referee.base_url, run, asked, settings(budget=BudgetConfig(max_usd=max_usd)))
    assert usd(referee) <= max_usd
    assert Journal(run, JOURNAL).spent.usd == pytest.approx(usd(referee))
    rows = answer(referee.base_url, run, asked, settings(budget=BudgetConfig(max_usd=1.0)))
    assert all(row["text"] for row in rows)
    assert len(billed(referee)) == len(asked)


def test_expired_rows_are_asked_again_and_given_up_in_the_end(referee: RefereeProcess, run: RunDirectory) -> None:
    referee.configure(batches={"expires_after_rows": 6})
    rows = answer(referee.base_url, run, requests())
    assert created(referee) == MAX_ATTEMPTS
    assert [row["text"] is not None for row in rows] == [True] * 18 + [False] * 6
    assert {row["error"] for row in rows[18:]} == {"batch_expired"}
    assert len(billed(referee)) == 18
    assert Journal(run, JOURNAL).spent.usd == pytest.approx(usd(referee))
    referee.configure(batches={"expires_after_rows": None})
    assert all(row["text"] for row in answer(referee.base_url, run, requests()))  # the next try asks anew
    assert len(billed(referee)) == NUM_REQUESTS


@pytest.mark.parametrize("kind", ["server_error", "unavailable", "rate_limited", "timeout", "truncated_json"])
def test_rows_that_fail_are_asked_again_in_a_further_batch(
    referee: RefereeProcess, run: RunDirectory, kind: str
) -> None:
    referee.configure(faults=[{"kind": kind, "seeds": [3, 11], "attempts": 1}])
    rows = answer(referee.base_url, run, requests())
    assert all(row["text"] for row in rows)
    assert [len(state.worst) for state in sorted(read_states(run, BATCHES), key=lambda s: -len(s.worst))] == [24, 2]
    assert Journal(run, JOURNAL).spent.usd == pytest.approx(usd(referee))


@pytest.mark.parametrize("kind", ["empty_choices", "null_text"])
def test_what_was_billed_for_nothing_counts_in_full(referee: RefereeProcess, run: RunDirectory, kind: str) -> None:
    referee.configure(faults=[{"kind": kind, "seeds": [3], "attempts": 1}])
    assert all(row["text"] for row in answer(referee.base_url, run, requests()))
    assert Journal(run, JOURNAL).spent.usd >= usd(referee)


def test_a_row_that_always_fails_is_given_up_and_holds_no_text(referee: RefereeProcess, run: RunDirectory) -> None:
    referee.configure(faults=[{"kind": "server_error", "seeds": [5], "attempts": 99}])
    rows = answer(referee.base_url, run, requests())
    assert [(row["request"], row["error"]) for row in rows if row["text"] is None] == [(5, "server_error")]
    failed = [record for record in records(run, JOURNAL) if record["kind"] == "failed"]
    assert [(record["key"], record["error"], record["usd"]) for record in failed] == [
        (rows[5]["key"], "server_error", 0.0)
    ] * MAX_ATTEMPTS


@pytest.mark.parametrize("kind", ["content_filter", "content_filter_refusal"])
def test_a_filtered_answer_is_recorded_and_not_asked_again(
    referee: RefereeProcess, run: RunDirectory, kind: str
) -> None:
    referee.configure(faults=[{"kind": kind, "seeds": [5], "attempts": 99}])
    rows = answer(referee.base_url, run, requests())
    assert [(row["request"], row["error"]) for row in rows if row["text"] is None] == [(5, "content_filter")]
    assert answer(referee.base_url, run, requests()) == rows
    assert created(referee) == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("unauthorized", "authentication"),
        ("model_not_found", "model_not_found"),
        ("insufficient_quota", "insufficient_quota"),
        ("wrong_model", "wrong_model"),
    ],
)
def test_a_row_that_every_further_one_would_follow_stops_the_run(
    referee: RefereeProcess, run: RunDirectory, kind: str, name: str
) -> None:
    referee.configure(faults=[{"kind": kind, "seeds": [3, 11], "attempts": 1}])
    with pytest.raises(UserError, match=rf"the teacher refuses \({name}\): "):
        answer(referee.base_url, run, requests())
    assert created(referee) == 1
    assert all(row["text"] for row in answer(referee.base_url, run, requests()))
    assert [len(state.worst) for state in sorted(read_states(run, BATCHES), key=lambda s: -len(s.worst))] == [24, 2]


def test_a_batch_that_is_refused_as_a_whole_is_told_in_the_providers_words(
    referee: RefereeProcess, run: RunDirectory
) -> None:
    mixed = [*requests(2), (2, Request("Chat", seed=2, chat=True))]
    with pytest.raises(UserError, match=r"refuses batch batch_\w+: The batch is for /v1/completions.*line 3.*online"):
        answer(referee.base_url, run, mixed)
    assert [state.ended for state in read_states(run, BATCHES)] == ["failed"]
    assert all(row["text"] for row in answer(referee.base_url, run, requests(2)))
    assert len(billed(referee)) == 2


def test_a_cancelled_batch_stops_the_run_and_the_next_try_asks_anew(referee: RefereeProcess, run: RunDirectory) -> None:
    async def cancel(_: float) -> None:
        [state] = read_states(run, BATCHES)
        with OpenAI(base_url=referee.base_url, api_key="good-key") as client:
            if client.batches.list(limit=1).data[0].status != "cancelling":
                client.batches.cancel(str(state.batch_id))

    referee.configure(batches={"polls_per_step": 2})
    with pytest.raises(UserError, match=r"batch batch_\w+ was cancelled at the provider with 24 requests unanswered"):
        answer(referee.base_url, run, requests(), sleep=cancel)
    refuse_pending(run, BATCHES, Journal(run, JOURNAL))
    assert all(row["text"] for row in answer(referee.base_url, run, requests()))
    assert len(billed(referee)) == NUM_REQUESTS


def test_what_is_pending_is_not_asked_online_as_well(
    referee: RefereeProcess, run: RunDirectory, tmp_path: Path
) -> None:
    killed(referee, tmp_path, "pending")
    with pytest.raises(UserError, match=r"batch batch_\w+ is pending with 24 requests of this run"):
        refuse_pending(run, BATCHES, Journal(run, JOURNAL))
    answer(referee.base_url, run, requests())
    refuse_pending(run, BATCHES, Journal(run, JOURNAL))


def test_an_outage_is_waited_out_only_so_long(run: RunDirectory) -> None:
    waits_s: list[float] = []

    async def note(wait_s: float) -> None:
        waits_s.append(wait_s)

    with pytest.raises(UserError, match=r"the teacher's Batch API fails \(connection\)"):
        answer("http://127.0.0.1:9/v1", run, requests(2), settings(max_wait_s=600), sleep=note)
    assert 600 <= sum(waits_s) <= 600 + MAX_POLL_S
    assert waits_s == sorted(waits_s)
    assert max(waits_s) == MAX_POLL_S


@pytest.mark.parametrize(("variable", "value"), [("OPENAI_API_KEY", ""), ("OPENAI_API_KEY", "bad-key")])
def test_a_key_that_is_missing_or_refused_stops_at_once(
    referee: RefereeProcess, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=r"OPENAI_API_KEY is not set|fails \(authentication\)"):
        answer(referee.base_url, run, requests(2))
    assert read_states(run, BATCHES) == []


Meddle = Callable[[web.BaseRequest, bytes], bytes | None]


@asynccontextmanager
async def proxy(referee: RefereeProcess, meddle: Meddle) -> AsyncIterator[str]:
    """A base URL in front of the referee; `meddle` changes what it answers, None: it is lost on the way."""

    async def forward(request: web.BaseRequest) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        target = referee.base_url.removesuffix("/v1") + str(request.rel_url)
        async with session.request(request.method, target, data=await request.read(), headers=headers) as answered:
            content = meddle(request, await answered.read())
            if content is None:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            return web.Response(body=content, status=answered.status, content_type=answered.content_type)

    async with aiohttp.ClientSession() as session:
        server = web.ServerRunner(web.Server(forward))
        await server.setup()
        site = web.TCPSite(server, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{server.addresses[0][1]}/v1"
        finally:
            await server.cleanup()


def answer_through(referee: RefereeProcess, run: RunDirectory, meddle: Meddle) -> Rows:
    async def through() -> Rows:
        async with proxy(referee, meddle) as base_url:
            place = (run, JOURNAL)
            return await answer_batch(requests(), settings(), base_url, place, BATCHES, sleep=no_wait)

    return asyncio.run(through())


LOGIN = b"<!DOCTYPE html><html>Please sign in</html>"


@pytest.mark.parametrize("lost", [None, LOGIN, b"{}"])
@pytest.mark.parametrize("where", ["POST /v1/files", "POST /v1/batches", "GET /v1/batches/batch_"])
def test_an_answer_that_is_lost_on_the_way_creates_no_second_batch(
    referee: RefereeProcess, run: RunDirectory, where: str, lost: bytes | None
) -> None:
    meant = [where]

    def lose(request: web.BaseRequest, content: bytes) -> bytes | None:
        if meant and f"{request.method} {request.path}".startswith(where):
            meant.clear()
            return lost
        return content

    rows = answer_through(referee, run, lose)
    assert not meant
    assert all(row["text"] for row in rows)
    assert created(referee) == 1
    assert len(billed(referee)) == NUM_REQUESTS


@pytest.mark.parametrize("lost", [None, LOGIN])
def test_a_file_that_is_lost_on_the_way_is_fetched_again(
    referee: RefereeProcess, run: RunDirectory, lost: bytes | None
) -> None:
    meant = ["content"]

    def lose(request: web.BaseRequest, content: bytes) -> bytes | None:
        return lost if request.path.endswith("/content") and meant and meant.pop() else content

    assert all(row["text"] for row in answer_through(referee, run, lose))
    assert len(billed(referee)) == NUM_REQUESTS


def test_a_file_without_its_end_costs_no_row_and_makes_none_wrong(referee: RefereeProcess, run: RunDirectory) -> None:
    meant = ["content"]

    def cut(request: web.BaseRequest, content: bytes) -> bytes | None:
        return content[: len(content) // 2] if request.path.endswith("/content") and meant and meant.pop() else content

    rows = answer_through(referee, run, cut)
    assert all(row["text"] for row in rows)
    by_id = {entry["response_id"]: entry["seed"] for entry in billed(referee)}
    assert [by_id[row["response_id"]] for row in rows] == list(range(NUM_REQUESTS))
    assert Journal(run, JOURNAL).spent.usd >= usd(referee)  # what was cut off was billed


def output_line(key: str, **changes: Any) -> dict[str, Any]:
    body = {"id": f"cmpl-{key}", "model": "m", "choices": [{"text": f"text of {key}", "finish_reason": "stop"}]}
    line = {"id": "batch_req", "custom_id": key, "response": {"status_code": 200, "body": body}, "error": None}
    return line | changes


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
broken_lines = st.builds(
    lambda key, value: output_line(key, **value),
    st.text("abc", min_size=1, max_size=2),
    st.fixed_dictionaries(
        {},
        optional={
            "response": junk | st.fixed_dictionaries({"status_code": junk, "body": junk}),
            "error": junk | st.fixed_dictionaries({"code": junk, "message": junk}),
            "custom_id": junk,
        },
    ),
)


@hypothesis_settings(deadline=None)
@given(lines=st.lists(broken_lines | junk, max_size=8), cut=st.integers(0, 2000), chat=st.booleans())
def test_no_file_gives_a_wrong_row_or_a_crash(lines: list[Any], cut: int, chat: bool) -> None:
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)[:cut]
    for key, completion in read_rows(content, chat, TeacherConfig(model="m"), "secret"):
        assert (completion.text is None) == (completion.error is not None)
        assert completion.text in (None, f"text of {key}")


@given(
    lengths=st.lists(st.integers(1, 50), max_size=40), max_requests=st.integers(1, 10), max_bytes=st.integers(1, 120)
)
def test_files_keep_to_the_limits_and_to_the_order(lengths: list[int], max_requests: int, max_bytes: int) -> None:
    lines = {str(k): b"x" * length for k, length in enumerate(lengths)}
    parts = list(split(lines.items(), max_requests, max_bytes))
    assert [item for part in parts for item in part.items()] == list(lines.items())
    for part in parts:
        assert 1 <= len(part) <= max_requests
        assert len(part) == 1 or sum(map(len, part.values())) <= max_bytes
    for part, following in pairwise(parts):
        first = next(iter(following.values()))
        assert len(part) == max_requests or sum(map(len, part.values())) + len(first) > max_bytes


def test_an_input_line_holds_the_request_under_its_key() -> None:
    teacher = TeacherConfig(model="m")
    request = Request("\ud800 prompt\u2028", seed=1, chat=True)
    key = request_key(request, teacher, "https://api.openai.com/v1")
    line = input_line(key, request, teacher)
    assert line.count(b"\n") == 1
    assert json.loads(line)["custom_id"] == key
    assert len(key) <= 64
