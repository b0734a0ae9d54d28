"""What each key may ask for in a minute: sliding windows of requests and tokens. Pure: the clock is an argument.

One process counts. Where several ingress replicas run, each of them allows that much.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from alpaca_ray.provider.window import Charge, Window
from alpaca_ray.serve.keys import Key

WINDOW_S = 60.0
BYTES_PER_TOKEN = 4  # of English text; what was used takes the estimate's place in the end
DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions; a chat answer may fill the context
MAX_CHOICES = 128


@dataclass(frozen=True)
class Exceeded:
    """A limit that has no room before `retry_in_s`."""

    limit: Literal["requests", "tokens"]
    retry_in_s: float


class Quotas:
    """The windows of all keys, by name: they outlive a new version of the key file."""

    def __init__(self) -> None:
        self._windows: dict[str, Window] = {}
        self._newest_s: dict[str, float] = {}

    def take(self, key: Key, tokens: int, now_s: float) -> Charge | Exceeded:
        """Room for one request and `tokens`, reserved until `settle`.

        A request that alone is above the limit counts as the limit: it goes when the minute is free.
        """
        window = self._windows.setdefault(key.name, Window(WINDOW_S))
        window.drop_until(now_s)
        most_requests, most_tokens = _limits(key)
        tokens = math.ceil(min(tokens, most_tokens))
        if window.holds(tokens, most_requests, most_tokens):
            charge = Charge(now_s, tokens)
            window.add(charge)
            self._newest_s[key.name] = now_s
            return charge
        free_s = window.earliest(now_s, math.inf, tokens, most_requests, most_tokens)
        return Exceeded("requests" if window.requests + 1 > most_requests else "tokens", free_s - now_s)

    def settle(self, key: Key, charge: Charge, requests: int, tokens: int) -> None:
        """What the request came to, in place of what was reserved; 0 and 0 if it was turned away."""
        self._windows[key.name].correct(charge, requests, tokens)

    def headers(self, key: Key, now_s: float) -> dict[str, str]:
        """OpenAI's x-ratelimit-* headers. A reset is when the whole limit is free again."""
        window = self._windows.setdefault(key.name, Window(WINDOW_S))
        window.drop_until(now_s)
        reset_s = max(self._newest_s.get(key.name, -math.inf) + WINDOW_S - now_s, 0.0)
        found = {}
        for what, limit, used in (
            ("requests", key.requests_per_minute, window.requests),
            ("tokens", key.tokens_per_minute, window.tokens),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{what}"] = str(limit)
                found[f"x-ratelimit-remaining-{what}"] = str(max(limit - used, 0))
                found[f"x-ratelimit-reset-{what}"] = f"{reset_s:.3f}s"
        return found


def _limits(key: Key) -> tuple[float, float]:
    return (
        math.inf if key.requests_per_minute is None else key.requests_per_minute,
        math.inf if key.tokens_per_minute is None else key.tokens_per_minute,
    )


def estimate_tokens(body: bytes, max_length: int) -> int:
    """Prompt by its bytes, and the most that may be generated. A body that is not valid costs what it weighs."""
    prompt = len(body) // BYTES_PER_TOKEN
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return prompt
    if not isinstance(asked, dict):
        return prompt
    given = asked.get("max_completion_tokens", asked.get("max_tokens"))
    default = DEFAULT_COMPLETION_TOKENS if "prompt" in asked else max_length
    prompts = asked.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    choices = min(several * _count(asked.get("n"), 1), MAX_CHOICES)
    return prompt + choices * min(_count(given, default), max_length)


def _count(value: Any, default: int) -> int:
    return value if type(value) is int and value >= 0 else default
