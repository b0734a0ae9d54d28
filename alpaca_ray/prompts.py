"""Prompt formats. The text itself lies in prompts/, one file a format."""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from alpaca_ray.schema import Example, SeedTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How a teacher is asked: a completions API, a chat API, a chat API with structured outputs.
PromptStyle = Literal["alpaca", "chat", "json"]

NO_INPUT = "<noinput>"
SEPARATOR = "###"


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's prompt, byte for byte: a wire format that its published checkpoints were trained on.

    The answer and the end-of-sequence token follow directly, with no space or line break between.
    """
    if input:
        return _text("alpaca_input.txt").format(instruction=instruction, input=input)
    return _text("alpaca_no_input.txt").format(instruction=instruction)


def prompt_of(example: Example) -> str:
    """The Alpaca prompt of an example."""
    return alpaca_prompt(example.instruction, example.input)


def answer_ids(prompt: str, prompt_ids: list[int], answer: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The answer's tokens as they follow `prompt_ids`, for training and for scoring alike.

    Alpaca tokenised prompt and answer together and masked the prompt's own length. We do so while the prompt keeps
    its tokens: a SentencePiece tokenizer would put a space before an answer that it sees alone. Where a merge spans
    the border (":" and ")" to ":)"), that mask would eat the answer's beginning, and at inference the prompt ends in
    tokens of its own; there the answer is tokenised alone.

    `split_special_tokens`: an answer that quotes "</s>" must not teach the model to stop there.
    """
    together: list[int] = tokenizer(prompt + answer, split_special_tokens=True)["input_ids"]
    if together[: len(prompt_ids)] == prompt_ids:
        return together[len(prompt_ids) :]
    alone: list[int] = tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return alone


def alpaca_chat_template(adds_bos: bool) -> str:
    """A Jinja chat template that turns a conversation into Alpaca's prompt.

    `adds_bos`: whether the tokenizer puts a beginning-of-sequence token before plain text, as Llama's does. Chat
    templates are tokenised without special tokens, so the template has to carry it.
    """
    return ("{{- bos_token -}}" if adds_bos else "") + _text("alpaca_chat.jinja")


def generation_prompt(examples: Sequence[SeedTask], num_tasks: int, style: PromptStyle = "alpaca") -> str:
    """Ask for tasks numbered up to `num_tasks`; the examples take the first numbers.

    "alpaca": ends within the first new task ("4. Instruction:" after three examples), so that a completion goes on
    there. "chat" and "json": one user message, which ends in how to answer; "json" goes with `response_format`.
    """
    blocks = [_text("generate.txt").format(num_tasks=num_tasks)]
    blocks += [_numbered(number, task) for number, task in enumerate(examples, start=1)]
    first = first_number(len(examples))
    if style == "alpaca":
        blocks.append(f"{SEPARATOR}\n{first}. Instruction:")
    else:
        ending = _text(f"generate_{style}.txt")
        blocks.append(
            ending.format(
                num_tasks=num_tasks,
                num_examples=len(examples),
                num_new_tasks=num_tasks - len(examples),
                first_number=first,
            )
        )
    return "\n".join(blocks)


def response_format(num_new_tasks: int) -> dict[str, Any]:
    """The `response_format` of a chat request of style "json".

    OpenAI's strict mode wants every property required and no further ones, and not every server that has it knows
    `minItems`: the number stands in a description.
    """
    fields = ("instruction", "input", "output")
    task = _strict_object({name: {"type": "string"} for name in fields})
    tasks = {"type": "array", "description": f"{num_new_tasks} tasks", "items": task}
    schema = _strict_object({"tasks": tasks})
    return {"type": "json_schema", "json_schema": {"name": "tasks", "strict": True, "schema": schema}}


def prompt_version(style: PromptStyle) -> str:
    """Which text a row was asked for with: the style and the SHA-256 over its files, first 12 digits."""
    names = ["generate.txt"] if style == "alpaca" else ["generate.txt", f"generate_{style}.txt"]
    text = "\0".join(_text(name) for name in names)
    return f"{style}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def first_number(num_examples: int) -> int:
    """The number of the first new task in a response."""
    return num_examples + 1


def stop_sequence(num_tasks: int) -> str:
    """Where a response of style "alpaca" has enough tasks.

    A whole heading, so that no sentence of an answer is ever cut by it.
    """
    return f"\n{num_tasks + 1}. Instruction:"


def _numbered(number: int, task: SeedTask) -> str:
    instance = task.instances[0]
    return (
        f"{SEPARATOR}\n{number}. Instruction: {_one_line(task.instruction)}\n"
        f"{number}. Input:\n{instance.input or NO_INPUT}\n"
        f"{number}. Output:\n{instance.output}"
    )


def _strict_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _one_line(instruction: str) -> str:
    return " ".join(instruction.split()).rstrip(":")


@cache
def _text(name: str) -> str:
    # The files end with a line break, as text files should; the formats do not.
    return (resources.files("alpaca_ray") / "prompts" / name).read_text(encoding="utf-8").removesuffix("\n")
