"""The official client against the API on a real port, with the PyTorch engine and a tiny model, in float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion, CompletionChoice
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alpaca_ray.models import load_model, load_tokenizer
from alpaca_ray.serve.engine import Engine
from alpaca_ray.serve.protocol import seed_of_choice
from alpaca_ray.serve.text import TokenizedModel
from alpaca_ray.serve.torch_engine import TorchEngine, decoder_for, end_token_ids
from tests.serving import CHAT_TEMPLATE, served

MAX_LENGTH = 256
SAMPLED: dict[str, Any] = {"model": "tiny", "temperature": 1.1, "seed": 11, "max_tokens": 24}
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> PreTrainedModel:
    model = load_model(str(tiny_model), "float32")
    model.eval()  # type: ignore[no-untyped-call]  # transformers'
    return model


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    """tests/vllm has the same suite with another one."""
    model = load_model(str(tiny_model), "float32")
    engine = TorchEngine(decoder_for(model, num_slots=16, max_length=MAX_LENGTH), end_token_ids(model))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> Iterator[openai.OpenAI]:
    with (
        served(TokenizedModel(engine, tokenizer)) as url,
        openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0, timeout=60) as client,
    ):
        yield client


@torch.inference_mode()
def direct(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(T, V): log-probabilities of the token at each place, from those before it; the first row is left out."""
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(dim=-1)


def only(completion: Completion) -> CompletionChoice:
    (choice,) = completion.choices
    return choice


def test_greedy_text_is_that_of_transformers(
    client: openai.OpenAI, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = ["The sky is", "a", "One, two, three, "]
    answer = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=20)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generate: Any = reference.generate
        generated = generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert choice.text == tokenizer.decode(generated, skip_special_tokens=True)


def test_a_prompt_may_be_text_or_its_token_ids(client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Hello", "à la"]
    ids = [tokenizer(text)["input_ids"] for text in texts]

    by_text = client.completions.create(prompt=texts, echo=True, **SAMPLED)
    by_ids = client.completions.create(prompt=ids, echo=True, **SAMPLED)
    one = client.completions.create(prompt=ids[1], echo=True, **SAMPLED)

    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert only(one).text == by_text.choices[1].text
    assert by_text.usage == by_ids.usage


def test_a_seed_gives_its_text_alone_and_in_a_full_batch(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return only(client.completions.create(prompt="Say: ", **SAMPLED | {"seed": seed})).text

    alone = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, [0, 1, 2, 3, *range(100, 116)]))

    assert together[:4] == alone
    assert len(set(together)) == len(together)


def test_choice_i_is_drawn_with_a_seed_of_its_own(client: openai.OpenAI) -> None:
    choices = client.completions.create(prompt="Say: ", n=3, **SAMPLED).choices
    alone = []
    for i in range(3):
        asked = SAMPLED | {"seed": seed_of_choice(SAMPLED["seed"], i)}
        alone.append(only(client.completions.create(prompt="Say: ", **asked)).text)

    assert [choice.text for choice in choices] == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"logprobs": 2, "echo": True}, {"stop": ["a", "e"]}])
def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    whole = client.completions.create(prompt=["ab", "c"], **SAMPLED, **extra)
    events = list(
        client.completions.create(
            prompt=["ab", "c"], **SAMPLED, **extra, stream=True, stream_options={"include_usage": True}
        )
    )

    assert events[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [event.choices[0] for event in events[:-1] if event.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]
        if choice.logprobs is not None:
            streamed = [token for one in mine if one.logprobs for token in one.logprobs.tokens or []]
            assert streamed == choice.logprobs.tokens


def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    asked = SAMPLED | {"logprobs": True, "top_logprobs": 3}
    full = client.chat.completions.create(messages=CHAT, **asked).choices[0].message.content
    assert full
    asked["stop"] = full[9]  # the client's own accumulator takes a text that reached its limit for an error
    whole = client.chat.completions.create(messages=CHAT, **asked).choices[0]
    with client.chat.completions.stream(messages=CHAT, **asked) as stream:
        accumulated = stream.get_final_completion().choices[0]

    assert accumulated.message.content == whole.message.content == full[: full.index(full[9])]
    assert accumulated.finish_reason == whole.finish_reason == "stop"
    assert accumulated.logprobs is not None
    assert whole.logprobs is not None
    assert accumulated.logprobs.model_dump() == whole.logprobs.model_dump()


def test_a_chat_is_the_completion_of_its_template(client: openai.OpenAI) -> None:
    prompt = "system: Be brief.\nuser: Name a colour.\nassistant:"
    chat = client.chat.completions.create(messages=CHAT, **SAMPLED)
    completion = client.completions.create(prompt=prompt, **SAMPLED)

    assert chat.choices[0].message.content == only(completion).text
    assert chat.usage == completion.usage


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    asked = SAMPLED | {"max_tokens": 60}
    full = only(client.completions.create(prompt="Say: ", **asked)).text
    stop = full[8:10]
    cut = client.completions.create(prompt="Say: ", stop=[stop, "never there"], **asked)

    assert (only(cut).text, only(cut).finish_reason) == (full[: full.index(stop)], "stop")
    assert cut.usage is not None
    assert cut.usage.completion_tokens < 60


def test_top_k_of_one_is_greedy(client: openai.OpenAI) -> None:
    greedy = only(client.completions.create(prompt="Say: ", **SAMPLED | {"temperature": 0})).text
    assert only(client.completions.create(prompt="Say: ", **SAMPLED, extra_body={"top_k": 1})).text == greedy
    assert only(client.completions.create(prompt="Say: ", **SAMPLED | {"top_p": 1e-9})).text == greedy


def test_a_frequency_penalty_makes_tokens_rarer(client: openai.OpenAI) -> None:
    def num_distinct(penalty: float) -> int:
        asked = SAMPLED | {"temperature": 0, "max_tokens": 60, "frequency_penalty": penalty, "logprobs": 0}
        logprobs = only(client.completions.create(prompt="Say: ", **asked)).logprobs
        assert logprobs is not None
        return len(set(logprobs.tokens or []))

    assert num_distinct(2.0) > num_distinct(0.0)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_are_those_of_the_model(
    client: openai.OpenAI, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    """As lm-eval asks: token ids in, echo, and the log-probabilities of all tokens but what was generated."""
    rows = [tokenizer(text)["input_ids"] for text in ("The capital of France is Paris.", "x", "é€ and more " * 8)]
    answer = client.completions.create(
        model="tiny", prompt=rows, echo=True, logprobs=5, max_tokens=max_tokens, temperature=0
    )
    for ids, choice in zip(rows, answer.choices, strict=True):
        assert choice.logprobs is not None
        values: list[Any] = list(choice.logprobs.token_logprobs or [])
        top: list[Any] = list(choice.logprobs.top_logprobs or [])
        assert (values[0], top[0], len(values)) == (None, None, len(ids) + max_tokens)
        if len(ids) == 1:
            continue
        expected = direct(reference, ids)
        own = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (torch.tensor(values[1 : len(ids)]) - own).abs().max() < 1e-4
        for tokens, best in zip(top[1 : len(ids)], expected.topk(5).values, strict=True):
            assert (torch.tensor(sorted(tokens.values(), reverse=True)[:5]) - best).abs().max() < 1e-4


def test_logprobs_of_sampled_tokens_are_of_the_model_alone(
    client: openai.OpenAI, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = SAMPLED | {"top_p": 0.9, "presence_penalty": 1.0, "seed": 8}  # it begins with whole characters
    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=20, **asked)
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    texts = {i: str(tokenizer.decode([i])) for i in range(259)}
    alphabet = {tuple(text.encode()): i for i, text in texts.items() if text.isascii()}
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    num_prompt_tokens = len(ids)

    for token in tokens:
        if (found := alphabet.get(tuple(token.bytes or []))) is None:
            break  # half a character: what follows it cannot be told apart by text
        ids = [*ids, found]
    expected = direct(reference, ids)[num_prompt_tokens - 1 :]
    for i, row in enumerate(expected):
        assert abs(tokens[i].logprob - row[ids[num_prompt_tokens + i]].item()) < 1e-4
        told = [one.logprob for one in tokens[i].top_logprobs]
        assert (torch.tensor(told) - row.topk(20).values).abs().max() < 1e-4
        assert all(a >= b for a, b in pairwise(told))
    assert len(ids) > num_prompt_tokens


def test_usage_counts_each_prompt_once(client: openai.OpenAI) -> None:
    usage = client.completions.create(prompt=["abc", "de"], n=3, **SAMPLED | {"max_tokens": 4}).usage
    assert usage is not None
    assert usage.prompt_tokens == 5
    assert usage.completion_tokens <= 6 * 4
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny", prompt="x" * MAX_LENGTH)
    with pytest.raises(openai.BadRequestError) as too_much:
        client.completions.create(model="tiny", prompt="x", max_tokens=MAX_LENGTH, stream=True)
    with pytest.raises(openai.BadRequestError) as misspelt:
        client.completions.create(model="tiny", prompt="x", extra_body={"temprature": 1})
    with pytest.raises(openai.NotFoundError) as unmarked:
        client.post("/watermark/detect", body={"text": "x"}, cast_to=object)

    assert unknown.value.code == "model_not_found"
    assert too_long.value.code == too_much.value.code == "context_length_exceeded"
    assert (misspelt.value.code, misspelt.value.param) == ("unknown_field", "temprature")
    assert unmarked.value.code == "no_watermark"
    assert [model.id for model in client.models.list()] == ["tiny"]
