"""Contamination: what repeats an evaluation task is found, with the task; other candidates pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import _score_lcs
from rouge_score.tokenize import tokenize

from alpaca_ray.generate.contamination import ContaminationFilter
from alpaca_ray.generate.parse import Candidate
from alpaca_ray.schema import EvaluationTask, Instance, read_evaluation_tasks, read_seed_tasks

EVALUATION = read_evaluation_tasks(None)
SEEDS = read_seed_tasks(None)


def evaluation_task(instruction: str, input: str = "", output: str = "x", id: str = "a") -> EvaluationTask:
    instances = (Instance(input=input, output=output),)
    return EvaluationTask(id=id, motivation_app="", instruction=instruction, instances=instances)


LONG = evaluation_task(
    "Name the tide.", "one two three four five six seven eight nine ten eleven twelve", "Ebb.", id="long"
)
words = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=14).map(" ".join)


def test_every_evaluation_task_is_found_in_itself_and_no_seed_task_is() -> None:
    contamination = ContaminationFilter(EVALUATION)
    for task in EVALUATION:
        found = contamination.match(Candidate(task.instruction.upper() + "!", "", "x"))
        assert found is not None
        assert (found.task_id, found.instruction) == (task.id, task.instruction)
        assert found.rouge_l is not None
        assert found.rouge_l > 0.7
    for seed in SEEDS:
        first = seed.instances[0]
        assert contamination.reason(Candidate(seed.instruction, first.input, first.output)) is None


@settings(deadline=None, max_examples=200)
@given(st.lists(words.filter(bool), min_size=1, max_size=5), words, st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_the_score_is_rouge_scores_own_and_counts_above_the_threshold(
    instructions: list[str], instruction: str, threshold: float
) -> None:
    tasks = [evaluation_task(text, id=str(number)) for number, text in enumerate(instructions)]
    scores = [_score_lcs(tokenize(text, None), tokenize(instruction, None)).fmeasure for text in instructions]
    found = ContaminationFilter(tasks, threshold).match(Candidate(instruction, "", "other"))
    if max(scores) > threshold:
        assert found is not None
        assert found.rouge_l == max(scores)
        assert found.task_id == str(scores.index(max(scores)))
    else:
        assert found is None or found.rouge_l is None


def test_an_exact_tie_at_the_threshold_falls_as_rouge_score_has_it() -> None:
    for length in range(1, 60):
        for shared in range(1, length + 1):
            other = " ".join(["w"] * shared + ["y"] * (length - shared))
            text = " ".join(["w"] * shared)
            expected = _score_lcs(tokenize(other, None), tokenize(text, None)).fmeasure
            found = ContaminationFilter([evaluation_task(other)]).match(Candidate(text, "", ""))
            assert (found is not None and found.rouge_l is not None) == (expected > 0.7)


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_a_shared_13_gram_is_found_in_any_field(field: str) -> None:
    shared = "Two, three: FOUR five six seven eight nine ten eleven twelve. Ebb -- and flow"  # tide's input and output
    fields = {"instruction": "Tell me something else entirely", "input": "", "output": ""} | {field: shared}
    found = ContaminationFilter([*EVALUATION, LONG]).match(Candidate(**fields))
    assert found is None
    fields[field] = "And one " + shared
    found = ContaminationFilter([*EVALUATION, LONG]).match(Candidate(**fields))
    assert found is not None
    assert (found.task_id, found.rouge_l) == ("long", None)
    assert ContaminationFilter([LONG]).reason(Candidate(**fields)) == "contaminated"


def test_a_short_task_counts_as_a_whole_and_a_very_short_one_by_its_instruction_only() -> None:
    contamination = ContaminationFilter(
        [evaluation_task("Sing of the sea", "high and wide", "la la", id="short"), evaluation_task("Say so", id="tiny")]
    )
    found = contamination.match(Candidate("Repeat these words", "now sing of the sea: high and wide! La la.", "yes"))
    assert found is not None
    assert found.task_id == "short"
    assert contamination.match(Candidate("Repeat these words", "say so x", "say so")) is None
    assert contamination.match(Candidate("Say so!", "", "")) is not None


@pytest.mark.parametrize("instruction", ["", "?!", "\u4f60\u597d"])
def test_texts_without_tokens_are_never_contaminated(instruction: str) -> None:
    contamination = ContaminationFilter([evaluation_task("\u4f60\u597d", output="?"), LONG])
    assert contamination.match(Candidate(instruction, "", "")) is None
    assert ContaminationFilter([]).match(Candidate("Name a river", "", "x")) is None
