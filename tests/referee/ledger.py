"""Every request, in order: in memory, and one JSON line each in a file.

A line is in the operating system's hands before the first byte of the answer goes out.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tests.referee.windows import most_in_any_window

PAID_ROUTES = ("/v1/completions", "/v1/chat/completions")
CLIENT_LEFT = 499  # nginx's status for an answer that nobody waited for


def request_key(route: str, body: object) -> str:
    """SHA-256 of the route, a line break, and the body as JSON with sorted keys, no spaces, in ASCII."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{route}\n{canonical}".encode()).hexdigest()


@dataclass(slots=True)
class Entry:
    """One request. `status` is 0 while it runs and where the connection was cut before any byte."""

    seq: int
    method: str
    route: str
    arrived_s: float  # monotonic
    arrived_at: float  # Unix time
    key: str = ""  # request_key, of paid routes and of new batches
    model: str | None = None
    seed: int | None = None
    attempt: int = 0  # which request of this key that the limits let through; 0: none
    status: int = 0
    code: str | None = None  # of a refusal
    fault: str | None = None
    response_id: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reserved_tokens: int = 0  # charged at admission
    charged_tokens: int = 0  # charged in the end
    usd: float = 0.0
    finished_s: float | None = None  # monotonic
    connected: bool = True  # whether the client was there when the answer went out
    batch: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _NAMES}


_NAMES = tuple(field.name for field in fields(Entry))


class Ledger:
    """The entries, and the file they go to."""

    def __init__(self, path: str | None) -> None:
        self.entries: list[Entry] = []
        self.in_flight = self.most_in_flight = 0
        self._next = 0
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if path else None

    def open(self, method: str, route: str, arrived_s: float, arrived_at: float) -> Entry:
        """A new entry, for a request that is there as a whole."""
        entry = Entry(self._next, method, route, arrived_s, arrived_at)
        self._next += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.entries.append(entry)
        return entry

    def close(self, entry: Entry, finished_s: float) -> None:
        """The outcome is known: write the line."""
        entry.finished_s = finished_s
        self.in_flight -= 1
        if self._file is not None:
            os.write(self._file, json.dumps(entry.as_dict()).encode() + b"\n")

    def forget(self) -> None:
        """Start with no entries; the numbers go on, and so does the file."""
        self.entries = []
        self.most_in_flight = self.in_flight


def summary(ledger: Ledger, window_s: float, from_s: float | None, until_s: float | None) -> dict[str, Any]:
    """Counts, sums, the fullest windows and the steady rates, over the paid routes; batches only in the sums.

    `from_s` and `until_s`: the interval of the steady rates, in seconds since the first paid request; without them it
    is the time between the first and the last one, less a tenth of it at each end.
    """
    paid = [entry for entry in ledger.entries if entry.route in PAID_ROUTES]
    online = [entry for entry in paid if entry.batch is None]
    return {
        "requests": len(paid),
        "in_flight": ledger.in_flight,
        "most_in_flight": ledger.most_in_flight,
        "by_status": _counts(entry.status for entry in paid),
        "by_code": _counts(entry.code for entry in paid if entry.code),
        "by_fault": _counts(entry.fault for entry in paid if entry.fault),
        "by_route": _counts(f"{entry.method} {entry.route}" for entry in ledger.entries),
        "prompt_tokens": sum(entry.prompt_tokens for entry in paid),
        "completion_tokens": sum(entry.completion_tokens for entry in paid),
        "usd": math.fsum(entry.usd for entry in paid),
        "most": _most(online, window_s),
        "steady": _steady(online, from_s, until_s),
        "duplicates": _duplicates(paid),
        "billed_again": _billed_again(paid),
    }


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _most(online: list[Entry], window_s: float) -> dict[str, float]:
    """The fullest windows. `requests` counts refused ones too, `admitted` those that the limits let through."""
    most: dict[str, float] = {"window_s": window_s}
    for name, length_s in (("in_window", window_s), ("in_1s", 1.0)):
        for kind, amounts in (
            ("requests", [1] * len(online)),
            ("admitted", [int(entry.attempt > 0) for entry in online]),
            ("reserved_tokens", [entry.reserved_tokens if entry.attempt else 0 for entry in online]),
            ("charged_tokens", [entry.charged_tokens for entry in online]),
        ):
            most[f"{kind}_{name}"] = most_in_any_window([entry.arrived_s for entry in online], amounts, length_s)
    return most


def _steady(online: list[Entry], from_s: float | None, until_s: float | None) -> Mapping[str, float]:
    if not online:
        return {}
    first_s, whole_s = online[0].arrived_s, online[-1].arrived_s - online[0].arrived_s
    start_s = 0.1 * whole_s if from_s is None else from_s
    end_s = 0.9 * whole_s if until_s is None else until_s
    inside = [entry for entry in online if start_s <= entry.arrived_s - first_s < end_s and entry.attempt]
    per_minute = 60 / (end_s - start_s) if end_s > start_s else 0.0
    return {
        "from_s": start_s,
        "until_s": end_s,
        "requests_per_minute": len(inside) * per_minute,
        "answered_per_minute": sum(entry.status == 200 for entry in inside) * per_minute,
        "tokens_per_minute": sum(entry.charged_tokens for entry in inside) * per_minute,
        "reserved_tokens_per_minute": sum(entry.reserved_tokens for entry in inside) * per_minute,
    }


def _duplicates(paid: list[Entry]) -> dict[str, list[int]]:
    """The entries of each body that was answered whole, to a client that was there, more than once."""
    return _groups([entry for entry in paid if entry.status == 200 and entry.fault is None and entry.connected])


def _billed_again(paid: list[Entry]) -> dict[str, Any]:
    """Bodies that were billed more than once, whatever came of it, and what the further times cost."""
    billed = [entry for entry in paid if entry.charged_tokens]
    usd = {entry.seq: entry.usd for entry in billed}
    groups = _groups(billed)
    again = math.fsum(usd[seq] for seqs in groups.values() for seq in seqs[1:])
    return {"bodies": len(groups), "requests": sum(len(seqs) - 1 for seqs in groups.values()), "usd": again}


def _groups(entries: list[Entry]) -> dict[str, list[int]]:
    seqs: dict[str, list[int]] = {}
    for entry in entries:
        seqs.setdefault(entry.key, []).append(entry.seq)
    return {key: group for key, group in seqs.items() if len(group) > 1}
