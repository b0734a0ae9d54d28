"""What every request of a run has to pass, wherever it is sent from: rate limits, budget, the reasons to stop.

One gate serves the whole cluster; its actor is in pool.py. Plain Python: the clock is an argument.
"""

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig, LimitsConfig, UserError
from alpaca_ray.provider.budget import Budget, Charge, Spent, exhausted, pico_usd, price_of
from alpaca_ray.provider.failures import FATAL_ERRORS, FINAL_ERRORS, UNKNOWN_COST_ERRORS
from alpaca_ray.provider.journal import Journal
from alpaca_ray.provider.limiter import Grant, LimiterState, LimitHeaders, Outcome, RateLimiter, Status, cool_down_s

MIN_FAILED = 5  # fewer failures say nothing about a run
BUDGET_RETRY_S = 0.25
_LEASE_MARGIN_S = 30.0  # beyond the time-out: then the sender of a lease is dead


@dataclass(frozen=True)
class Ask:
    """A request that wants to go out. `tokens`: what the server's limit will count; `worst`: what it can cost."""

    key: str
    tokens: int
    worst: Charge
    replayed: bool = False  # the sender has looked into the journal, and there is no answer


@dataclass(frozen=True)
class Permit:
    """Send `delay_s` after the gate's answer, or give the lease back."""

    key: str
    lease_id: str
    delay_s: float


@dataclass(frozen=True)
class Permits:
    """`replay`: keys that someone else has sent before, see the journal first. `stopped`: why nothing goes out."""

    granted: tuple[Permit, ...] = ()
    replay: tuple[str, ...] = ()
    stopped: str | None = None
    retry_in_s: float = 0.0


@dataclass(frozen=True)
class Report:
    """What came of a lease. `final`: the sender does not try this request again."""

    lease_id: str
    key: str
    error: str | None
    usage: Charge
    headers: LimitHeaders
    final: bool
    detail: str = ""


@dataclass(frozen=True)
class GateState:
    """For progress views. `failed`: requests given up; `retried`: attempts that failed and were made again."""

    limiter: LimiterState
    answered: int
    failed: int
    retried: int
    tokens: int
    usd: float
    reserved_usd: float
    stopped: str | None


@dataclass
class _Reservation:
    lease_id: str
    expires_s: float


class Gate:
    """Grants leases to send, settles them, and stops a run for good.

    A run stops at its budget, at an error that every further request would meet, and when more than
    `max_failed_share` of its requests were given up. `restarted`: an earlier gate of this run has died with its
    books. The new one waits until no lease of the old one can still be sent, then reads the journal, where everything
    stands that was.
    """

    def __init__(
        self,
        config: GenerateConfig,
        run: RunDirectory,
        journal_directory: str,
        *,
        restarted: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._clock = config, clock
        self._run, self._directory = run, journal_directory
        self._stopped: str | None = None
        self._counts: Counter[str] = Counter()
        self._silent_since_s: float | None = None  # the first failure after the last answer
        self._owners: dict[str, str] = {}
        self._reservations: dict[str, _Reservation] = {}
        self._expiries: deque[tuple[float, str, str]] = deque()  # expires_s, key, lease_id
        self._budget: Budget | None = None
        limits, journal = config.limits, Journal(run, journal_directory)
        self._opens_s = clock() + _wait_s(limits, restarted, time.time() - journal.newest_at)
        self._limiter = RateLimiter(
            limits.requests_per_minute,
            limits.tokens_per_minute,
            window_s=limits.window_s,
            lease_timeout_s=config.teacher.timeout_s + _LEASE_MARGIN_S,
            cool_down_until_s=self._opens_s,
            epoch=uuid.uuid4().hex[:8],
        )
        if not restarted:
            self._open(journal)

    def acquire(self, owner: str, asks: Sequence[Ask]) -> Permits:
        """Leases for as many of the requests as may be sent soon. `owner`: the actor that asks."""
        now_s = self._clock()
        if self._budget is None:
            if now_s < self._opens_s:
                return Permits(retry_in_s=self._opens_s - now_s)
            self._open(Journal(self._run, self._directory))
        self._expire(now_s)
        replay = tuple(ask.key for ask in asks if self._is_others(owner, ask))
        reserved = self._reserve([ask for ask in asks if ask.key not in replay])
        grant = self._grant(reserved, now_s)
        if self._stopped is not None:
            self._release(reserved)
            return Permits(stopped=self._stopped)
        self._release(reserved[len(grant.leases) :])
        permits = []
        for ask, lease in zip(reserved, grant.leases, strict=False):
            self._owners[ask.key] = owner
            self._hold(ask.key, lease.id, lease.start_s + self._config.teacher.timeout_s + _LEASE_MARGIN_S)
            permits.append(Permit(ask.key, lease.id, lease.start_s - now_s))
        waits_for_budget = len(reserved) < len(asks) - len(replay)
        return Permits(
            tuple(permits), replay, retry_in_s=grant.retry_in_s or (BUDGET_RETRY_S if waits_for_budget else 0.0)
        )

    def give_back(self, permits: Iterable[Permit]) -> None:
        """Leases that were not used."""
        for permit in permits:
            self._limiter.give_back([permit.lease_id], self._clock())
            if self._drop(permit.key, permit.lease_id):
                self._books.release(permit.key)

    def settle(self, reports: Sequence[Report]) -> None:
        """Book what came of leases. May be told twice of one: the second time changes nothing but the counts."""
        for report in reports:
            known = report.error is None or report.error in FINAL_ERRORS
            outcome = Outcome(_status(report.error), report.usage.tokens if known else None, report.headers)
            self._limiter.settle(report.lease_id, outcome, self._clock())
            if self._drop(report.key, report.lease_id):
                self._book(report, known)
            self._count(report)

    def stop(self, reason: str) -> None:
        """Let nothing more out. The first reason stays."""
        self._stopped = self._stopped or reason

    def state(self) -> GateState:
        """The figures of now."""
        budget = self._budget
        return GateState(
            limiter=self._limiter.snapshot(self._clock()),
            answered=self._counts["answered"],
            failed=self._counts["failed"],
            retried=self._counts["retried"],
            tokens=budget.spent.tokens if budget else 0,
            usd=budget.spent.usd if budget else 0.0,
            reserved_usd=budget.reserved.usd if budget else 0.0,
            stopped=self._stopped,
        )

    @property
    def _books(self) -> Budget:
        assert self._budget is not None
        return self._budget

    def _open(self, journal: Journal) -> None:
        """Take over what earlier gates have let out. What was sent and never heard of counts at its worst."""
        spent = journal.spent
        for worst in journal.in_flight():
            spent = Spent(spent.pico_usd + pico_usd(worst.usd), spent.tokens + worst.tokens)
        config = self._config
        price = price_of(config.teacher.model, config.teacher.price)
        self._budget = Budget(config.budget.max_usd, config.budget.max_tokens, price, spent)
        self._owners = dict.fromkeys(journal.sent_keys(), "")

    def _is_others(self, owner: str, ask: Ask) -> bool:
        return not ask.replayed and self._owners.get(ask.key, owner) != owner

    def _reserve(self, asks: Sequence[Ask]) -> list[Ask]:
        """Those that the budget has room for; stops the run where it never will have."""
        reserved: list[Ask] = []
        for ask in asks:
            if ask.key in self._reservations:  # its sender died and it may have been billed
                self._charge_worst(ask.key)
            verdict = self._books.reserve(ask.key, ask.worst)
            if verdict == "reserved":
                reserved.append(ask)
                continue
            if verdict == "exhausted":
                self.stop(exhausted(self._config.budget, self._books.spent))
            break
        return reserved

    def _grant(self, asks: Sequence[Ask], now_s: float) -> Grant:
        if self._stopped is not None:
            return Grant((), 0.0)
        try:
            return self._limiter.acquire([ask.tokens for ask in asks], now_s)
        except UserError as error:  # a request that no window has room for
            self.stop(str(error))
            return Grant((), 0.0)

    def _release(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            self._books.release(ask.key)

    def _hold(self, key: str, lease_id: str, expires_s: float) -> None:
        self._reservations[key] = _Reservation(lease_id, expires_s)
        self._expiries.append((expires_s, key, lease_id))

    def _drop(self, key: str, lease_id: str) -> bool:
        """Forget a reservation; False if it is not this lease's (any more)."""
        held = self._reservations.get(key)
        if held is None or held.lease_id != lease_id:
            return False
        del self._reservations[key]
        return True

    def _expire(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] < now_s:
            _, key, lease_id = self._expiries.popleft()
            if self._drop(key, lease_id):
                self._books.settle(key, None)

    def _charge_worst(self, key: str) -> None:
        del self._reservations[key]
        self._books.settle(key, None)

    def _book(self, report: Report, known: bool) -> None:
        if known:
            self._books.settle(report.key, report.usage)
        elif report.error in UNKNOWN_COST_ERRORS:
            self._books.settle(report.key, None)
        else:
            self._books.release(report.key)

    def _count(self, report: Report) -> None:
        if report.error is None or report.error in FINAL_ERRORS:
            self._counts["answered"] += 1
            self._silent_since_s = None
            return
        self._counts["failed" if report.final else "retried"] += 1
        if report.error in FATAL_ERRORS:
            self.stop(f"the teacher refuses ({report.error}): {report.detail}")
        now_s = self._clock()
        self._silent_since_s = now_s if self._silent_since_s is None else self._silent_since_s
        if now_s - self._silent_since_s > self._config.teacher.max_wait_s:
            self.stop(
                f"the teacher has answered nothing for {now_s - self._silent_since_s:.0f} s, the last failure was "
                f"{report.error} ({report.detail}); generate.teacher.max_wait_s allows less. The same command goes on"
            )
        failed, total = self._counts["failed"], self._counts["failed"] + self._counts["answered"]
        if failed >= MIN_FAILED and failed > self._config.max_failed_share * total:
            self.stop(
                f"{failed} of {total} requests were given up, the last for {report.error} ({report.detail}); "
                "generate.max_failed_share allows fewer. The answers are kept, and the same command asks again"
            )


def _wait_s(limits: LimitsConfig, restarted: bool, quiet_s: float) -> float:
    """How long a new gate waits for what an old one has let out. `quiet_s`: since the journal's newest record."""
    if limits.requests_per_minute is None and limits.tokens_per_minute is None:
        # Nothing to keep to but the server's own count, which comes with its first answer. Leases must have run out.
        wait_s = limits.window_s / 20
    else:
        wait_s = cool_down_s(limits.requests_per_minute, limits.tokens_per_minute, limits.window_s)
    return wait_s if restarted else max(0.0, wait_s - quiet_s)


def _status(error: str | None) -> Status:
    if error is None or error in FINAL_ERRORS:
        return "ok"
    if error == "rate_limit":
        return "rate_limited"
    return "server_failure" if error in ("server_error", "timeout", "connection", "bad_response") else "other"
