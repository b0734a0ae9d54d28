"""Novelty: ours against Alpaca's algorithm written with rouge_score alone, on the same instructions in one run.

python benchmarks/novelty.py [--quick]
"""

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

import psutil
from rouge_score.rouge_scorer import _score_lcs
from rouge_score.tokenize import tokenize

from alpaca_ray.generate.novelty import NoveltyFilter
from alpaca_ray.schema import read_evaluation_tasks, read_seed_tasks

THRESHOLD = 0.7
ROUNDS = 3


def corpus(size: int, seed: int = 0) -> list[str]:
    """Realistic instructions: the shipped ones, recombined half by half, a quarter of them near-duplicates."""
    rng = random.Random(seed)
    texts = [t.instruction for t in read_seed_tasks(None)] + [t.instruction for t in read_evaluation_tasks(None)]
    made: list[str] = []
    while len(made) < size:
        if made and rng.random() < 0.25:
            words = rng.choice(made).split()
            words[rng.randrange(len(words))] = rng.choice(rng.choice(texts).split())
        else:
            first, second = rng.choice(texts).split(), rng.choice(texts).split()
            words = first[: len(first) // 2 + 1] + second[len(second) // 2 :]
        made.append(" ".join(words))
    return made


def reference(instructions: list[str]) -> list[str]:
    """generate_instruction.py's rule: all pairs, kept if no F-measure is above the threshold."""
    kept: list[tuple[str, list[str]]] = []
    for text in instructions:
        tokens = tokenize(text, None)
        if all(_score_lcs(tokens, other).fmeasure <= THRESHOLD for _, other in kept):
            kept.append((text, tokens))
    return [text for text, _ in kept]


def ours(instructions: list[str]) -> list[str]:
    decisions = NoveltyFilter([], THRESHOLD).offer_many(instructions)
    return [text for text, decision in zip(instructions, decisions, strict=True) if decision.kept]


def cpu_seconds(work: Callable[[list[str]], list[str]], instructions: list[str]) -> tuple[float, list[str]]:
    started_s = time.process_time()
    kept = work(instructions)
    return time.process_time() - started_s, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="600 instructions instead of 2,000")
    instructions = corpus(600 if parser.parse_args().quick else 2000)
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(ROUNDS):
        our_s, our_kept = cpu_seconds(ours, instructions)
        peer_s, peer_kept = cpu_seconds(reference, instructions)
        times["ours"].append(our_s)
        times["peer"].append(peer_s)
    our_s, peer_s = statistics.median(times["ours"]), statistics.median(times["peer"])
    row = {
        "name": f"kept_set_{len(instructions)}_s", "ours": round(our_s, 3), "peer": round(peer_s, 3),
        "peer_name": "rouge_score", "ratio": round(peer_s / our_s, 1), "unit": "s of CPU",
        "goal": "the same kept set, at least 10 times faster",
        "holds": our_kept == peer_kept and peer_s >= 10 * our_s,
    }  # fmt: skip
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("rapidfuzz", "rouge-score")}
    print(json.dumps({"benchmark": "novelty", "machine": machine, "versions": versions, "rows": [row]}))
    return 0 if row["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
