"""What a response says about rate limits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class LimitHeaders:
    """What a response says about limits; None: nothing, or nothing that can be read."""

    limit_requests: int | None = None
    limit_tokens: int | None = None
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    reset_requests_s: float | None = None
    reset_tokens_s: float | None = None
    retry_after_s: float | None = None


def parse_limit_headers(headers: Mapping[str, str]) -> LimitHeaders:
    """`x-ratelimit-*` and `retry-after` of a response, in any case; what cannot be read is None."""
    found = {name.lower(): value.strip() for name, value in headers.items()}
    return LimitHeaders(
        limit_requests=_count(found.get("x-ratelimit-limit-requests", "")) or None,
        limit_tokens=_count(found.get("x-ratelimit-limit-tokens", "")) or None,
        remaining_requests=_count(found.get("x-ratelimit-remaining-requests", "")),
        remaining_tokens=_count(found.get("x-ratelimit-remaining-tokens", "")),
        reset_requests_s=_seconds(found.get("x-ratelimit-reset-requests", "")),
        reset_tokens_s=_seconds(found.get("x-ratelimit-reset-tokens", "")),
        retry_after_s=_retry_after_s(found),
    )


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _seconds(text: str) -> float | None:
    """Of "2", "0.5", "20ms", "6m0s" or "1h2m"."""
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,12})?", text):
        return float(text)
    if not re.fullmatch(r"([0-9]{1,12}(\.[0-9]{1,12})?(ms|[smhd]))+", text):
        return None
    return sum(float(number) * DURATION_UNITS_S[unit] for number, unit in re.findall(r"([0-9.]+)(ms|[smhd])", text))


def _retry_after_s(found: Mapping[str, str]) -> float | None:
    """A date is taken relative to the response's own, so that clocks need not agree."""
    milliseconds = _seconds(found.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    seconds = _seconds(found.get("retry-after", ""))
    if seconds is not None:
        return seconds
    try:
        wait = parsedate_to_datetime(found["retry-after"]) - parsedate_to_datetime(found["date"])
    except (KeyError, TypeError, ValueError, OverflowError):  # TypeError: only one of them names its zone
        return None
    return max(wait.total_seconds(), 0.0)
