"""What the names of failures mean for a run. Apart from the client: the gate starts without the SDK, 1 s sooner."""

# Every further request would fail in the same way: the run stops.
FATAL_ERRORS = frozenset({"authentication", "insufficient_quota", "model_not_found", "bad_request", "wrong_model"})
# The teacher's last word on this request: it is recorded and the run goes on. Asking again would give the same.
FINAL_ERRORS = frozenset({"content_filter", "refusal"})
# Nobody can tell whether the provider bills these: the budget takes them at the worst case.
UNKNOWN_COST_ERRORS = frozenset({"timeout", "connection", "bad_response", "wrong_model"})
