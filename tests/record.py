"""A run that never was, for tests of what is written about a run: seeded, with every kind of trouble in it."""

import random
from collections import Counter
from typing import Any

import pyarrow as pa

from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.record import FileInfo, Record
from alpaca_ray.schema import COMPLETION_SCHEMA, DATASET_SCHEMA, REJECT_SCHEMA

STARTED_AT = 1_790_000_000.0
REQUESTS_PER_ROUND = 40
HOSTILE = '<script>alert("x")</script> & </svg> \u202egnp\x00'
REASONS = ("duplicate", "too_short", "blocked_word", "empty_output", "url_that_is_made_up", "surplus")
_VERBS = ("Write", "List", "Explain", "Describe", "Summarise", "Translate", "Give", "Classify", "Compare", "Rewrite")
_NOUNS = ("story", "reasons", "sentence", "difference", "poem", "recipe", "paragraph", "email", "names", "experiment")


def make_record(num_requests: int = 200, kept_per_request: int = 2, seed: int = 0, **changes: Any) -> Record:
    """A record with `kept_per_request` rows and some rejects for each answered request."""
    rng = random.Random(seed)
    completions = [_completion(k, rng) for k in range(num_requests)]
    answered = [row for row in completions if row["text"] is not None]
    kept = [_row(row, position, rng) for row in answered for position in range(kept_per_request)]
    rejects = [_reject(row, kept_per_request, rng) for row in answered if rng.random() < 0.7]
    if kept:
        kept[0]["instruction"] = f"Explain the tag {HOSTILE}"
    if rejects:
        rejects[0]["text"] = HOSTILE
    given = {
        "run_name": "tests",
        "config": GenerateConfig(num_instructions=max(1, len(kept))),
        "config_hash": "0123456789abcdef",
        "num_seed_tasks": 175,
        "seed_tasks_hash": "fedcba9876543210",
        "dataset": pa.Table.from_pylist(kept, schema=DATASET_SCHEMA),
        "rejects": pa.Table.from_pylist(rejects, schema=REJECT_SCHEMA),
        "completions": pa.Table.from_pylist(
            completions, schema=COMPLETION_SCHEMA.append(pa.field("round", pa.int64()))
        ),
        "counts": _counts(completions, kept, rejects),
        "repaid": 3,
        "started_at": STARTED_AT,
        "finished_at": STARTED_AT + num_requests,
        "files": {"dataset.parquet": FileInfo(1000, "a" * 64), "alpaca_data.json": FileInfo(2000, "b" * 64)},
    }
    return Record(**(given | changes))


def _completion(request: int, rng: random.Random) -> dict[str, Any]:
    failed = rng.random() < 0.06
    return {
        "request": request,
        "round": request // REQUESTS_PER_ROUND,
        "text": None if failed else "4. Instruction: ...",
        "error": rng.choice(("timeout", "server_error")) if failed else None,
        "prompt_tokens": 500,
        "completion_tokens": 0 if failed else rng.randrange(400, 1200),
        "latency_s": 2.0,
        "model": None if failed else "teacher-0125",
        "finished_at": STARTED_AT + request * 0.9 + rng.random(),
        "usd": 0.0 if failed else 0.002,
    }


def _row(completion: dict[str, Any], position: int, rng: random.Random) -> dict[str, Any]:
    near = sorted((rng.betavariate(4, 5) * 0.7 for _ in range(10)), reverse=True)
    adjective = rng.choice(("short", "plain", "careful", "cheerful", "formal"))
    return {
        "id": f"{completion['request']:06d}-{position:02d}",
        "instruction": f"{rng.choice(_VERBS)} the {adjective} {rng.choice(_NOUNS)} about item {rng.randrange(10_000)}.",
        "input": "" if rng.random() < 0.4 else "word " * rng.randrange(1, 60),
        "output": "answer " * (1 + int(rng.expovariate(1 / 40))),
        "request": completion["request"],
        "position": position,
        "model": completion["model"],
        "prompt_version": "alpaca-1",
        "seed_tasks": [f"seed_task_{rng.randrange(175)}" for _ in range(3)],
        "most_similar": [{"instruction": "Write a story.", "rouge_l": score} for score in near],
        "mean_rouge_l": 0.1,
    }


def _reject(completion: dict[str, Any], position: int, rng: random.Random) -> dict[str, Any]:
    reason = rng.choices(REASONS, (8, 2, 3, 1, 2, 1))[0]
    similar = {"rouge_l": 0.7 + 0.3 * rng.random(), "nearest": "Write a story."} if reason == "duplicate" else {}
    text = "Instruction: Write the story again.\nInput:\nOutput: Once more."
    return {"request": completion["request"], "position": position, "reason": reason, "text": text, **similar}


def _counts(completions: list[Any], kept: list[Any], rejects: list[Any]) -> dict[str, Any]:
    return {
        "requests": len(completions),
        "failed": sum(row["text"] is None for row in completions),
        "kept": len(kept),
        "rejected": len(rejects),
        "prompt_tokens": sum(row["prompt_tokens"] for row in completions),
        "completion_tokens": sum(row["completion_tokens"] for row in completions),
        "usd": sum(row["usd"] for row in completions),
        "reasons": dict(Counter(row["reason"] for row in rejects).most_common()),
    }
