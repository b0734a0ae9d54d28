"""Prices, what a run will cost, and a hard stop: the worst case of a request is reserved before it is sent.

Money is counted in whole pico-dollars (1e-12 USD), so that no sum drifts; floats are for people.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from math import ceil, inf
from random import Random
from typing import Any, Literal, NamedTuple

import yaml

from alpaca_ray.config import BudgetConfig, LimitsConfig, Price, UserError

PICO = 10**12
FRAMING_TOKENS = 64  # what a chat template adds to a prompt's text: OpenAI's about 10, those of open models up to 50
SNAPSHOT = re.compile(r"-([0-9]{4}|[0-9]{4}-[0-9]{2}-[0-9]{2})$")  # gpt-3.5-turbo-0125, gpt-4o-mini-2024-07-18
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Charge:
    """The tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Spent:
    """A sum of money and tokens."""

    pico_usd: int = 0
    tokens: int = 0

    @property
    def usd(self) -> float:
        """The nearest float."""
        return self.pico_usd / PICO

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.pico_usd + other.pico_usd, self.tokens + other.tokens)

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.pico_usd - other.pico_usd, self.tokens - other.tokens)


NOTHING = Spent()


def pico_usd(usd: float) -> int:
    """The nearest whole number: gives back what `Spent.usd` and `Budget.usd` were made from, below 4,000 USD."""
    return round(Fraction(usd) * PICO)


def price_of(model: str, override: Price | None = None) -> Price | None:
    """`override`, or the price in prices.yaml of `model` or of what it is a dated snapshot of. None: unknown."""
    if override is not None:
        return override
    prices, _ = _table()
    return prices.get(model, prices.get(SNAPSHOT.sub("", model)))


def worst_case(prompt: str, max_tokens: int) -> Charge:
    """No byte-level BPE makes more tokens than there are bytes. A JSON schema is billed too: append it to `prompt`."""
    return Charge(len(prompt.encode("utf-8", "surrogatepass")) + FRAMING_TOKENS, max_tokens)


class Budget:
    """Spent and reserved together never pass a limit, as long as no request takes more than was reserved for it.

    `spent`: what earlier tries of the run have paid. Raises UserError for `max_usd` with an unknown price.
    """

    def __init__(
        self,
        max_usd: float | None,
        max_tokens: int | None,
        price: Price | None,
        spent: Spent = NOTHING,
        batch: bool = False,
    ) -> None:
        if max_usd is not None and price is None:
            raise UserError(
                "generate.budget.max_usd is set, but the price of this model is not known: set generate.teacher.price "
                "(input_usd_per_million and output_usd_per_million), or limit generate.budget.max_tokens instead"
            )
        self._max_pico_usd = inf if max_usd is None else int(Fraction(str(max_usd)) * PICO)
        self._max_tokens = inf if max_tokens is None else max_tokens
        self._prompt_pico_usd, self._completion_pico_usd = _per_token(price, batch)
        self._reservations: dict[str, Spent] = {}
        self.spent, self.reserved = spent, NOTHING

    def reserve(self, key: str, charge: Charge) -> Literal["reserved", "wait", "exhausted"]:
        """Room for `charge` under `key`. "wait": there may be room when what is reserved is settled or released."""
        if key in self._reservations:
            raise ValueError(f"{key} is reserved already: settle or release it first")
        cost = self._cost(charge)
        after = self.spent + self.reserved + cost
        if after.pico_usd > self._max_pico_usd or after.tokens > self._max_tokens:
            return "wait" if self._reservations else "exhausted"
        self._reservations[key] = cost
        self.reserved += cost
        return "reserved"

    def settle(self, key: str, actual: Charge | None) -> float:
        """Book what a request took, and return its USD. None: not known, it may have been billed in full."""
        reserved = self._reservations.pop(key)
        cost = reserved if actual is None else self._cost(actual)
        self.reserved -= reserved
        self.spent += cost
        return cost.usd

    def release(self, key: str) -> None:
        """Never sent, or refused: nothing is charged."""
        self.reserved -= self._reservations.pop(key)

    def usd(self, charge: Charge) -> float:
        """0 where the price is not known."""
        return self._cost(charge).usd

    def _cost(self, charge: Charge) -> Spent:
        prompt = charge.prompt_tokens * self._prompt_pico_usd
        return Spent(prompt + charge.completion_tokens * self._completion_pico_usd, charge.tokens)


def exhausted(limits: BudgetConfig, spent: Spent) -> str:
    """Why a run has stopped at its budget, and how it goes on."""
    named = [f"generate.budget.max_usd={limits.max_usd:g}"] if limits.max_usd is not None else []
    named += [f"generate.budget.max_tokens={limits.max_tokens}"] if limits.max_tokens is not None else []
    return (
        f"the budget is spent: {' and '.join(named)} has no room for the worst case of one more request "
        f"(spent so far: {spent.usd:.4f} USD, {spent.tokens} tokens). The answers are kept; the same command with a "
        "higher budget goes on and pays for nothing again"
    )


class Range(NamedTuple):
    """5th percentile, expected value, 95th percentile."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class PilotRow:
    """What one request of the pilot took, and how many tasks of it were kept."""

    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    kept: int


@dataclass(frozen=True)
class Estimate:
    """What a run will take. `usd` None: the price is not known. `minutes` None: the Batch API takes up to 24 hours."""

    requests: Range
    prompt_tokens: Range
    completion_tokens: Range
    usd: Range | None
    minutes: Range | None

    def __str__(self) -> str:
        lines = [f"{'':20}{'5 %':>14}{'expected':>14}{'95 %':>14}"]
        for name, digits in (
            ("requests", 0),
            ("prompt_tokens", 0),
            ("completion_tokens", 0),
            ("usd", 2),
            ("minutes", 1),
        ):
            figures: Range | None = getattr(self, name)
            unknown = "price not known" if name == "usd" else "up to 24 hours"
            cells = unknown if figures is None else "".join(f"{figure:>14,.{digits}f}" for figure in figures)
            lines.append(f"{name.replace('_', ' '):20}{cells}")
        return "\n".join(lines)


def estimate(  # noqa: PLR0913 - the figures of a run
    pilot: Sequence[PilotRow],
    num_instructions: int,
    price: Price | None,
    *,
    limits: LimitsConfig,
    concurrency: int,
    rng: Random,
    batch: bool = False,
) -> Estimate:
    """The whole run from a pilot. The intervals are bootstrap percentiles: the pilot's rows drawn again with `rng`.

    They hold the pilot's chance alone. A growing pool rejects more duplicates than the pilot met, so a large run takes
    more. Raises UserError where the pilot kept nothing.
    """
    if not any(row.kept for row in pilot):
        raise UserError(f"a pilot of {len(pilot)} requests kept nothing: look at its rejects, or make it larger")
    per_token = _per_token(price, batch)

    def figures(rows: Sequence[PilotRow]) -> list[float]:
        kept = sum(row.kept for row in rows)
        if kept == 0:
            return [inf] * 5
        requests = ceil(num_instructions * len(rows) / kept)
        prompt, completion, latency_s = (
            requests * sum(column) / len(rows)
            for column in zip(*((row.prompt_tokens, row.completion_tokens, row.latency_s) for row in rows), strict=True)
        )
        usd = (prompt * per_token[0] + completion * per_token[1]) / PICO if price is not None else 0.0
        windows = max(
            requests / (limits.requests_per_minute or inf), (prompt + completion) / (limits.tokens_per_minute or inf)
        )
        return [requests, prompt, completion, usd, max(windows * limits.window_s, latency_s / concurrency) / 60]

    columns = zip(*(figures(rng.choices(pilot, k=len(pilot))) for _ in range(NUM_RESAMPLES)), strict=True)
    low, high = NUM_RESAMPLES // 20, NUM_RESAMPLES - NUM_RESAMPLES // 20 - 1
    ranges = []
    for expected, column in zip(figures(pilot), columns, strict=True):
        ordered = sorted(column)
        ranges.append(Range(ordered[low], expected, ordered[high]))
    requests, prompt, completion, usd, minutes = ranges
    return Estimate(requests, prompt, completion, usd if price is not None else None, None if batch else minutes)


@cache
def _table() -> tuple[dict[str, Price], Fraction]:
    """The prices of prices.yaml, and what the Batch API takes of them."""
    text = (resources.files("alpaca_ray") / "provider" / "prices.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    listed = (item for source in table["sources"] for item in source["models"].items())
    prices = {name: Price(input_usd_per_million=rates[0], output_usd_per_million=rates[1]) for name, rates in listed}
    return prices, Fraction(str(table["batch_factor"]))


def _per_token(price: Price | None, batch: bool) -> tuple[int, int]:
    """Pico-dollars of a prompt token and of a completion token, rounded up."""
    if price is None:
        return 0, 0
    factor = _table()[1] if batch else Fraction(1)
    rates = (price.input_usd_per_million, price.output_usd_per_million)
    prompt, completion = (ceil(Fraction(str(rate)) * factor * PICO / 10**6) for rate in rates)
    return prompt, completion
