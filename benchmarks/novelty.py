"""Novelty: ours against Alpaca's algorithm written with rouge_score alone, on the same instructions in one run.

python benchmarks/novelty.py [--quick] [--instructions FILE]

Times are of the CPU (user and system), on one thread, with compiled code warm.
"""

import argparse
import importlib.metadata
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
from rouge_score.rouge_scorer import _score_lcs
from rouge_score.tokenize import tokenize

from alpaca_ray.generate.novelty import Novelty, NoveltyFilter
from alpaca_ray.generate.similarity import Similarity, similarity_report
from alpaca_ray.schema import EvaluationTask, SeedTask, read_evaluation_tasks, read_seed_tasks

THRESHOLD = 0.7
NUM_NEAREST = 10
PUBLISHED = 52_000  # about what Alpaca kept
WITHOUT_NUMBA = sys.maxsize
_FUNCTION_WORDS = (
    "a an and any are as at be by can do each every for from give has have how if in into is it its made make more "
    "most name no not of on one or out so that the their them then there they this to two up use using was were what "
    "when which who why with would write you your"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
Result = TypeVar("Result")
Row = dict[str, Any]


class Reference(NamedTuple):
    """What Alpaca's algorithm comes to."""

    decisions: list[Novelty]
    metadata: list[Similarity]  # of the kept ones
    num_pairs: int
    cpu_s: float


def corpus(size: int, seed: int = 0) -> list[str]:
    """Made instructions with the figures of real ones: 13.6 tokens on average, 18,000 distinct words in 52,000.

    Real: the 235 instructions of the package, which give the frames (half of one and half of another, or the beginning
    of one), and the words of its tasks. Made: two in three content words of a frame are drawn anew, from a Zipf-like
    distribution over the real words and, past those, invented ones. A quarter are near-duplicates: an earlier one with
    up to three words replaced, left out or added.
    """
    rng = random.Random(seed)
    frames = [words for words in (text.split() for text in _real_texts(with_answers=False)) if 4 <= len(words) <= 40]
    lexicon, weights = _lexicon()
    made: list[list[str]] = []
    while len(made) < size:
        if made and rng.random() < 0.25:
            made.append(_near_duplicate(rng.choice(made), rng, lexicon, weights))
        else:
            made.append(_fresh(frames, rng, lexicon, weights))
    return [" ".join(words) for words in made]


def _real_texts(*, with_answers: bool) -> list[str]:
    instructions: list[str] = []
    answers: list[str] = []
    for task in itertools.chain[SeedTask | EvaluationTask](read_seed_tasks(None), read_evaluation_tasks(None)):
        instructions.append(task.instruction)
        answers += [f"{instance.input} {instance.output}" for instance in task.instances]
    return instructions + answers if with_answers else instructions


def _lexicon() -> tuple[list[str], list[float]]:
    """Content words, the commonest first, and their cumulative weights."""
    counts = Counter(word for text in _real_texts(with_answers=True) for word in re.findall(r"[a-z]+", text.lower()))
    real = [word for word, _ in counts.most_common() if word not in FUNCTION_WORDS]
    syllables = ["".join(parts) for parts in itertools.product("bcdfghjklmnprstvw", "aeiou", ["", "l", "n", "r", "s"])]
    invented = ("".join(parts) for parts in itertools.product(syllables, repeat=2))
    words = list(dict.fromkeys([*real, *invented]))
    return words, list(itertools.accumulate(1 / (rank + 20) ** 1.42 for rank in range(len(words))))


def _fresh(frames: list[list[str]], rng: random.Random, lexicon: list[str], weights: list[float]) -> list[str]:
    first, second = rng.choice(frames), rng.choice(frames)
    if rng.random() < 0.35:
        words = first[: rng.randint(4, len(first))]
    else:
        words = first[: len(first) // 2 + 1] + second[len(second) // 2 :]
    new = iter(rng.choices(lexicon, cum_weights=weights, k=len(words)))
    return [w if w.lower() in FUNCTION_WORDS or rng.random() < 0.35 else next(new) for w in words]


def _near_duplicate(words: list[str], rng: random.Random, lexicon: list[str], weights: list[float]) -> list[str]:
    words = list(words)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        k, kind = rng.randrange(len(words)), rng.random()
        if kind < 0.6:
            words[k] = rng.choices(lexicon, cum_weights=weights)[0]
        elif kind < 0.8 and len(words) > 3:
            del words[k]
        else:
            words.insert(k, rng.choice(lexicon[:2000]))
    return words


def edge_cases(seed: int = 0) -> list[str]:
    """Pairs at exactly 0.7 on paper, texts without tokens, texts past 64 and 150 tokens and their near-duplicates."""
    rng = random.Random(seed)
    names = (f"edge{k}" for k in itertools.count())
    ties = [(lcs, m, n) for m in range(1, 65) for n in range(1, m + 1) for lcs in range(1, n + 1)
            if 20 * lcs == 7 * (m + n)]  # fmt: skip
    cases = ["", "?!", "日本語で答えてください。", "\u212aelvin", "KELVIN", "\u0130zmir"]
    for lcs, m, n in rng.sample(ties, 24):
        shared = [next(names) for _ in range(lcs)]
        cases.append(" ".join(shared + list(itertools.islice(names, m - lcs))))
        cases.append(" ".join(list(itertools.islice(names, n - lcs)) + shared))
    for length in (65, 130, 200):
        words = [rng.choice(("the", "of", next(names))) for _ in range(length)]
        cases += [" ".join(words), " ".join([*words[: length * 9 // 10], *itertools.islice(names, length // 10)])]
    return cases


def with_edge_cases(texts: Sequence[str], seed: int = 0) -> list[str]:
    rng, mixed = random.Random(seed), list(texts)
    at = sorted(rng.sample(range(len(texts)), len(edge_cases())))
    for place, case in zip(at, edge_cases(), strict=True):
        mixed[place] = case
    return mixed


def reference(pool: Sequence[str], offers: Sequence[str]) -> Reference:
    """generate_instruction.py's rule with rouge_score alone: every pair, greedy, in order."""
    started_s, num_pairs = time.process_time(), 0
    texts, tokens = list(pool), [tokenize(text, None) for text in pool]
    decisions: list[Novelty] = []
    metadata: list[Similarity] = []
    for text in offers:
        mine = tokenize(text, None)
        scores = [float(_score_lcs(mine, other).fmeasure) for other in tokens]
        num_pairs += len(scores)
        highest = max(scores)
        if highest > THRESHOLD:
            decisions.append(Novelty(False, highest, texts[scores.index(highest)]))
            continue
        nearest = [j for _, j in sorted((-score, j) for j, score in enumerate(scores))[:NUM_NEAREST]]
        metadata.append(Similarity([(texts[j], scores[j]) for j in nearest], float(np.mean(scores))))
        decisions.append(Novelty(True, None, ""))
        texts.append(text)
        tokens.append(mine)
    return Reference(decisions, metadata, num_pairs, time.process_time() - started_s)


def cpu_time(work: Callable[[], Result], rounds: int = 3) -> tuple[float, Result]:
    """Median CPU time in s, and the result."""
    times = []
    for _ in range(rounds):
        started_s = time.process_time()
        result = work()
        times.append(time.process_time() - started_s)
    return statistics.median(times), result


def equality(pool: list[str], offers: list[str], found: Reference) -> Iterator[Row]:
    """Ours against the reference on the same instructions, to the last bit, compiled and not."""
    yield from _equality(pool, offers, found, "", compile_at=0)
    yield from _equality(pool, offers, found, "_without_numba", compile_at=WITHOUT_NUMBA)


def _equality(pool: list[str], offers: list[str], found: Reference, form: str, compile_at: int) -> Iterator[Row]:
    size, peer = len(offers), "rouge_score"
    ours_s, decisions = cpu_time(lambda: NoveltyFilter(pool, THRESHOLD, compile_at=compile_at).offer_many(offers))
    yield row(f"decisions_{size}{form}", size - _differences(decisions, found.decisions), (peer, size), "instructions",
              ("all equal: kept set, order, scores, nearest of duplicates", decisions == found.decisions))  # fmt: skip
    yield row(f"kept_set_{size}{form}_s", ours_s, (peer, found.cpu_s), "s of CPU",
              ("at least 100 times faster", found.cpu_s >= 100 * ours_s))  # fmt: skip
    kept = [text for text, decision in zip(offers, found.decisions, strict=True) if decision.kept]
    report = similarity_report(kept, pool, NUM_NEAREST, compile_at=compile_at)
    yield row(f"metadata_{size}{form}", len(kept) - _differences(report, found.metadata), (peer, len(kept)),
              "instructions", ("all equal: nearest, scores, means", report == found.metadata))  # fmt: skip


def _differences(ours: Sequence[object], theirs: Sequence[object]) -> int:
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def speed(pool: list[str], texts: list[str], pair_s: float) -> Iterator[Row]:
    """At the published size, against the reference's time per pair in this run."""
    size, peer_name = len(texts), "rouge_score, extrapolated by pairs"
    kept_s, decisions = cpu_time(lambda: NoveltyFilter(pool, THRESHOLD, compile_at=0).offer_many(texts))
    peer = peer_name, pair_s * float(len(pool) * size + np.cumsum([decision.kept for decision in decisions]).sum())
    yield row(f"kept_set_{size}_s", kept_s, peer, "s of CPU", ("<= 1", kept_s <= 1))
    scan_s, same = cpu_time(lambda: NoveltyFilter(pool, THRESHOLD, compile_at=WITHOUT_NUMBA).offer_many(texts))
    goal = "<= 4, the same decisions", scan_s <= 4 and same == decisions
    yield row(f"kept_set_{size}_without_numba_s", scan_s, peer, "s of CPU", goal)
    report_s, _ = cpu_time(lambda: similarity_report(texts, pool, NUM_NEAREST, compile_at=0), 1)
    peer = peer_name, pair_s * size * (len(pool) + size / 2)
    yield row(f"metadata_{size}_s", report_s, peer, "s of CPU", ("<= 15", report_s <= 15))


def at_scale(size: int) -> tuple[float, float]:
    """CPU time in s and growth of the peak resident memory in GiB, in a process of its own with warm code."""
    texts = corpus(size, seed=1)
    NoveltyFilter([], THRESHOLD, compile_at=0).offer_many(texts[:3000])
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    cpu_s, _ = cpu_time(lambda: NoveltyFilter([], THRESHOLD).offer_many(texts), 1)
    status = Path("/proc/self/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    return cpu_s, (peak_kib * 1024 - before) / 2**30


def large(size: int) -> Iterator[Row]:
    with multiprocessing.get_context("spawn").Pool(1) as process:
        cpu_s, growth_gib = process.apply(at_scale, (size,))
    goal_s = 40 * size / 1_000_000
    yield row(f"kept_set_{size}_s", cpu_s, None, "s of CPU", (f"<= {goal_s:g}", cpu_s <= goal_s))
    yield row(f"kept_set_{size}_peak_gib", growth_gib, None, "GiB above the instructions", ("<= 1", growth_gib <= 1))


def sharded(pool: list[str], offers: list[str]) -> Iterator[Row]:
    import ray

    from alpaca_ray.generate.novelty_shards import ShardedNoveltyFilter

    ray.init(num_cpus=3, include_dashboard=False, logging_level=logging.WARNING)
    single = NoveltyFilter(pool, THRESHOLD).offer_many(offers)
    decisions = ShardedNoveltyFilter(pool, THRESHOLD, num_shards=3).offer_many(offers)
    ray.shutdown()
    equal = len(offers) - _differences(decisions, single)
    goal = "the decisions of the single form", decisions == single
    yield row(f"sharded_{len(offers)}", equal, ("NoveltyFilter", len(offers)), "instructions", goal)


def row(name: str, ours: float, peer: tuple[str, float] | None, unit: str, goal: tuple[str, bool]) -> Row:
    """A row of the result, shown at once; `peer` is a name and a value, `goal` what should be and whether it is."""
    made: Row = {"name": name, "ours": round(ours, 3)}
    if peer:
        made |= {"peer": round(peer[1], 3), "peer_name": peer[0], "ratio": round(peer[1] / ours, 1)}
    made |= {"unit": unit, "goal": goal[0], "holds": bool(goal[1])}
    print(json.dumps(made), file=sys.stderr, flush=True)
    return made


def read_instructions(path: Path) -> list[str]:
    """The `instruction` fields of a JSONL file or a JSON list, such as alpaca_data.json."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return [row["instruction"] for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,200 compared with rouge_score, and 200,000 at scale")
    parser.add_argument(
        "--instructions", type=Path, help="JSONL or JSON list with `instruction` fields, in their order"
    )
    args = parser.parse_args()
    compared, scale = (1200, 200_000) if args.quick else (5000, 1_000_000)
    pool = [task.instruction for task in read_seed_tasks(None)]
    texts = read_instructions(args.instructions)[:PUBLISHED] if args.instructions else corpus(PUBLISHED)
    similarity_report(texts[:300], pool, compile_at=0)  # compiled code from here on
    offers = with_edge_cases(texts[:compared])
    found = reference(pool, offers)
    rows = [*equality(pool, offers, found), *speed(pool, texts, found.cpu_s / found.num_pairs), *large(scale),
            *sharded(pool, offers)]  # fmt: skip
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {
        name: importlib.metadata.version(name) for name in ("numba", "numpy", "rapidfuzz", "ray", "rouge-score")
    }
    print(json.dumps({"benchmark": "novelty", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
