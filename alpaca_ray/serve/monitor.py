"""[RAY SERVE] What the ingress sees, in Ray's metrics: requests by outcome, verdicts, how long both took."""

from ray.util.metrics import Counter, Histogram

from alpaca_ray.safety.verdict import Verdict
from alpaca_ray.serve.access_log import Access, log_access
from alpaca_ray.serve.moderated import Kind

SECONDS = [0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300]


class Monitor:
    """For one ingress process. Labels hold no text of a client."""

    def __init__(self) -> None:
        prefix = "alpaca_ray_serve"
        self._requests = Counter(
            f"{prefix}_requests", "Requests by route, status and reason of refusal", ("route", "status", "refusal")
        )
        self._durations = Histogram(f"{prefix}_request_s", "Seconds to the end of an answer", SECONDS, ("route",))
        self._tokens = Counter(f"{prefix}_tokens", "Tokens of prompts and completions, as billed to keys")
        self._verdicts = Counter(
            f"{prefix}_verdicts", "Moderation's verdicts", ("kind", "verdict", "backend", "degraded")
        )
        self._judging = Histogram(f"{prefix}_moderation_s", "Seconds to a verdict", SECONDS, ("kind",))

    def access(self, access: Access) -> None:
        """A request is over."""
        log_access(access)
        outcome = {"status": str(access.status), "refusal": access.refusal or ""}
        self._requests.inc(1, {"route": access.route, **outcome})
        self._durations.observe(access.duration_s, {"route": access.route})
        if access.num_tokens:
            self._tokens.inc(access.num_tokens)

    def verdict(self, verdict: Verdict | None, kind: Kind, latency_s: float) -> None:
        """A text was judged, or (None) could not be."""
        said = "none" if verdict is None else "flagged" if verdict.flagged else "passed"
        backend, degraded = (verdict.backend, verdict.degraded) if verdict else ("", True)
        labels = {"kind": kind, "verdict": said, "backend": backend, "degraded": str(degraded).lower()}
        self._verdicts.inc(1, labels)
        self._judging.observe(latency_s, {"kind": kind})
