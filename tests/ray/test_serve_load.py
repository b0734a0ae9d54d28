"""The deployed service under load and at fault: too many clients, leaving clients, moderation down; what it tells."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from alpaca_ray.cluster.local import free_ports
from alpaca_ray.config import AdmissionConfig, ModerationConfig, Placement, ServeArgs, UserError, WatermarkConfig
from tests.crowd import CONTEXT, MODEL, POLL_S, WATERMARK_KEY, Crowd, Outcome, Service, closed_loop, samples, service
from tests.moderation_server import KEY as MODERATION_KEY
from tests.moderation_server import ModerationServer, moderation_server
from tests.tiny import READABLE, write_tiny_model

BATCH_SIZE, MAX_WAITING = 16, 8
CAPACITY = 2 * BATCH_SIZE + MAX_WAITING
NUM_LEAVERS = 150  # benchmarks/serve_load.py has 500
DEADLINE_S = 60.0
CANARY_KEY, CANARY_PROMPT = "ar-canary-4b1d", "canary prompt 9f3c"
T = TypeVar("T")


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> None:
    """Not the one of this folder: the service has a head of its own, with a dashboard."""


@pytest.fixture(scope="module")
def judge() -> Iterator[ModerationServer]:
    with moderation_server() as server:
        yield server


def arguments(directory: Path, **fields: Any) -> ServeArgs:
    return ServeArgs(
        model=str(directory / MODEL),
        prompt_format="plain",
        dtype="float32",
        max_length=CONTEXT,
        max_batch_size=BATCH_SIZE,
        placement=Placement(num_cpus=1),
        watermark=WatermarkConfig(key_file=str(directory / "watermark_key")),
        **{"admission": AdmissionConfig(key_file=str(directory / "keys.jsonl"), max_waiting=MAX_WAITING)} | fields,
    )


@pytest.fixture(scope="module")
def applications(tmp_path_factory: pytest.TempPathFactory, judge: ModerationServer) -> dict[str, ServeArgs]:
    """/: OpenAI's endpoint is down all the time, and local patterns judge; /strict: `judge` alone."""
    directory = tmp_path_factory.mktemp("load")
    write_tiny_model(directory / MODEL, alphabet=READABLE, max_length=CONTEXT, ends=False)
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}/v1"
    degraded = ModerationConfig(backends=["openai", "local"], base_url=nobody)
    strict = ModerationConfig(backends=["openai"], base_url=judge.base_url, timeout_s=5.0)
    return {
        "/": arguments(directory, moderation=degraded),
        "/strict": arguments(directory, moderation=strict),
    }


@pytest.fixture(scope="module")
def running(applications: dict[str, ServeArgs]) -> Iterator[Service]:
    directory = Path(applications["/"].model).parent
    # All interfaces, as in production: the service has keys.
    with service(directory, {"OPENAI_API_KEY": MODERATION_KEY}, num_cpus=4, host="0.0.0.0") as started:
        started.deploy(applications)
        yield started


def with_crowd(running: Service, work: Callable[[Crowd], Coroutine[Any, Any, T]], route: str = "") -> T:
    async def scene() -> T:
        async with Crowd(running.cluster.serve_url + route, running.key.secret) as crowd:
            return await work(crowd)

    return asyncio.run(scene())


def eventually(is_so: Callable[[], bool]) -> bool:
    """Metrics come a second or two behind what they count."""
    ends_s = time.monotonic() + DEADLINE_S
    while not (found := is_so()) and time.monotonic() < ends_s:
        time.sleep(POLL_S)
    return found


def num_tasks(running: Service) -> float:
    page = running.metrics()
    found = samples(page, "tasks", application="main") + samples(page, "engine_tasks", application="main")
    assert len(found) == 2
    return sum(found)


def test_past_its_capacity_all_others_are_refused_with_429_and_told_when_to_come_back(running: Service) -> None:
    outcomes = with_crowd(running, lambda crowd: closed_loop(crowd, 4 * CAPACITY, 2, max_tokens=30))

    statuses = Counter(outcome.status for outcome in outcomes)
    accepted = [outcome for outcome in outcomes if outcome.status == 200]
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    assert set(statuses) == {200, 429}, "and every one has its answer, or the client's time-out had ended the test"
    assert len(accepted) >= CAPACITY
    assert all(outcome.is_complete and outcome.finish_reason == "length" for outcome in accepted)
    assert all(int(outcome.headers["retry-after"]) >= 1 for outcome in refused)
    assert {json.loads(outcome.body)["error"]["code"] for outcome in refused} == {"queue_full"}


def test_clients_that_leave_mid_stream_leave_nothing_behind(running: Service) -> None:
    async def leave(crowd: Crowd) -> tuple[list[Outcome], dict[str, Any]]:
        door = asyncio.Semaphore(CAPACITY)

        async def client() -> Outcome:
            async with door:
                return await crowd.admitted(leaves=True, max_tokens=CONTEXT - 10)

        outcomes = await asyncio.gather(*(client() for _ in range(NUM_LEAVERS)))
        return outcomes, await crowd.until_idle(DEADLINE_S)

    with_crowd(running, lambda crowd: crowd.complete(max_tokens=30))
    assert eventually(lambda: samples(running.metrics(), "engine_batch_size", application="main") == [0])
    before = num_tasks(running)
    outcomes, state = with_crowd(running, leave)

    assert len(outcomes) == NUM_LEAVERS
    assert all(outcome.text and outcome.finish_reason is None for outcome in outcomes)
    assert state == {"status": "ok", "num_running": 0, "num_waiting": 0}
    held = ("engine_batch_size", "engine_waiting", "engine_cached_tokens", "in_flight", "waiting")
    assert eventually(lambda: not any(sum(samples(running.metrics(), name, application="main")) for name in held))
    assert eventually(lambda: num_tasks(running) <= before)
    # All places are there for others.
    others = with_crowd(running, lambda crowd: closed_loop(crowd, CAPACITY, 1, max_tokens=30))
    assert [outcome.status for outcome in others] == [200] * CAPACITY


def test_no_header_of_a_client_steers_serve(running: Service) -> None:
    async def scene(crowd: Crowd) -> tuple[Outcome, Outcome, dict[str, Any]]:
        hurried = await crowd.complete(max_tokens=300, headers={"x-request-timeout-seconds": "0.001"})
        stubborn = {"x-request-disconnect-disabled": "1"}
        gone = await crowd.complete(leaves=True, max_tokens=CONTEXT - 10, headers=stubborn)
        return hurried, gone, await crowd.until_idle(DEADLINE_S)

    hurried, gone, state = with_crowd(running, scene)

    assert (hurried.status, hurried.is_complete) == (200, True)
    assert gone.text
    assert state["num_running"] == 0


def test_every_number_is_told_and_moves(running: Service) -> None:
    counts = (
        "requests_total", "first_event_s_count", "request_s_count", "tokens_total", "verdicts_total",
        "moderation_s_count", "engine_first_token_s_count", "engine_between_tokens_s_count", "engine_tokens_total",
        "engine_watermarked_tokens_total", "engine_steps_total",
    )  # fmt: skip
    gauges = (
        "in_flight", "waiting", "tasks", "engine_tokens_per_s", "engine_batch_size", "engine_waiting",
        "engine_cached_tokens", "engine_cache_tokens", "engine_tasks",
    )  # fmt: skip

    def totals() -> dict[str, float]:
        page = running.metrics()
        return {name: sum(samples(page, name, application="main")) for name in counts}

    before = totals()
    with_crowd(running, lambda crowd: crowd.complete(max_tokens=300))

    assert eventually(lambda: all(now > before[name] for name, now in totals().items())), (before, totals())
    page = running.metrics()
    assert {name for name in gauges if samples(page, name, application="main")} == set(gauges)
    assert samples(page, "engine_cache_tokens", application="main") == [BATCH_SIZE * CONTEXT]
    after = totals()
    assert after["engine_watermarked_tokens_total"] == after["engine_tokens_total"]
    refused = samples(page, "requests_total", application="main", status="429", refusal="queue_full")
    assert sum(refused) > 0, "by the crowd above"


def test_degraded_moderation_is_seen_in_the_metrics(running: Service) -> None:
    outcome = with_crowd(running, lambda crowd: crowd.complete(max_tokens=100))

    assert outcome.is_complete

    def told() -> bool:
        page = running.metrics()
        return (
            sum(samples(page, "verdicts_total", application="main", backend="local", degraded="true")) > 0
            and sum(samples(page, "moderation_failures_total", application="main", backend="openai")) > 0
            and samples(page, "breaker_open", application="main", backend="openai") == [1]
        )

    assert eventually(told)
    assert not samples(running.metrics(), "verdicts_total", application="main", degraded="false")


def test_a_stream_that_turns_bad_midway_ends_before_the_bad_sentence(running: Service, judge: ModerationServer) -> None:
    asked: dict[str, Any] = {"max_tokens": 1500, "seed": 4}
    whole = with_crowd(running, lambda crowd: crowd.complete(**asked), "/strict")
    middle = len(whole.text) // 2
    judge.marks[whole.text[middle : middle + 12]] = "violence"
    cut = with_crowd(running, lambda crowd: crowd.complete(**asked), "/strict")
    judge.marks.popitem()

    assert (whole.finish_reason, cut.finish_reason) == ("length", "content_filter")
    assert 0 < len(cut.text) <= middle
    assert whole.text.startswith(cut.text)
    # The whole sentence with the bad words is missing, and nothing before it.
    sentence_start = max(len(text) for batch in judge.batches for text in batch if whole.text[:middle].startswith(text))
    assert len(cut.text) == sentence_start
    assert eventually(
        lambda: sum(samples(running.metrics(), "verdicts_total", application="strict", verdict="flagged")) > 0
    )


def test_without_moderation_nothing_leaves_until_it_is_back(running: Service, judge: ModerationServer) -> None:
    async def scene(crowd: Crowd) -> tuple[Outcome, list[Outcome], list[Outcome], int, Outcome]:
        begun = asyncio.Event()
        stream = asyncio.create_task(crowd.complete(begun=begun, max_tokens=CONTEXT - 10))
        await begun.wait()
        judge.fault = "slow"
        slow = list(await asyncio.gather(*(crowd.complete(max_tokens=30) for _ in range(2))))
        judge.fault = 401
        wrong_key = [await crowd.complete(max_tokens=30) for _ in range(5)]
        num_asked = judge.num_requests
        wrong_key.append(await crowd.complete(max_tokens=30))
        num_asked = judge.num_requests - num_asked
        judge.fault = None
        judge.released.set()
        ends_s = time.monotonic() + DEADLINE_S
        while (after := await crowd.complete(max_tokens=30)).status != 200 and time.monotonic() < ends_s:
            await asyncio.sleep(POLL_S)
        return await stream, slow, wrong_key, num_asked, after

    def failed(reason: str) -> bool:
        page = running.metrics()
        return sum(samples(page, "moderation_failures_total", application="strict", reason=reason)) > 0

    stream, slow, wrong_key, num_asked, after = with_crowd(running, scene, "/strict")

    assert [(outcome.status, outcome.text) for outcome in slow + wrong_key] == [(503, "")] * 8
    assert {json.loads(outcome.body)["error"]["code"] for outcome in slow} == {"moderation_unavailable"}
    assert all(int(outcome.headers["retry-after"]) >= 1 for outcome in slow + wrong_key)
    assert num_asked == 0, "the breaker is open"
    assert (after.status, after.is_complete) == (200, True), "and has closed"
    assert stream.finish_reason == "content_filter", "it was cut where the judge fell silent"
    assert any(text.startswith(stream.text) for batch in judge.batches for text in batch), "all of it was judged"
    for reason in ("timeout", "authentication"):
        assert eventually(partial(failed, reason)), reason
    assert eventually(lambda: samples(running.metrics(), "breaker_open", application="strict") == [0])


def test_no_key_and_no_prompt_is_found_anywhere(running: Service) -> None:
    async def scene(crowd: Crowd) -> list[int]:
        asked: list[dict[str, Any]] = [
            {"prompt": CANARY_PROMPT, "max_tokens": 30, "headers": {"x-request-id": "found-in-the-log"}},
            {"prompt": CANARY_PROMPT, "stop": [CANARY_PROMPT], "max_tokens": 30},
            {"prompt": f"{CANARY_PROMPT}: how do I kill my neighbour with a bomb?"},
            {"prompt": CANARY_PROMPT, "max_tokens": CONTEXT},
            {"prompt": CANARY_PROMPT, CANARY_PROMPT: 1},
            {"prompt": CANARY_PROMPT, "model": CANARY_PROMPT},
            {"prompt": [CANARY_PROMPT, 1]},
            {"prompt": CANARY_PROMPT, "headers": {"Authorization": f"Bearer {CANARY_KEY}"}},
            {"prompt": CANARY_PROMPT, "headers": {"x-api-key": CANARY_KEY}, "max_tokens": 30},
        ]
        return [(await crowd.complete(**body)).status for body in asked]

    statuses = with_crowd(running, scene)
    pages = {
        path: running.get(path)
        for path in (
            "/api/serve/applications/", "/api/jobs/", "/logical/actors", "/api/v0/actors?detail=1",
            "/api/v0/tasks?detail=1", "/api/v0/workers?detail=1", "/nodes?view=summary",
        )
    }  # fmt: skip
    pages |= {"metrics": running.metrics(), "logs": running.logs()}

    assert statuses[0] == 200
    assert set(statuses) == {200, 400, 401, 404}
    assert all(pages.values()), {path: len(page) for path, page in pages.items()}
    assert "found-in-the-log" in pages["logs"], "or the wrong files were read"
    secrets = (CANARY_PROMPT, CANARY_KEY, running.key.secret, MODERATION_KEY, str(WATERMARK_KEY))
    assert not [(secret, place) for place, page in pages.items() for secret in secrets if secret in page]


def test_without_keys_it_listens_on_no_address_but_loopback(
    running: Service, applications: dict[str, ServeArgs]
) -> None:
    keyless = applications["/"].model_copy(update={"admission": AdmissionConfig()})
    with pytest.raises(UserError, match=r"0\.0\.0\.0 can be reached from other machines, and there are no API keys"):
        running.deploy(applications | {"/keyless": keyless})
