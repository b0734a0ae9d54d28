"""A strict OpenAI-compatible provider as a process of its own. It shares no code with alpaca_ray.

It holds exact rate limits, keeps a ledger of every request, answers from the request alone, and fails when told to.

    python -m tests.referee --port 0 --config '{"limits": {"requests_per_minute": 600}}'
"""
