"""The referee over real HTTP: limits, ledger, answers, strictness, and every way to fail."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types import Batch
from rouge_score.tokenize import tokenize

from tests.referee import process as process_module
from tests.referee.ledger import request_key
from tests.referee.process import RefereeProcess
from tests.referee.refusals import duration_text
from tests.referee.settings import FaultKind
from tests.referee.windows import SlidingWindow, most_in_any_window

COMPLETIONS, CHAT = "completions", "chat/completions"
PROMPT = (
    "Write tasks.\n###\n3. Instruction: Name a colour.\n3. Input:\n<noinput>\n3. Output:\nRed.\n###\n4. Instruction:"
)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RefereeProcess]:
    with RefereeProcess(ledger=str(tmp_path_factory.mktemp("referee") / "ledger.jsonl")) as referee:
        yield referee


@pytest.fixture
def referee(process: RefereeProcess) -> RefereeProcess:
    """The shared process as it is after its start."""
    process.configure(
        limits={"requests_per_minute": None, "tokens_per_minute": None, "headers": True, "retry_after": True,
                "retry_after_ms": False},
        answers={"num_tasks": [7, 9], "output_words": [15, 60], "bad_share": 0.1, "latency_s": [0, 0]},
        faults=[],
    )  # fmt: skip
    process.reset()
    return process


class Reply:
    """What came over the wire."""

    def __init__(self, status: int, headers: dict[str, str], raw: bytes) -> None:
        self.status, self.headers, self.raw = status, headers, raw

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> tuple[int, str | None]:
        return self.status, self.json["error"]["code"]


def post(base_url: str, *bodies: Any, route: str = COMPLETIONS, key: str | None = "good-key") -> list[Reply]:
    """Send bodies one after the other."""

    async def run() -> list[Reply]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        async with aiohttp.ClientSession(headers=headers) as session:
            return [await send(session, f"{base_url}/{route}", body) for body in bodies]

    return asyncio.run(run())


async def send(session: aiohttp.ClientSession, url: str, body: Any, timeout_s: float = 30.0) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body)
    async with session.post(url, data=data, timeout=aiohttp.ClientTimeout(timeout_s)) as response:
        return Reply(response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read())


def body(seed: float = 0, **changes: Any) -> dict[str, Any]:
    return {"model": "referee", "prompt": PROMPT, "max_tokens": 3072, "seed": seed} | changes


def chat(seed: int = 0, **changes: Any) -> dict[str, Any]:
    message = {"role": "user", "content": PROMPT}
    return {"model": "referee", "messages": [message], "max_completion_tokens": 3072, "seed": seed} | changes


def text_of(reply: Reply) -> str:
    text = reply.json["choices"][0]["text"]
    assert isinstance(text, str)
    return text


# Windows


Events = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=30)


@given(Events, st.integers(1, 30))
def test_the_fullest_window_is_that_of_a_search_over_all(events: list[tuple[int, int]], window_s: int) -> None:
    events.sort()
    times_s, amounts = [float(t) for t, _ in events], [a for _, a in events]
    by_hand = [sum(a for t, a in events if end - window_s < t <= end) for end, _ in events]
    assert most_in_any_window(times_s, amounts, window_s) == max(by_hand, default=0)


@given(Events, st.integers(1, 30), st.integers(0, 9))
def test_a_window_holds_what_is_younger_than_its_length(
    events: list[tuple[int, int]], window_s: int, corrected: int
) -> None:
    window = SlidingWindow()
    charged: list[tuple[int, int]] = []
    for now_s, amount in sorted(events):
        slot = window.add(amount, now_s)
        window.correct(slot, min(amount, corrected))
        charged.append((now_s, min(amount, corrected)))
        assert window.held(window_s, now_s) == sum(a for t, a in charged if now_s - t < window_s)


def test_a_charge_from_before_a_clearing_does_not_come_back() -> None:
    window = SlidingWindow()
    slot = window.add(5, 0.0)
    window.clear()
    window.add(1, 1.0)
    window.correct(slot, 3)
    assert window.held(60.0, 2.0) == 1


@given(Events, st.integers(1, 30), st.integers(1, 40), st.integers(1, 9))
def test_after_the_wait_it_told_an_amount_fits_and_not_before(
    events: list[tuple[int, int]], window_s: int, limit: int, amount: int
) -> None:
    window, now_s = SlidingWindow(), 0
    for now_s, charge in sorted(events):
        window.add(charge, now_s)
    wait_s = window.wait_s(amount, limit, window_s, now_s)
    if wait_s is None:
        assert amount > limit
        return
    if wait_s > 0:
        assert window.held(window_s, now_s + wait_s - 0.5) + amount > limit
    assert window.held(window_s, now_s + wait_s) + amount <= limit


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.02, "20ms"), (1.0, "1s"), (8.64, "8.64s"), (60.0, "1m0s"), (360.0, "6m0s"), (3725.5, "1h2m5.5s")],
)
def test_durations_read_as_in_openai_s_headers(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# Limits


def test_a_request_over_the_limit_is_refused_and_told_when_to_come_back(referee: RefereeProcess) -> None:
    referee.configure(limits={"requests_per_minute": 3, "retry_after_ms": True})
    replies = post(referee.base_url, *(body(seed) for seed in range(4)))
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0"]
    refused = replies[-1]
    assert refused.json["error"]["type"] == "requests"
    assert refused.error == (429, "rate_limit_exceeded")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert int(refused.headers["retry-after-ms"]) <= 1000 * int(refused.headers["retry-after"])
    assert re.fullmatch(r"(\d+m)?[\d.]+m?s", refused.headers["x-ratelimit-reset-requests"])
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert "x-ratelimit-limit-tokens" not in refused.headers


def test_tokens_are_reserved_at_admission_and_corrected_by_the_answer(referee: RefereeProcess) -> None:
    reserved = -(-len(PROMPT) // 4) + 3072
    referee.configure(limits={"tokens_per_minute": reserved + 100})
    first, second = post(referee.base_url, body(0), body(1))
    usage = first.json["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-remaining-tokens"] == "100"
    assert (second.status, second.json["error"]["type"]) == (429, "tokens")
    assert second.headers["x-ratelimit-remaining-tokens"] == str(reserved + 100 - usage)
    assert [entry["reserved_tokens"] for entry in referee.ledger()] == [reserved, reserved]
    assert [entry["charged_tokens"] for entry in referee.ledger()] == [usage, 0]
    most = referee.summary()["most"]
    assert most["held_tokens"] == most["reserved_tokens_in_window"] == reserved
    assert most["charged_tokens_in_window"] == usage


def test_a_request_larger_than_the_limit_gets_no_promise(referee: RefereeProcess) -> None:
    referee.configure(limits={"tokens_per_minute": 100})
    (refused,) = post(referee.base_url, body())
    assert refused.error == (429, "rate_limit_exceeded")
    assert "retry-after" not in refused.headers


def test_a_wrong_body_is_told_the_limits_and_uses_none_of_them(referee: RefereeProcess) -> None:
    referee.configure(limits={"requests_per_minute": 1})
    refused, answered = post(referee.base_url, chat(messages=[]), chat(), route=CHAT)
    assert (refused.status, refused.headers["x-ratelimit-remaining-requests"]) == (400, "1")
    assert (answered.status, answered.headers["x-ratelimit-remaining-requests"]) == (200, "0")


def test_headers_can_be_switched_off(referee: RefereeProcess) -> None:
    referee.configure(limits={"requests_per_minute": 1, "headers": False, "retry_after": False})
    replies = post(referee.base_url, body(0), body(1))
    assert [reply.status for reply in replies] == [200, 429]
    assert not [name for reply in replies for name in reply.headers if name.startswith(("x-ratelimit", "retry"))]


def test_the_limit_holds_for_requests_that_come_at_once(referee: RefereeProcess) -> None:
    referee.configure(limits={"requests_per_minute": 20}, answers={"latency_s": [0.01, 0.05]})

    async def run() -> list[int]:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer good-key"}) as session:
            url = f"{referee.base_url}/{COMPLETIONS}"
            replies = await asyncio.gather(*(send(session, url, body(seed)) for seed in range(50)))
        return [reply.status for reply in replies]

    statuses = asyncio.run(run())
    assert (statuses.count(200), statuses.count(429)) == (20, 30)
    counts = referee.summary()
    assert (counts["most"]["admitted_in_window"], counts["most"]["requests_in_window"]) == (20, 50)
    assert 1 < counts["most_in_flight"] <= 50
    assert counts["in_flight"] == 0


# Ledger


def test_the_ledger_tells_what_was_asked_and_what_it_cost(referee: RefereeProcess, process: RefereeProcess) -> None:
    (reply,) = post(referee.base_url, body(5))
    (entry,) = referee.ledger()
    usage = reply.json["usage"]
    assert entry["key"] == request_key("/v1/completions", body(5))
    assert (entry["seed"], entry["status"], entry["attempt"], entry["connected"]) == (5, 200, 1, True)
    assert entry["response_id"] == reply.json["id"]
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert entry["usd"] == pytest.approx((1.5 * usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6)
    assert entry["arrived_s"] <= entry["finished_s"]
    path = process.configure()["ledger"]
    assert json.loads(Path(path).read_text().splitlines()[-1]) == entry


def test_the_key_knows_no_order_of_fields(referee: RefereeProcess) -> None:
    post(referee.base_url, body(5), dict(reversed(body(5).items())), body(6))
    first, second, other = referee.ledger()
    assert first["key"] == second["key"] != other["key"]
    assert referee.summary()["duplicates"] == {first["key"]: [first["seq"], second["seq"]]}
    again = referee.summary()["billed_again"]
    assert (again["bodies"], again["requests"], again["usd"]) == (1, 1, pytest.approx(second["usd"]))


def test_rates_are_those_of_the_interval_asked_for(referee: RefereeProcess) -> None:
    post(referee.base_url, *(body(seed) for seed in range(20)))
    entries = referee.ledger()
    whole_s = entries[-1]["arrived_s"] - entries[0]["arrived_s"]
    steady = referee.summary(0.0, whole_s + 1)["steady"]
    assert steady["requests_per_minute"] == pytest.approx(20 * 60 / (whole_s + 1))
    assert steady["tokens_per_minute"] == pytest.approx(
        sum(entry["charged_tokens"] for entry in entries) * 60 / (whole_s + 1)
    )
    middle = referee.summary()["steady"]
    assert (middle["from_s"], middle["until_s"]) == (pytest.approx(0.1 * whole_s), pytest.approx(0.9 * whole_s))


def test_a_client_that_leaves_is_billed_and_recorded(referee: RefereeProcess) -> None:
    referee.configure(faults=[{"kind": "timeout", "every": True}])

    async def run() -> None:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer good-key"}) as session:
            with pytest.raises(asyncio.TimeoutError):
                await send(session, f"{referee.base_url}/{COMPLETIONS}", body(), timeout_s=0.2)

    asyncio.run(run())
    (entry,) = until_closed(referee)
    assert (entry["status"], entry["connected"], entry["fault"]) == (499, False, "timeout")
    assert entry["usd"] > 0


def until_closed(referee: RefereeProcess) -> list[dict[str, Any]]:
    """The ledger once nothing is in flight: each question is a turn of the referee's loop."""
    for _ in range(1000):
        if referee.summary()["in_flight"] == 0:
            return referee.ledger()
    raise AssertionError("a request never ended")


# Answers


def test_an_answer_goes_on_where_the_prompt_ends(referee: RefereeProcess) -> None:
    referee.configure(answers={"num_tasks": [5, 5], "bad_share": 0})
    (reply,) = post(referee.base_url, body())
    whole = "4. Instruction:" + text_of(reply)
    headings = re.findall(r"^(\d+)\. (Instruction|Input|Output):", whole, re.MULTILINE)
    assert headings == [(str(n), name) for n in range(4, 9) for name in ("Instruction", "Input", "Output")]
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert not re.search(r"[{}|]", whole)


def test_a_chat_answer_carries_its_headings(referee: RefereeProcess) -> None:
    first, after_examples = post(
        referee.base_url,
        chat(),
        chat(messages=[{"role": "user", "content": "1. Instruction: Name a colour.\n1. Output:\nRed."}]),
        route=CHAT,
    )
    content = first.json["choices"][0]["message"]["content"]
    assert content.startswith("###\n4. Instruction: ")
    assert after_examples.json["choices"][0]["message"]["content"].startswith("###\n2. Instruction: ")


def test_a_structured_answer_is_json(referee: RefereeProcess) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "tasks", "strict": True, "schema": {"type": "object"}}}
    (reply,) = post(referee.base_url, chat(response_format=form), route=CHAT)
    tasks = json.loads(reply.json["choices"][0]["message"]["content"])["tasks"]
    assert 7 <= len(tasks) <= 9
    assert {tuple(task) for task in tasks} == {("instruction", "input", "output")}


def test_a_stop_sequence_and_a_length_cut_the_answer(referee: RefereeProcess) -> None:
    whole, stopped, cut = post(referee.base_url, body(), body(stop=["\n6. Instruction:"]), body(max_tokens=10))
    text = text_of(whole)
    assert text_of(stopped) == text[: text.index("\n6. Instruction:")]
    assert stopped.json["choices"][0]["finish_reason"] == "stop"
    assert text_of(cut) == text[:40]
    assert (cut.json["choices"][0]["finish_reason"], cut.json["usage"]["completion_tokens"]) == ("length", 10)


def test_answers_depend_on_the_request_alone(referee: RefereeProcess) -> None:
    bodies = [body(0), body(1), body(0, prompt="Another. 1. Instruction:"), body(0, n=2)]
    here = post(referee.base_url, *bodies)
    with RefereeProcess() as other:
        there = post(other.base_url, *reversed(bodies))[::-1]
    contents = [(reply.json["choices"], reply.json["usage"]) for reply in here]
    assert contents == [(reply.json["choices"], reply.json["usage"]) for reply in there]
    assert len({json.dumps(content) for content in contents}) == 4
    first, second = here[3].json["choices"]
    assert first["text"] != second["text"]


def test_answers_are_varied(referee: RefereeProcess) -> None:
    referee.configure(answers={"bad_share": 0})
    replies = post(referee.base_url, *(body(seed) for seed in range(40)))
    instructions = re.findall(r"Instruction: (.+)", "".join(f"Instruction:{text_of(reply)}\n" for reply in replies))
    assert len(instructions) > 250
    assert len(set(instructions)) == len(instructions)
    assert len({word for text in instructions for word in tokenize(text, None)}) > 600


def test_some_tasks_are_bad_in_known_ways(referee: RefereeProcess) -> None:
    referee.configure(answers={"bad_share": 1})
    replies = post(referee.base_url, *(body(seed) for seed in range(20)))
    text = "".join(f"\nInstruction:{text_of(reply)}" for reply in replies)
    instructions = re.findall(r"Instruction: (.+)", text)
    assert len(set(instructions)) < len(instructions)
    assert re.search(r"picture|video|graph|image", text)
    assert re.search(r"\d+\. Outcome:", text)


# Strictness


def test_the_referee_shares_no_code_with_what_it_judges() -> None:
    sources = list(Path(process_module.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    assert not [path for path in sources if re.search(r"^\s*(from|import) alpaca_ray", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize(
    ("route", "sent", "param", "code"),
    [
        (COMPLETIONS, body(surprise=1), "surprise", "unknown_parameter"),
        (COMPLETIONS, body(messages=[]), "messages", "unknown_parameter"),
        (COMPLETIONS, body(max_tokens="7"), "max_tokens", "invalid_type"),
        (COMPLETIONS, body(max_tokens=0), "max_tokens", "invalid_value"),
        (COMPLETIONS, body(temperature=3), "temperature", "invalid_value"),
        (COMPLETIONS, body(seed=1.5), "seed", "invalid_type"),
        (COMPLETIONS, body(stop=["a"] * 5), "stop", "invalid_type"),
        (COMPLETIONS, {"model": "referee"}, "prompt", "missing_required_parameter"),
        (COMPLETIONS, {"prompt": "x"}, "model", "missing_required_parameter"),
        (CHAT, chat(prompt="x"), "prompt", "unknown_parameter"),
        (CHAT, chat(messages=[{"role": "robot", "content": "x"}]), "messages.0.role", "invalid_value"),
        (CHAT, chat(messages=[]), "messages", "invalid_value"),
        (CHAT, chat(max_tokens=1), "max_tokens", None),
        (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema", None),
        (COMPLETIONS, b"{", None, None),
        (COMPLETIONS, b"[]", None, None),
    ],
)
def test_a_wrong_body_is_refused(referee: RefereeProcess, route: str, sent: Any, param: str, code: str) -> None:
    (reply,) = post(referee.base_url, sent, route=route)
    assert reply.error == (400, code)
    assert reply.json["error"]["param"] == param
    assert reply.json["error"]["type"] == "invalid_request_error"
    (entry,) = referee.ledger()
    assert (entry["status"], entry["code"], entry["usd"], entry["attempt"]) == (400, code, 0, 0)


def test_keys_models_and_routes_are_checked(referee: RefereeProcess) -> None:
    (missing,) = post(referee.base_url, body(), key=None)
    (wrong,) = post(referee.base_url, body(), key="bad-key")
    (unknown,) = post(referee.base_url, body(model="gpt-9"))
    (nowhere,) = post(referee.base_url, {}, route="embeddings")
    assert missing.status == 401
    assert wrong.error == (401, "invalid_api_key")
    assert unknown.error == (404, "model_not_found")
    assert nowhere.error == (404, "unknown_url")


def test_settings_are_checked(referee: RefereeProcess) -> None:
    limits: list[dict[str, Any]] = [{"rpm": 1}, {"requests_per_minute": 0}, {"window_s": 0}]
    faults: list[dict[str, Any]] = [{"kind": "timeout"}, {"kind": "x", "every": True}, {"kind": "reset", "first": 0}]
    wrongs: list[dict[str, Any]] = [
        {"limit": {}},
        *({"limits": one} for one in limits),
        *({"faults": [one]} for one in faults),
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="validation error"):
            referee.configure(**wrong)


# Faults

REFUSED = {
    FaultKind.UNAUTHORIZED: (401, "invalid_api_key"),
    FaultKind.FORBIDDEN: (403, "permission_denied"),
    FaultKind.MODEL_NOT_FOUND: (404, "model_not_found"),
    FaultKind.INSUFFICIENT_QUOTA: (429, "insufficient_quota"),
    FaultKind.RATE_LIMITED: (429, "rate_limit_exceeded"),
    FaultKind.SERVER_ERROR: (500, None),
    FaultKind.UNAVAILABLE: (503, None),
    FaultKind.CONTENT_FILTER_REFUSAL: (400, "content_filter"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_costs_nothing_and_passes(referee: RefereeProcess, kind: FaultKind) -> None:
    referee.configure(faults=[{"kind": kind, "share": 1.0}])
    refused, retried = post(referee.base_url, body(), body())
    assert refused.error == REFUSED[kind]
    assert retried.status == 200
    first, second = referee.ledger()
    assert (first["fault"], first["usd"], first["charged_tokens"], first["attempt"]) == (kind, 0, 0, 1)
    assert (second["fault"], second["attempt"]) == (None, 2)
    assert second["usd"] > 0


def test_a_fault_s_429_carries_retry_after_where_told(referee: RefereeProcess) -> None:
    referee.configure(
        faults=[{"kind": "rate_limited", "first": 1}, {"kind": "rate_limited", "first": 1, "retry_after_s": 7}]
    )
    replies = post(referee.base_url, body(), body(), body())
    assert [(reply.status, reply.headers.get("retry-after")) for reply in replies] == [
        (429, None), (429, "7"), (200, None)
    ]  # fmt: skip


SPOILT: dict[FaultKind, Callable[[Any], bool]] = {
    FaultKind.EMPTY_CHOICES: lambda answer: not answer["choices"],
    FaultKind.WRONG_MODEL: lambda answer: bool(answer["model"] == "another-model"),
    FaultKind.CONTENT_FILTER: lambda answer: (
        [answer["choices"][0][name] for name in ("finish_reason", "text")]
        == [
            "content_filter",
            "",
        ]
    ),
    FaultKind.NULL_TEXT: lambda answer: answer["choices"][0]["text"] is None,
    FaultKind.NO_USAGE: lambda answer: "usage" not in answer,
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_answer_is_billed(referee: RefereeProcess, kind: FaultKind) -> None:
    referee.configure(faults=[{"kind": kind, "every": True}])
    (reply,) = post(referee.base_url, body())
    assert reply.status == 200
    assert SPOILT[kind](reply.json)
    (entry,) = referee.ledger()
    assert (entry["fault"], entry["status"]) == (kind, 200)
    assert entry["usd"] > 0


def test_a_login_page_is_no_json_and_costs_nothing(referee: RefereeProcess) -> None:
    referee.configure(faults=[{"kind": "login_page", "every": True}])
    (reply,) = post(referee.base_url, body())
    assert (reply.status, reply.headers["content-type"].split(";")[0]) == (200, "text/html")
    assert reply.raw.startswith(b"<!DOCTYPE html>")
    assert referee.ledger()[0]["usd"] == 0


def test_a_truncated_answer_is_half_of_the_right_one(referee: RefereeProcess) -> None:
    referee.configure(faults=[{"kind": "truncated_json", "share": 1.0}])
    cut, whole = post(referee.base_url, body(), body())
    assert int(cut.headers["content-length"]) == len(cut.raw)
    with pytest.raises(json.JSONDecodeError):
        _ = cut.json
    assert text_of(whole).startswith(cut.raw.decode().split('"text": "')[1].encode().decode("unicode_escape")[:200])
    assert all(entry["usd"] > 0 for entry in referee.ledger())


@pytest.mark.parametrize("kind", ["reset", "reset_in_body", "short_body"])
def test_a_broken_connection_is_an_error_of_the_client(referee: RefereeProcess, kind: str) -> None:
    referee.configure(faults=[{"kind": kind, "every": True}])
    with pytest.raises(aiohttp.ClientError):
        post(referee.base_url, body())
    entries = referee.ledger()  # aiohttp sends again when a kept connection was reset
    assert {(entry["fault"], entry["status"]) for entry in entries} == {(kind, 0 if kind == "reset" else 200)}
    assert all((entry["usd"] == 0) == (kind == "reset") for entry in entries)


def test_a_slow_body_is_whole(referee: RefereeProcess) -> None:
    referee.configure(faults=[{"kind": "slow_body", "every": True, "duration_s": 0.2}])
    (reply,) = post(referee.base_url, body())
    assert text_of(reply).count("Output:") > 3


def test_a_timeout_ends_by_itself_in_the_end(referee: RefereeProcess) -> None:
    referee.configure(faults=[{"kind": "timeout", "every": True, "duration_s": 0.05}])
    with pytest.raises(aiohttp.ClientError):
        post(referee.base_url, body())
    assert {entry["status"] for entry in referee.ledger()} == {0}


def test_faults_are_chosen_by_seed_first_share_and_attempt(referee: RefereeProcess) -> None:
    referee.configure(faults=[{"kind": "server_error", "seeds": [1, 3], "attempts": 2}])
    replies = post(referee.base_url, *(body(seed) for seed in (0, 1, 1, 1, 2, 3)))
    assert [reply.status for reply in replies] == [200, 500, 500, 200, 200, 500]
    referee.configure(faults=[{"kind": "unavailable", "first": 2}])
    assert [reply.status for reply in post(referee.base_url, body(8), body(8), body(8))] == [503, 503, 200]
    referee.configure(faults=[{"kind": "server_error", "share": 0.3}])
    shares = [
        [reply.status for reply in post(referee.base_url, *(body(seed) for seed in range(100, 200)))].count(500)
        for _ in range(2)
    ]
    assert 15 < shares[0] < 45
    assert shares[1] == 0


# Batches


def openai_client(referee: RefereeProcess) -> OpenAI:
    return OpenAI(api_key="good-key", base_url=referee.base_url, max_retries=0, timeout=30)


def rows(*bodies: dict[str, Any], **changes: Any) -> bytes:
    lines = [
        {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/completions", "body": row} | changes
        for i, row in enumerate(bodies)
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


def start_batch(client: OpenAI, content: bytes, metadata: dict[str, str] | None = None) -> Batch:
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(content)
    assert client.files.content(file.id).read() == content
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata=metadata
    )


def lines_of(client: OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    lines = [json.loads(line) for line in client.files.content(file_id).read().splitlines()]
    return {line["custom_id"]: line for line in lines}


def test_a_batch_gives_the_answers_of_single_requests_at_half_the_price(referee: RefereeProcess) -> None:
    bodies = [body(seed) for seed in range(5)]
    single = post(referee.base_url, *bodies)
    usd = sum(entry["usd"] for entry in referee.ledger())
    referee.reset()
    with openai_client(referee) as client:
        batch = start_batch(client, rows(*bodies), {"run": "seven"})
        assert batch.status == "validating"
        assert [client.batches.retrieve(batch.id).status for _ in range(2)] == ["in_progress", "completed"]
        done = next(listed for listed in client.batches.list() if listed.id == batch.id)
        assert (done.status, done.metadata, done.error_file_id) == ("completed", {"run": "seven"}, None)
        assert done.request_counts is not None
        assert (done.request_counts.total, done.request_counts.completed) == (5, 5)
        lines = lines_of(client, done.output_file_id)
    for i, reply in enumerate(single):
        response = lines[f"request-{i}"]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"] == reply.json["choices"]
    counts = referee.summary()
    assert (counts["requests"], counts["by_status"]) == (5, {"200": 5})
    assert counts["usd"] == pytest.approx(usd / 2)
    assert [e["batch"] for e in referee.ledger() if (e["method"], e["route"]) == ("POST", "/v1/batches")] == [batch.id]
    assert counts["most"]["requests_in_window"] == 0  # limits are not for batches


def test_rows_of_a_batch_fail_one_by_one(referee: RefereeProcess) -> None:
    referee.configure(
        faults=[{"kind": "server_error", "seeds": [1]}, {"kind": "timeout", "seeds": [2]}],
        batches={"expires_after_rows": 4},
    )
    bodies = [body(0), body(1), body(2), body(3, surprise=1), body(4)]
    with openai_client(referee) as client:
        batch = start_batch(client, rows(*bodies))
        done = [client.batches.retrieve(batch.id) for _ in range(2)][-1]
        assert done.status == "expired"
        answered, failed = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
    referee.configure(batches={"expires_after_rows": None})
    assert list(answered) == ["request-0"]
    assert failed["request-1"]["response"]["status_code"] == 500
    assert failed["request-3"]["response"]["body"]["error"]["code"] == "unknown_parameter"
    assert {failed[f"request-{i}"]["error"]["code"] for i in (2, 4)} == {"batch_expired"}
    assert [entry["usd"] > 0 for entry in referee.ledger() if entry["route"] == "/v1/completions"] == [
        True, False, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "codes"),
    [
        (b"", ["invalid_file_size"]),
        (b"no json", ["invalid_request"]),
        (rows(body(0), body(1), custom_id="same"), ["duplicate_custom_id"]),
        (rows(body(0), url="/v1/chat/completions"), ["mismatched_endpoint"]),
        (rows(body(0), surprise=1), ["invalid_request"]),
        (rows(body(0), body(1, model="gpt-4o-mini")), ["mismatched_model"]),
    ],
)
def test_a_file_with_a_wrong_row_fails_its_batch(referee: RefereeProcess, content: bytes, codes: list[str]) -> None:
    with openai_client(referee) as client:
        batch = client.batches.retrieve(start_batch(client, content).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data or []] == codes


def test_a_batch_can_be_cancelled_once(referee: RefereeProcess) -> None:
    with openai_client(referee) as client:
        batch = start_batch(client, rows(body()))
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert client.batches.retrieve(batch.id).status == "cancelled"
        with pytest.raises(ConflictError):
            client.batches.cancel(batch.id)
    assert referee.summary()["requests"] == 0


def test_a_batch_waits_for_as_many_polls_as_told(referee: RefereeProcess) -> None:
    referee.configure(batches={"polls_per_step": 2})
    with openai_client(referee) as client:
        batch = start_batch(client, rows(body()))
        statuses = [client.batches.retrieve(batch.id).status for _ in range(5)]
    referee.configure(batches={"polls_per_step": 1})
    assert statuses == ["validating", "in_progress", "in_progress", "completed", "completed"]


def test_files_and_batches_are_checked(referee: RefereeProcess) -> None:
    with openai_client(referee) as client:
        with pytest.raises(BadRequestError):
            client.files.create(file=("requests.jsonl", b"{}"), purpose="fine-tune")
        with pytest.raises(NotFoundError):
            client.batches.create(input_file_id="file-x", endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(NotFoundError):
            client.batches.retrieve("batch_x")
    (refused,) = post(referee.base_url, {"input_file_id": "x", "surprise": 1}, route="batches")
    assert refused.status == 400
