"""Prompt formats. The text itself lies in prompts/, one file a format."""

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from alpaca_ray.schema import Example, SeedTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def generation_prompt(examples: Sequence[SeedTask], num_tasks: int) -> str:
    """Ask for tasks numbered up to `num_tasks`; the examples take the first numbers.

    It ends within the first new task ("4. Instruction:" after three examples), so that a completion goes on there.
    """
    blocks = [_text("generate.txt").format(num_tasks=num_tasks)]
    for number, task in enumerate(examples, start=1):
        instance = task.instances[0]
        blocks.append(
            f"{SEPARATOR}\n{number}. Instruction: {_one_line(task.instruction)}\n"
            f"{number}. Input:\n{instance.input or NO_INPUT}\n"
            f"{number}. Output:\n{instance.output}"
        )
    return "\n".join(blocks) + f"\n{SEPARATOR}\n{first_number(len(examples))}. Instruction:"


def first_number(num_examples: int) -> int:
    """The number of the first new task in a response."""
    return num_examples + 1


def stop_sequence(num_tasks: int) -> str:
    """Where a response has enough tasks. A whole heading, so that no sentence of an answer is ever cut by it."""
    return f"\n{num_tasks + 1}. Instruction:"


def _one_line(instruction: str) -> str:
    return " ".join(instruction.split()).rstrip(":")


@cache
def _text(name: str) -> str:
    # The files end with a line break, as text files should; the formats do not.
    return (resources.files("alpaca_ray") / "prompts" / name).read_text(encoding="utf-8").removesuffix("\n")
