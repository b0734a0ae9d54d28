"""[RAY SERVE] What the ingress sees, in Ray's metrics: requests by outcome, verdicts, how long both took, the queue."""

import asyncio
import collections
from collections.abc import Callable, Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

from alpaca_ray.safety.moderation import BackendStats
from alpaca_ray.safety.verdict import Verdict
from alpaca_ray.serve.access_log import Access, log_access
from alpaca_ray.serve.admission import AdmissionStats
from alpaca_ray.serve.moderated import Kind

SECONDS = [0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300]
PERIOD_S = 1.0  # Ray exports every 10 s, by default


class Monitor:
    """For one ingress process. Labels hold no text of a client."""

    def __init__(self) -> None:
        prefix = "alpaca_ray_serve"
        self._requests = _counter(
            f"{prefix}_requests", "Requests by route, status and reason of refusal", "route", "status", "refusal"
        )
        self._durations = Histogram(f"{prefix}_request_s", "Seconds to the end of an answer", SECONDS, ("route",))
        self._first_events = Histogram(
            f"{prefix}_first_event_s", "Seconds to the first event of a streamed answer", SECONDS, ("route",)
        )
        self._tokens = Counter(f"{prefix}_tokens", "Tokens of prompts and completions, as billed to keys")
        self._verdicts = _counter(
            f"{prefix}_verdicts", "Moderation's verdicts", "kind", "verdict", "backend", "degraded"
        )
        self._resumes = Counter(f"{prefix}_resumes", "Completions that went on at another engine replica")
        self._judging = Histogram(f"{prefix}_moderation_s", "Seconds to a verdict", SECONDS, ("kind",))
        self._breakers = Gauge(
            f"{prefix}_breaker_open", "1 while a backend of moderation is not asked, or on probation", ("backend",)
        )
        self._failures = _counter(
            f"{prefix}_moderation_failures", "Times that a backend gave no verdict", "backend", "reason"
        )
        self._told_failures: collections.Counter[tuple[str, str]] = collections.Counter()
        self._in_flight = Gauge(f"{prefix}_in_flight", "Requests whose turn it is")
        self._waiting = Gauge(f"{prefix}_waiting", "Requests that wait for their turn")
        self._tasks = Gauge(f"{prefix}_tasks", "Tasks of the ingress's event loop")

    def access(self, access: Access) -> None:
        """A request is over."""
        log_access(access)
        outcome = {"status": str(access.status), "refusal": access.refusal or ""}
        self._requests.inc(1, {"route": access.route, **outcome})
        self._durations.observe(access.duration_s, {"route": access.route})
        if access.first_event_s is not None:
            self._first_events.observe(access.first_event_s, {"route": access.route})
        if access.num_tokens:
            self._tokens.inc(access.num_tokens)

    def resumed(self) -> None:
        """An engine replica failed; another goes on with its text."""
        self._resumes.inc()

    def verdict(self, verdict: Verdict | None, kind: Kind, latency_s: float) -> None:
        """A text was judged, or (None) could not be."""
        said = "none" if verdict is None else "flagged" if verdict.flagged else "passed"
        backend, degraded = (verdict.backend, verdict.degraded) if verdict else ("", True)
        labels = {"kind": kind, "verdict": said, "backend": backend, "degraded": str(degraded).lower()}
        self._verdicts.inc(1, labels)
        self._judging.observe(latency_s, {"kind": kind})

    async def report(
        self,
        admission: Callable[[], AdmissionStats],
        moderation: Callable[[], Mapping[str, BackendStats]],
        period_s: float = PERIOD_S,
    ) -> None:
        """Tell how long the queue is and how the backends are, for ever."""
        while True:
            await asyncio.sleep(period_s)
            now = admission()
            self._in_flight.set(now.num_in_flight)
            self._waiting.set(now.num_waiting)
            self._tasks.set(len(asyncio.all_tasks()))
            for backend, stats in moderation().items():
                self._tell_backend(backend, stats)

    def _tell_backend(self, backend: str, stats: BackendStats) -> None:
        self._breakers.set(int(stats.breaker.state != "closed"), {"backend": backend})
        for reason, count in stats.failures.items():
            if new := count - self._told_failures[backend, reason]:
                self._failures.inc(new, {"backend": backend, "reason": reason})
                self._told_failures[backend, reason] = count


def _counter(name: str, description: str, *tags: str) -> Counter:
    return Counter(name, description, tags)  # type: ignore[arg-type]  # Ray's annotation says just one tag
