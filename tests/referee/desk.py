"""Judges a paid request without knowing how it came: strict reading, limits, faults, answer, bill.

Nothing here waits, so requests are judged one after the other in the order of their arrival.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.referee import refusals
from tests.referee.answers import answers_to, latency_s, num_tokens
from tests.referee.bodies import Ask, read_ask
from tests.referee.faults import CUT_BEFORE_THE_FIRST_BYTE, LOGIN_PAGE, UNBILLED, choice, plays, refusal_of, spoilt
from tests.referee.ledger import CLIENT_LEFT, Entry, Ledger, request_key
from tests.referee.refusals import Refusal, duration_text
from tests.referee.settings import Fault, FaultKind, Settings
from tests.referee.windows import SlidingWindow, Slot


@dataclass(slots=True)
class Outcome:
    """What to send, and the entry to close before it is sent."""

    entry: Entry
    status: int
    body: bytes
    payload: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    latency_s: float = 0.0
    fault: Fault | None = None
    slot: Slot | None = None  # in the window of tokens


class Desk:
    """Holds the settings, the ledger, the windows, and how often each body came."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger(settings.ledger)
        self._requests, self._tokens = SlidingWindow(), SlidingWindow()
        self._attempts: Counter[str] = Counter()
        self.reset()

    def configure(self, changes: dict[str, Any]) -> None:
        """Change settings; the counts of `first` start anew where the faults change. Raises ValidationError."""
        settings = self.settings.changed(changes)
        if "faults" in changes:
            self._played = [0] * len(settings.faults)
        self.settings = settings

    def reset(self) -> None:
        """Forget the entries, the attempts, and what the windows hold."""
        self.ledger.forget()
        self._requests.clear()
        self._tokens.clear()
        self._attempts.clear()
        self.most_held_tokens = 0
        self._played = [0] * len(self.settings.faults)

    def judge(self, route: str, body: dict[str, Any] | Refusal, authorization: str | None) -> Outcome:
        """One request that came over HTTP."""
        entry = self.open(route)
        refusal = self.refused_key(authorization)
        if refusal is not None:
            return _refused(entry, refusal)
        ask = body if isinstance(body, Refusal) else self._read(entry, body)
        outcome = _refused(entry, ask) if isinstance(ask, Refusal) else self._admit(entry, ask)
        # OpenAI's refusals tell the limits too, those of a wrong body among them.
        outcome.headers = {**self._limit_headers(entry.arrived_s), **outcome.headers}
        return outcome

    def _admit(self, entry: Entry, ask: Ask) -> Outcome:
        refusal = self._over_limit(entry)
        if refusal is not None:
            return _refused(entry, refusal)
        self._requests.add(1, entry.arrived_s)
        slot = self._tokens.add(entry.reserved_tokens, entry.arrived_s)
        self.most_held_tokens = max(self.most_held_tokens, self._held_tokens(entry.arrived_s))
        outcome = self._answer(entry, ask)
        outcome.slot = slot
        return outcome

    def judge_row(self, route: str, body: dict[str, Any], batch: str) -> Outcome:
        """One row of a batch: no limits."""
        entry = self.open(route)
        entry.batch = batch
        ask = self._read(entry, body)
        return _refused(entry, ask) if isinstance(ask, Refusal) else self._answer(entry, ask)

    def open(self, route: str, method: str = "POST") -> Entry:
        """An entry that begins now."""
        return self.ledger.open(method, route, time.monotonic(), time.time())

    def close(self, outcome: Outcome, connected: bool = True) -> None:
        """The answer is about to go out, or the client has left: write the bill and the line."""
        entry, price = outcome.entry, self.settings.price
        kind = outcome.fault.kind if outcome.fault else None
        entry.connected = connected
        entry.status = 0 if kind in CUT_BEFORE_THE_FIRST_BYTE else outcome.status
        if not connected:
            entry.status = CLIENT_LEFT
        if outcome.status == 200 and kind not in UNBILLED:
            entry.charged_tokens = entry.prompt_tokens + entry.completion_tokens
            input_usd = entry.prompt_tokens * price.input_usd_per_million
            output_usd = entry.completion_tokens * price.output_usd_per_million
            entry.usd = (input_usd + output_usd) * (price.batch_factor if entry.batch else 1) / 1e6
        else:
            entry.prompt_tokens = entry.completion_tokens = 0
        if outcome.slot is not None:
            self._tokens.correct(outcome.slot, entry.charged_tokens)
        self.ledger.close(entry, time.monotonic())

    def refused_key(self, authorization: str | None) -> Refusal | None:
        """Whether the header carries the one good key."""
        if not authorization or not authorization.startswith("Bearer "):
            return refusals.no_key()
        return None if authorization == f"Bearer {self.settings.key}" else refusals.wrong_key()

    def _read(self, entry: Entry, body: dict[str, Any]) -> Ask | Refusal:
        entry.key = request_key(entry.route, body)
        ask = read_ask(entry.route, body)
        if isinstance(ask, Refusal):
            return ask
        entry.model, entry.seed = ask.model, ask.seed
        if ask.model not in self.settings.models:
            return refusals.no_such_model(ask.model)
        entry.prompt_tokens = sum(num_tokens(prompt) for prompt in ask.prompts)
        entry.reserved_tokens = entry.prompt_tokens + ask.max_tokens * ask.num_samples * len(ask.prompts)
        return ask

    def _over_limit(self, entry: Entry) -> Refusal | None:
        limits, now_s = self.settings.limits, entry.arrived_s
        for name, window, limit, amount in (
            ("requests", self._requests, limits.requests_per_minute, 1),
            ("tokens", self._tokens, limits.tokens_per_minute, entry.reserved_tokens),
        ):
            wait_s = 0.0 if limit is None else window.wait_s(amount, limit, limits.window_s, now_s)
            if wait_s != 0.0:
                used = window.held(limits.window_s, now_s)
                text = f"Rate limit reached on {name} per min: Limit {limit}, Used {used}, Requested {amount}."
                return refusals.rate_limited(name, text, self._retry_headers(wait_s))
        return None

    def _retry_headers(self, wait_s: float | None) -> dict[str, str]:
        """None: the request is too large for the limit, and waiting does not help."""
        limits = self.settings.limits
        if wait_s is None:
            return {}
        seconds = {"retry-after": str(math.ceil(wait_s))} if limits.retry_after else {}
        return seconds | ({"retry-after-ms": str(math.ceil(1000 * wait_s))} if limits.retry_after_ms else {})

    def _held_tokens(self, now_s: float) -> int:
        return self._tokens.held(self.settings.limits.window_s, now_s)

    def _limit_headers(self, now_s: float) -> dict[str, str]:
        limits = self.settings.limits
        headers: dict[str, str] = {}
        for name, window, limit in (
            ("requests", self._requests, limits.requests_per_minute),
            ("tokens", self._tokens, limits.tokens_per_minute),
        ):
            if limit is not None and limits.headers:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                held = window.held(limits.window_s, now_s)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - held))
                headers[f"x-ratelimit-reset-{name}"] = duration_text(window.empty_in_s(limits.window_s, now_s))
        return headers

    def _answer(self, entry: Entry, ask: Ask) -> Outcome:
        self._attempts[entry.key] += 1
        entry.attempt = self._attempts[entry.key]
        fault = self._fault(entry)
        entry.fault = fault.kind.value if fault else None
        refusal = refusal_of(fault, ask.model) if fault else None
        if refusal is not None:
            outcome = _refused(entry, refusal)
        else:
            payload = self._payload(entry, ask, fault)
            outcome = Outcome(entry, 200, json.dumps(payload).encode(), payload)
            outcome.latency_s = latency_s(ask, self.settings.answers)
        outcome.fault = fault
        if fault and fault.kind == FaultKind.LOGIN_PAGE:
            outcome.body, outcome.content_type = LOGIN_PAGE, "text/html"
        return outcome

    def _fault(self, entry: Entry) -> Fault | None:
        for place, fault in enumerate(self.settings.faults):
            if plays(fault, entry, self._played[place]):
                self._played[place] += 1
                return fault
        return None

    def _payload(self, entry: Entry, ask: Ask, fault: Fault | None) -> dict[str, Any]:
        answers = answers_to(ask, self.settings.answers)
        entry.completion_tokens = sum(answer.tokens for answer in answers)
        # The text depends on the request alone; the id tells one answer from the next.
        entry.response_id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{entry.key[:16]}-{entry.seq}"
        choices = [choice(ask.chat, i, answer.text, answer.finish_reason) for i, answer in enumerate(answers)]
        payload = {
            "id": entry.response_id,
            "object": "chat.completion" if ask.chat else "text_completion",
            "created": int(entry.arrived_at),
            "model": ask.model,
            "system_fingerprint": "fp_referee",
            "choices": choices,
            "usage": {
                "prompt_tokens": entry.prompt_tokens,
                "completion_tokens": entry.completion_tokens,
                "total_tokens": entry.prompt_tokens + entry.completion_tokens,
            },
        }
        return spoilt(payload, ask.chat, fault.kind) if fault else payload


def _refused(entry: Entry, refusal: Refusal) -> Outcome:
    entry.code = refusal.code
    return Outcome(entry, refusal.status, refusal.body(), refusal.payload(), refusal.headers)
