"""From answers to rows: what is kept has its lineage, what is not has its reason, nothing is lost between them."""

from typing import Any

from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.harvest import Harvest
from alpaca_ray.schema import EvaluationTask, Instance, SeedTask

SEED = SeedTask(
    id="seed_0", name="fruit", instruction="Name three fruits that grow in cold countries.",
    instances=(Instance(input="", output="Apples, pears and plums."),), is_classification=False,
)  # fmt: skip
EVALUATED = EvaluationTask(
    id="eval_0", motivation_app="mail", instruction="Draft a short reply that declines the meeting politely.",
    instances=(Instance(input="", output="Thank you, but I cannot come."),),
)  # fmt: skip
TASKS = {
    "Explain why the sky looks red at sunset.": "Blue light is scattered away on the long path.",
    "Explain why the sky looks red at dawn.": "The same.",  # a near-duplicate of the first
    "Name three fruits that grow in cold countries.": "Apples.",  # the seed
    "Draft a short reply that declines the meeting politely.": "No.",  # the evaluation task
    "Draw a picture of a harbour at night.": "I drew it.",
    "Convert 12 inches to centimetres for a carpenter.": "12 inches are 30.48 cm.",
}


def answer(tasks: dict[str, str], request: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    blocks = [
        f"{number}. Instruction: {instruction}\n{number}. Input:\n<noinput>\n{number}. Output:\n{output}"
        for number, (instruction, output) in enumerate(tasks.items(), start=4)
    ]
    text = "\n###\n".join(blocks).removeprefix("4. Instruction:")
    asked = {"request": request, "seed_tasks": ["seed_0"]}
    return asked, {"text": text, "finish_reason": "stop", "model": "teacher-2026-01-01"}


def harvest(**changes: Any) -> Harvest:
    return Harvest.start(GenerateConfig(**({"num_instructions": 10} | changes)), [SEED], [EVALUATED])


def test_every_task_is_kept_with_lineage_or_rejected_with_a_reason() -> None:
    result = harvest()
    result.add(*answer(TASKS))
    instructions = list(TASKS)
    assert [row["instruction"] for row in result.kept] == [instructions[0], instructions[5]]
    assert [(reject["position"], reject["reason"]) for reject in result.rejects] == [
        (1, "duplicate"), (2, "duplicate"), (3, "contaminated"), (4, "blocked_word")
    ]  # fmt: skip
    assert {reject["nearest"] for reject in result.rejects[1:3]} == {SEED.instruction, EVALUATED.instruction}
    assert dict(result.reasons) == {"duplicate": 2, "contaminated": 1, "blocked_word": 1}
    first = result.kept[0]
    assert (first["id"], first["request"], first["position"]) == ("000000-00", 0, 0)
    assert (first["model"], first["seed_tasks"]) == ("teacher-2026-01-01", ["seed_0"])
    assert first["prompt_version"].startswith("alpaca-")


def test_a_filter_can_be_switched_off() -> None:
    result = harvest(skip_filters=["blocked_word", "contaminated"])
    result.add(*answer(TASKS))
    assert dict(result.reasons) == {"duplicate": 2}


def test_what_comes_after_the_last_needed_is_surplus() -> None:
    result = harvest(num_instructions=1)
    result.add(*answer(TASKS))
    assert result.full
    assert len(result.kept) == 1
    assert {reject["reason"] for reject in result.rejects} == {"surplus"}
