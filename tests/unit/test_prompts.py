"""Prompt formats are wire formats: checked byte for byte, against text written here."""

import copy
import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alpaca_ray.generate.parse import Candidate, parse_completion
from alpaca_ray.prompts import (
    PromptStyle,
    alpaca_chat_template,
    alpaca_prompt,
    first_number,
    generation_prompt,
    prompt_of,
    prompt_version,
    response_format,
    stop_sequence,
)
from alpaca_ray.schema import Example, Instance, Reject, SeedTask, read_seed_tasks

WITH_INPUT = (
    b"Below is an instruction that describes a task, paired with an input that provides further context. "
    b"Write a response that appropriately completes the request.\n\n"
    b"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    b"Below is an instruction that describes a task. "
    b"Write a response that appropriately completes the request.\n\n"
    b"### Instruction:\n{instruction}\n\n### Response:"
)
PREAMBLE = WITHOUT_INPUT.decode().partition("###")[0]

brace_text = st.text(st.sampled_from("{}%#ab \n'\"")) | st.text(max_size=20)


def fill(template: bytes, instruction: str, input: str) -> bytes:
    """By cutting, not by formatting: what is filled in is never looked at again."""
    before, after = template.split(b"{instruction}")
    middle, found, end = after.partition(b"{input}")
    return before + instruction.encode() + middle + (input.encode() + end if found else b"")


@pytest.mark.parametrize(
    ("prompt", "template", "sha256"),
    [
        (
            alpaca_prompt("{instruction}", "{input}"),
            WITH_INPUT,
            "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f",
        ),
        (
            alpaca_prompt("{instruction}"),
            WITHOUT_INPUT,
            "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca",
        ),
    ],
)
def test_the_template_is_alpacas_byte_for_byte(prompt: str, template: bytes, sha256: str) -> None:
    assert prompt.encode() == template
    assert hashlib.sha256(prompt.encode()).hexdigest() == sha256


@settings(deadline=None, max_examples=100)
@given(brace_text, brace_text)
def test_instruction_and_input_are_filled_in_as_they_are(instruction: str, input: str) -> None:
    template = WITH_INPUT if input else WITHOUT_INPUT
    assert alpaca_prompt(instruction, input).encode() == fill(template, instruction, input)
    assert prompt_of(Example("id", instruction, input, "out")) == alpaca_prompt(instruction, input)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(tiny_model)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    loaded.chat_template = alpaca_chat_template(adds_bos=False)
    return loaded


@pytest.fixture(scope="module")
def llama_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One that puts a beginning-of-sequence token before plain text, as Llama's does."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    other.chat_template = alpaca_chat_template(adds_bos=True)
    return other


def chat(tokenizer: PreTrainedTokenizerFast, *messages: tuple[str, str]) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


@settings(deadline=None, max_examples=50)
@given(instruction=brace_text | st.sampled_from(["{{ bos_token }}", "{% raw %}", "{# x #}", "\n x \n"]))
def test_one_user_message_becomes_alpacas_prompt(tokenizer: PreTrainedTokenizerFast, instruction: str) -> None:
    assert chat(tokenizer, ("user", instruction)) == alpaca_prompt(instruction)


def test_a_chat_has_the_same_tokens_as_the_plain_prompt(
    tokenizer: PreTrainedTokenizerFast, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    for each, first_token in ((tokenizer, None), (llama_tokenizer, "<s>")):
        plain = each(alpaca_prompt("Name a {river}.")).input_ids
        chatted = each(chat(each, ("user", "Name a {river}.")), add_special_tokens=False).input_ids
        assert chatted == plain
        assert (each.convert_ids_to_tokens(plain)[0] == "<s>") == (first_token == "<s>")


def test_further_turns_repeat_the_headings_and_answers_end_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = chat(tokenizer, ("user", "One?"), ("assistant", "1."), ("user", "Two?"))
    assert rendered == (
        PREAMBLE + "### Instruction:\nOne?\n\n### Response:1.</s>\n\n### Instruction:\nTwo?\n\n### Response:"
    )


def test_a_system_message_opens_the_first_instruction_only(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("user", "One?"), ("assistant", "1."), ("user", "Two?"))
    with_system = chat(tokenizer, ("system", "Be brief."), *turns)
    assert with_system == chat(tokenizer, ("user", "Be brief.\n\nOne?"), *turns[1:])


def test_the_bos_variant_differs_by_the_bos_alone(
    tokenizer: PreTrainedTokenizerFast, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = (("system", "S"), ("user", "One?"), ("assistant", "1."), ("user", "Two?"))
    assert chat(llama_tokenizer, *turns) == "<s>" + chat(tokenizer, *turns)


SEEDS = read_seed_tasks(None)


def test_a_generation_prompt_ends_within_the_first_new_task() -> None:
    prompt = generation_prompt(SEEDS[:3], num_tasks=20)
    assert prompt.endswith("\n###\n4. Instruction:")
    assert prompt.count("\n###\n") == 4
    assert "20 tasks" in prompt
    assert first_number(3) == 4


def test_the_examples_of_a_generation_prompt_are_parsed_back() -> None:
    for first in range(0, 174, 3):
        examples = SEEDS[first : first + 3]
        after_first_heading = generation_prompt(examples, 20).split("\n1. Instruction:", 1)[1]
        wanted = [
            Candidate(" ".join(t.instruction.split()).rstrip(":"), t.instances[0].input, t.instances[0].output)
            for t in examples
        ]
        parsed = parse_completion(after_first_heading, "stop", num_examples=0)
        assert parsed == [*wanted, Reject("no_output", "4. Instruction:")]


def test_an_instruction_takes_one_line_and_no_colon_at_its_end() -> None:
    task = SeedTask(
        id="a",
        name="a",
        instruction=" Sort\n these \t words: ",
        instances=(Instance(input="b a", output="a b"),),
        is_classification=False,
    )
    assert "\n1. Instruction: Sort these words\n1. Input:\nb a\n1. Output:\na b\n###\n2. I" in generation_prompt(
        [task], 5
    )


def test_the_stop_sequence_is_the_heading_after_the_last_task_asked_for() -> None:
    assert stop_sequence(20) == "\n21. Instruction:"
    prompt = generation_prompt(SEEDS[:3], num_tasks=3)
    assert prompt.endswith(stop_sequence(3))  # where the next one would begin


@pytest.mark.parametrize(
    ("num_examples", "num_tasks", "sha256"),
    [
        (1, 5, "39676987e8d24fc175679d80910a0552194719cfb7f254e8096b51c78a1d6b29"),
        (3, 20, "951d68e914b9c3382d335219791d3a720cb37841e6eb517a9d1407c446a3317e"),
    ],
)
def test_the_generation_prompt_of_recorded_runs_stays_as_it_is(num_examples: int, num_tasks: int, sha256: str) -> None:
    prompt = generation_prompt(SEEDS[:num_examples], num_tasks)
    assert hashlib.sha256(prompt.encode()).hexdigest() == sha256


@pytest.mark.parametrize("style", ["chat", "json"])
def test_the_styles_share_rules_and_examples(style: PromptStyle) -> None:
    plain = generation_prompt(SEEDS[:3], 20).removesuffix("4. Instruction:")
    prompt = generation_prompt(SEEDS[:3], 20, style)
    assert prompt.startswith(plain)
    ending = prompt.removeprefix(plain)
    assert "3 of 20 tasks" in ending
    assert "{" not in ending  # every blank is filled in
    assert not prompt[-1].isspace()


def test_a_chat_prompt_says_where_the_list_goes_on_and_ends() -> None:
    for num_examples in (1, 5):
        prompt = generation_prompt(SEEDS[:num_examples], 12, "chat")
        assert f'Begin with "{num_examples + 1}. Instruction:"' in prompt
        assert "end with task 12," in prompt
        assert f"{12 - num_examples} new tasks" in generation_prompt(SEEDS[:num_examples], 12, "json")


def objects(schema: object) -> list[dict[str, object]]:
    """All JSON schemas of objects within a schema."""
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    return [schema] * (schema.get("type") == "object") + objects(list(schema.values()))


def test_the_response_format_is_one_of_openais_strict_mode() -> None:
    wanted = response_format(17)
    assert json.loads(json.dumps(wanted)) == wanted
    assert set(wanted) == {"type", "json_schema"}
    assert wanted["json_schema"]["strict"] is True
    schema = wanted["json_schema"]["schema"]
    assert len(objects(schema)) == 2
    for each in objects(schema):
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])  # type: ignore[call-overload]
    assert list(schema["properties"]["tasks"]["items"]["properties"]) == ["instruction", "input", "output"]
    assert "17" in schema["properties"]["tasks"]["description"]
    assert not {"minItems", "maxItems", "minLength", "pattern"} & set(json.dumps(wanted).split('"'))


def test_an_answer_in_the_response_format_is_parsed() -> None:
    fields = response_format(1)["json_schema"]["schema"]["properties"]["tasks"]["items"]["required"]
    answer = json.dumps({"tasks": [dict(zip(fields, ["Name a river.", "", "The Rhine."], strict=True))]})
    assert parse_completion(answer, "stop", 3, "json") == [Candidate("Name a river.", "", "The Rhine.")]


def test_the_prompt_version_names_style_and_text() -> None:
    folder = resources.files("alpaca_ray") / "prompts"
    rules, chat_ending = (
        (folder / name).read_text().removesuffix("\n") for name in ("generate.txt", "generate_chat.txt")
    )
    assert prompt_version("alpaca") == "alpaca-" + hashlib.sha256(rules.encode()).hexdigest()[:12]
    both = f"{rules}\0{chat_ending}"
    assert prompt_version("chat") == "chat-" + hashlib.sha256(both.encode()).hexdigest()[:12]
    assert len({prompt_version(style).split("-")[1] for style in ("alpaca", "chat", "json")}) == 3
