"""The task files of the package, measured with rouge_score itself."""

import re
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

from rouge_score.rouge_scorer import _score_lcs
from rouge_score.tokenize import tokenize

from alpaca_ray.generate.filters import reject_reason
from alpaca_ray.generate.parse import Candidate
from alpaca_ray.schema import EvaluationTask, SeedTask, as_examples, read_evaluation_tasks, read_seed_tasks

SEEDS = read_seed_tasks(None)
EVALUATION = read_evaluation_tasks(None)


def tokens(tasks: list[SeedTask] | list[EvaluationTask]) -> list[list[str]]:
    return [tokenize(task.instruction, None) for task in tasks]


def too_similar(pairs: Iterator[tuple[Any, Any]], limit: float) -> list[str]:
    """Those pairs of token lists whose ROUGE-L F-measure is above the limit."""
    return [" ".join(a) + " | " + " ".join(b) for a, b in pairs if _score_lcs(a, b).fmeasure > limit]


def test_there_are_175_seed_tasks_with_ids_and_names_of_their_own() -> None:
    assert len(SEEDS) == len({task.id for task in SEEDS}) == len({task.name for task in SEEDS}) == 175


def test_the_seed_tasks_are_mixed_as_self_instructs() -> None:
    assert 20 <= sum(task.is_classification for task in SEEDS) <= 30
    assert 45 <= sum(task.instances[0].input == "" for task in SEEDS) <= 56


def test_no_two_seed_instructions_are_duplicates() -> None:
    assert too_similar(combinations(tokens(SEEDS), 2), 0.7) == []


def test_no_seed_task_would_be_rejected() -> None:
    candidates = [Candidate(e.instruction, e.input, e.output) for e in as_examples(SEEDS)]
    assert {c.instruction: reason for c in candidates if (reason := reject_reason(c))} == {}


def test_there_are_60_evaluation_instructions_that_are_not_in_the_seeds() -> None:
    assert len(EVALUATION) == len({task.id for task in EVALUATION}) == 60
    assert too_similar(product(tokens(EVALUATION), tokens(SEEDS)), 0.5) == []


def test_no_two_evaluation_instructions_are_duplicates() -> None:
    assert too_similar(combinations(tokens(EVALUATION), 2), 0.7) == []


def faults(task: SeedTask | EvaluationTask) -> Iterator[str]:
    texts = [task.instruction, *(text for i in task.instances for text in (i.input, i.output))]
    joined = "\n".join(texts)
    hosts = re.findall(r"(?:https?://|www\.|\w@)([\w-]+(?:\.[\w-]+)+)", joined)
    yield from (f"address at {host}" for host in hosts if not re.fullmatch(r"(.+\.)?example\.com", host))
    yield from (f"placeholder {p}" for p in re.findall(r"(?i)noinput|\blorem ipsum\b|###", joined))
    yield from (f"stray space: {text!r}" for text in texts if text != text.strip())
    yield from (f"control character {c!r}" for c in re.findall(r"[\x00-\x08\x0b-\x1f\x7f]", joined))


def test_no_task_holds_an_address_a_placeholder_or_a_stray_space() -> None:
    tasks: list[SeedTask | EvaluationTask] = [*SEEDS, *EVALUATION]
    assert {task.id: found for task in tasks if (found := list(faults(task)))} == {}


def test_the_search_for_faults_finds_them() -> None:
    bad = SEEDS[0].model_copy(update={"instruction": " Write to a@b.org, https://b.org or x@www.example.com \x07"})
    assert list(faults(bad))[:2] == ["address at b.org", "address at b.org"]
    assert len(list(faults(bad))) == 4
