"""The watermark is transformers' bit for bit, is found where it was put, and nowhere else."""

import io
import json
import math
import pickle
import random
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, PreTrainedModel, WatermarkDetector, WatermarkingConfig
from transformers.generation.logits_process import WatermarkLogitsProcessor

from alpaca_ray import cli, models
from alpaca_ray.config import UserError
from alpaca_ray.safety.detection import (
    MAX_FALSE_POSITIVE_RATE,
    MIN_SCORED,
    detection,
    log_upper_tail,
    power_of_ten,
    verdict,
    z_score,
)
from alpaca_ray.safety.watermark import CACHE_BYTES, Watermark, detect_text, vocab_size
from alpaca_ray.safety.watermark_key import MAX_KEY, MIN_DISTANCE, MIN_KEY, PUBLIC_KEY, check_key, read_key
from alpaca_ray.schema import read_seed_tasks

KEY, OTHER_KEY = 3_141_592_653_589_793_237, 2_718_281_828_459_045_235
LOWEST, HIGHEST = MIN_KEY + MIN_DISTANCE + 1, MAX_KEY - MIN_DISTANCE
TINY = 259  # the tiny model's vocabulary
PROMPT = [11, 12, 13]


def processor(key: int, size: int) -> Any:  # its annotations ask for types that nobody has
    return WatermarkLogitsProcessor(vocab_size=size, device="cpu", hashing_key=key)


def detector(key: int, unique: bool = False) -> Any:
    setting = WatermarkingConfig(hashing_key=key, greenlist_ratio=0.25, bias=2.0, context_width=1)
    return WatermarkDetector(LlamaConfig(vocab_size=TINY, bos_token_id=1), "cpu", setting, unique)


# 259 and 1001 are no multiples of 8, nor of 4; 128256 is Llama 3's.
@pytest.mark.parametrize("size", [TINY, 1001, 4096, 128_256])
@pytest.mark.parametrize("key", [LOWEST, KEY, HIGHEST])
def test_the_green_lists_are_transformers(key: int, size: int) -> None:
    theirs, ours = processor(key, size), Watermark(key, vocab_size=size)
    for token in [0, 1, 2, size - 1, *random.Random(size).sample(range(size), 20)]:
        expected = torch.zeros(size, dtype=torch.bool)
        expected[theirs._get_greenlist_ids(torch.tensor([token]))] = True
        assert torch.equal(ours.green_mask(token), expected)
        assert torch.equal(ours.green_mask(token), expected)  # from the cache too


def test_the_bias_is_what_transformers_adds() -> None:
    previous = [5, 7, 5, 258]
    logits = torch.randn(len(previous), TINY)
    expected = processor(KEY, TINY)(torch.tensor(previous)[:, None], logits)
    bias = Watermark(KEY, vocab_size=TINY).bias(previous)
    assert bias.dtype == torch.float32
    assert torch.equal(logits + bias, expected)
    assert Watermark(KEY, vocab_size=TINY).bias([]).shape == (0, TINY)


def test_a_warm_cache_has_the_same_lists() -> None:
    warm, cold = Watermark(KEY, vocab_size=TINY), Watermark(KEY, vocab_size=TINY)
    assert warm.warm() == warm._list.cache_info().misses == TINY
    everyone = list(range(TINY))
    assert torch.equal(warm.bias(everyone), cold.bias(everyone))
    assert warm._list.cache_info().misses == TINY


def test_the_cache_is_bounded_in_bytes() -> None:
    num_lists = Watermark(KEY, vocab_size=50_000)._list.cache_info().maxsize
    assert num_lists is not None
    assert num_lists * 50_000 / 8 <= CACHE_BYTES < (num_lists + 1) * 50_000 / 8


def test_lists_are_made_on_the_cpu_whatever_the_default_device() -> None:
    expected = Watermark(KEY, vocab_size=TINY).bias([7, 9])
    with torch.device("meta"):
        assert torch.equal(Watermark(KEY, vocab_size=TINY).bias([7, 9]), expected)


@pytest.mark.parametrize("unique", [False, True])
def test_the_z_score_is_that_of_transformers_detector(unique: bool) -> None:
    ours = Watermark(KEY, vocab_size=TINY)
    theirs = detector(KEY, unique)
    for seed in range(10):
        ids = random.Random(seed).choices(range(2, 30), k=40 + 20 * seed)  # few tokens: many pairs repeat
        expected = theirs(torch.tensor([ids]), return_dict=True)
        pairs = list(pairwise(ids))
        if unique:
            found = ours.detect(ids)
            assert found.num_scored == expected.num_tokens_scored[0] < len(pairs)
            assert found.num_green == expected.num_green_tokens[0]
            assert found.z_score == pytest.approx(expected.z_score[0], abs=1e-12)
        else:
            assert ours.num_green(pairs) == expected.num_green_tokens[0]
            assert z_score(ours.num_green(pairs), len(pairs), 0.25) == pytest.approx(expected.z_score[0], abs=1e-12)


@torch.inference_mode()
def write(
    model: PreTrainedModel, watermark: Watermark | None, num_texts: int = 1, temperature: float = 1.0
) -> list[list[int]]:
    """The prompt and 200 tokens, chosen as an engine chooses them; temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([PROMPT] * num_texts)  # (N, T)
    for _ in range(200):
        logits = model(ids).logits[:, -1]  # (N, V)
        if watermark is not None:
            logits = logits + watermark.bias(ids[:, -1].tolist())
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        ids = torch.cat([ids, chosen], 1)
    texts: list[list[int]] = ids.tolist()
    return texts


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return models.load_model(str(tiny_model), "float32")


def test_a_marked_text_is_found_with_its_key_alone(model: PreTrainedModel) -> None:
    watermark = Watermark(KEY, vocab_size=TINY)
    other = Watermark(OTHER_KEY, vocab_size=TINY)
    for ids in write(model, watermark, num_texts=8):
        found = watermark.detect(ids, len(PROMPT))
        assert found.verdict == "marked"
        assert found.p_value < 1e-6
        assert other.detect(ids, len(PROMPT)).verdict == "unmarked"
    for ids in write(model, None, num_texts=8):
        assert watermark.detect(ids, len(PROMPT)).verdict == "unmarked"


def test_greedy_output_is_marked_too(model: PreTrainedModel) -> None:
    """The tiny model's greedy text runs in circles, so that its few distinct pairs are all that can be judged."""
    watermark = Watermark(KEY, vocab_size=TINY)
    found = watermark.detect(write(model, watermark, temperature=0)[0], len(PROMPT))
    assert found.num_green > 0.9 * found.num_scored
    assert found.verdict in ("marked", "too short to say")


def test_what_transformers_marks_is_found_and_the_other_way_round(model: PreTrainedModel) -> None:
    ours = Watermark(KEY, vocab_size=TINY)
    setting = WatermarkingConfig(hashing_key=KEY, greenlist_ratio=0.25, bias=2.0, context_width=1)
    torch.manual_seed(0)
    generate: Any = model.generate
    theirs = generate(
        torch.tensor([PROMPT]), watermarking_config=setting, do_sample=True, min_new_tokens=150, max_new_tokens=150
    )
    assert ours.detect(theirs[0].tolist(), len(PROMPT)).verdict == "marked"
    assert detector(KEY)(torch.tensor(write(model, ours))[:, len(PROMPT) :])[0]


ids_strategy = st.lists(st.integers(0, TINY - 1), min_size=1, max_size=60)


@settings(deadline=None)
@given(prompt=ids_strategy, other=ids_strategy, completion=ids_strategy)
def test_the_prompt_plays_no_part(prompt: list[int], other: list[int], completion: list[int]) -> None:
    """But for its last token, which chose the list of the completion's first."""
    watermark = Watermark(KEY, vocab_size=TINY)
    with_last = [*other, prompt[-1]]
    found = watermark.detect(prompt + completion, len(prompt))
    assert found == watermark.detect(with_last + completion, len(with_last))
    assert found == watermark.detect([prompt[-1], *completion])
    assert watermark.detect(prompt, len(prompt)).num_scored == 0


@settings(deadline=None)
@given(ids=ids_strategy, times=st.integers(2, 5))
def test_a_repeated_pair_counts_once(ids: list[int], times: int) -> None:
    watermark = Watermark(KEY, vocab_size=TINY)
    assert watermark.detect(ids * times) == watermark.detect([*ids, ids[0]])


@given(data=st.data(), num_scored=st.integers(0, 1500), gamma=st.sampled_from([0.25, 0.5, 0.75, 0.0625]))
@settings(deadline=None, max_examples=50)
def test_the_p_value_is_exact(data: st.DataObject, num_scored: int, gamma: float) -> None:
    num_green = data.draw(st.integers(0, num_scored))
    share = Fraction(gamma)
    tail = sum(  # in whole numbers, over the common denominator
        math.comb(num_scored, k) * share.numerator**k * (share.denominator - share.numerator) ** (num_scored - k)
        for k in range(num_green, num_scored + 1)
    )
    exact = math.log(tail) - num_scored * math.log(share.denominator)
    assert log_upper_tail(num_green, num_scored, gamma) == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_a_p_value_too_small_for_a_float_is_not_zero() -> None:
    found = detection(5000, 5000, gamma=0.25, delta=2.0)
    assert 0 < found.p_value < 1e-300
    assert found.log10_p_value == pytest.approx(5000 * math.log10(0.25))
    assert json.loads(found.to_json())["verdict"] == "marked"
    assert "9.1e-3011" not in found.render()
    assert "e-3011" in found.render()


@pytest.mark.parametrize(
    ("exponent", "text"), [(0.0, "1"), (-1.3, "0.05"), (-400.5, "3.2e-401"), (-3.0, "1.0e-3"), (-5.0001, "1.0e-5")]
)
def test_powers_of_ten(exponent: float, text: str) -> None:
    assert power_of_ten(exponent) == text


def test_nothing_scored_is_nothing_said() -> None:
    for ids in ([], [5]):
        found = Watermark(KEY, vocab_size=TINY).detect(ids)
        assert (found.verdict, found.z_score, found.p_value, found.num_scored) == ("too short to say", 0.0, 1.0, 0)


@given(data=st.data(), num_scored=st.integers(0, 400))
@settings(deadline=None)
def test_a_verdict_is_never_a_guess(data: st.DataObject, num_scored: int) -> None:
    num_green = data.draw(st.integers(0, num_scored))
    said = verdict(num_green, num_scored, 0.25, 2.0)
    p_value = math.exp(log_upper_tail(num_green, num_scored, 0.25))
    if num_scored < MIN_SCORED:
        assert said == "too short to say"
    elif p_value <= MAX_FALSE_POSITIVE_RATE:
        assert said == "marked"
    else:
        assert said == "unmarked" if num_scored >= 150 else said != "marked"  # 150 distinct pairs always decide
    assert said != "unmarked" or num_green < 0.475 * num_scored  # as green as half of delta makes an even choice


def test_thirty_pairs_of_average_colour_are_too_few_to_clear_a_text() -> None:
    assert [verdict(green, 30, 0.25, 2.0) for green in (5, 8, 12, 18)] == [
        "unmarked",
        "too short to say",
        "too short to say",
        "marked",
    ]


def strong_key(rng: random.Random) -> int:
    """A key that is refused for no weakness: its low half is odd and far from 0."""
    return rng.getrandbits(30) << 32 | 2**31 | rng.getrandbits(30) | 1


def windows_of_ids(rng: random.Random, count: int, length: int) -> list[list[int]]:
    """Ids with the frequencies of words: the k-th likeliest in proportion to 1 / (k + 3)."""
    weights = [1 / (k + 3) for k in range(1000)]
    return [rng.choices(range(1000), weights, k=length) for _ in range(count)]


def windows_of_text(tiny_model: Path, count: int, length: int) -> list[list[int]]:
    text = "\n".join(f"{task.instruction} {task.instances[0].output}" for task in read_seed_tasks(None))
    ids = models.load_tokenizer(str(tiny_model))(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length, length)][:count]


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_unmarked_windows_are_rarely_taken_for_marked(tiny_model: Path, kind: str) -> None:
    """At most as often as the p-value says, over 3,000 windows.

    Many keys with few windows each: under one key all texts share the colours of their commonest pairs.
    """
    rng = random.Random(0)
    if kind == "ids":
        size, num_keys, windows = 1000, 60, windows_of_ids(rng, 500, 100)
    else:
        size, num_keys, windows = TINY, 300, windows_of_text(tiny_model, 200, 250)
    p_values: list[float] = []
    for _ in range(num_keys):
        watermark = Watermark(strong_key(rng), vocab_size=size)
        p_values += [watermark.detect(window).p_value for window in rng.sample(windows, 3000 // num_keys)]
    assert len(p_values) == 3000
    for level in (1e-1, 1e-2, 1e-3):
        assert sum(p <= level for p in p_values) <= level * len(p_values)


@pytest.mark.parametrize("token", [-1, TINY, 10**9])
def test_a_token_outside_the_vocabulary_is_named(token: int) -> None:
    watermark = Watermark(KEY, vocab_size=TINY)
    for call in (watermark.green_mask, lambda t: watermark.bias([t]), lambda t: watermark.detect([1, t]),
                 lambda t: watermark.detect([t, 1])):  # fmt: skip
        with pytest.raises(UserError, match=f"token id {token} is not in the vocabulary of 259"):
            call(token)


@pytest.mark.parametrize(
    ("named", "gamma", "delta"),
    [("gamma", 0.0, 2.0), ("gamma", 1.0, 2.0), ("gamma", 0.001, 2.0), ("gamma", math.nan, 2.0), ("delta", 0.25, 0.0),
     ("delta", 0.25, math.inf), ("delta", 0.25, math.nan)],
)  # fmt: skip
def test_values_without_sense_are_refused_by_name(named: str, gamma: float, delta: float) -> None:
    with pytest.raises(UserError, match=named):
        Watermark(KEY, gamma, delta, vocab_size=TINY)


WEAK = [0, 1, -1, 12345, 2**32, 2**32 + 7, 2**33 - 5, 2**40, 2**61, 3 * 2**44, 12345 * 2**12, 2**63, 2**64 + KEY]


@pytest.mark.parametrize("key", WEAK)
def test_weak_keys_are_refused_and_not_shown(key: int) -> None:
    with pytest.raises(UserError, match="secrets") as caught:
        Watermark(key, vocab_size=TINY, allow_public_key=True)
    assert abs(key) < 100 or str(key) not in str(caught.value)


def test_what_makes_keys_weak() -> None:
    """Torch takes 32 bits of a seed. A key that ends in so many zeros gives all tokens one list."""
    lists = [processor(2**40, 1000)._get_greenlist_ids(torch.tensor([token])) for token in (1, 2, 3)]
    assert torch.equal(lists[0], lists[1])
    assert torch.equal(lists[0], lists[2])
    same = [processor(key, 1000)._get_greenlist_ids(torch.tensor([9])) for key in (PUBLIC_KEY, PUBLIC_KEY + 2**40)]
    assert torch.equal(*same)


def test_the_published_key_is_refused_unless_asked_for_by_name() -> None:
    for key in (PUBLIC_KEY, PUBLIC_KEY + 2**40):
        with pytest.raises(UserError, match="allow_public_key"):
            Watermark(key, vocab_size=TINY)
    allowed = Watermark(PUBLIC_KEY, vocab_size=TINY, allow_public_key=True)
    theirs: Any = WatermarkLogitsProcessor(TINY, "cpu")  # by its own default
    logits = torch.zeros(1, TINY)
    assert torch.equal(allowed.bias([7]), theirs(torch.tensor([[7]]), logits))


def test_nearly_every_key_made_as_told_is_accepted() -> None:
    rng, refused = random.Random(0), 0
    for _ in range(20_000):
        try:
            check_key(rng.getrandbits(62))
        except UserError:
            refused += 1
    assert refused < 40  # 2**-11 + 2**-12 of them


def test_the_key_comes_from_the_variable_or_the_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{OTHER_KEY}\n")
    environ = {"ALPACA_RAY_WATERMARK_KEY": f" {KEY} ", "MINE": str(PUBLIC_KEY)}
    assert read_key(environ=environ).get_secret_value() == KEY
    assert read_key(key_file=path, environ=environ).get_secret_value() == OTHER_KEY
    assert read_key("MINE", allow_public_key=True, environ=environ).get_secret_value() == PUBLIC_KEY


@pytest.mark.parametrize("value", ["", "abcdef", "-4611686018427387905", "0x3fffffffffffffff", "1e18", "٤٦١١٦٨٦٠١٨٤",
                                   "9" * 5000, "15485863", str(2**62)])  # fmt: skip
def test_a_bad_key_is_named_by_its_source_and_not_shown(tmp_path: Path, value: str) -> None:
    (tmp_path / "key").write_text(value, encoding="utf-8")
    with pytest.raises(UserError, match="MY_KEY") as from_variable:
        read_key("MY_KEY", environ={"MY_KEY": value})
    with pytest.raises(UserError, match=str(tmp_path)) as from_file:
        read_key(key_file=tmp_path / "key", environ={})
    for caught in (from_variable, from_file):
        assert not value or value not in str(caught.value)
        assert caught.value.__cause__ is None
        assert "secrets.randbits(62)" in str(caught.value)


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("binary", "missing"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read_key(key_file=tmp_path / name)


def test_a_watermark_shows_and_carries_no_key() -> None:
    watermark = Watermark(KEY, vocab_size=TINY)
    watermark.bias([3])
    assert str(KEY) not in f"{watermark!r} {vars(watermark)}"
    assert str(KEY) not in repr(read_key(environ={"ALPACA_RAY_WATERMARK_KEY": str(KEY)}))
    with pytest.raises(TypeError, match="does not travel") as caught:
        pickle.dumps(watermark)
    assert str(KEY) not in str(caught.value)


@pytest.fixture
def marked_text(tiny_model: Path, model: PreTrainedModel) -> str:
    """Bytes of ASCII alone, so that the tokenizer reads back what was chosen."""
    tokenizer = models.load_tokenizer(str(tiny_model))
    letters: Any = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    watermark = Watermark(KEY, vocab_size=vocab_size(str(tiny_model)))
    generator, ids = torch.Generator().manual_seed(0), [letters[0]]
    while len(ids) < 200:
        weights = torch.softmax(watermark.bias(ids[-1:])[0, letters], -1)
        ids.append(letters[int(torch.multinomial(weights, 1, generator=generator))])
    return str(tokenizer.decode(ids))


def test_the_command_says_what_the_detector_finds(
    tiny_model: Path,
    marked_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_KEY", str(KEY))
    expected = detect_text(marked_text, str(tiny_model), Watermark(KEY, vocab_size=TINY))
    assert expected.verdict == "marked"
    path = tmp_path / "text.txt"
    path.write_text(marked_text)
    command = ["detect", "--model", str(tiny_model), "--key-env", "MY_KEY"]
    assert cli.main([*command, str(path)]) == 0
    assert capsys.readouterr().out == expected.render() + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(marked_text.encode())))
    assert cli.main([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected.to_json() + "\n"
    ids = models.load_tokenizer(str(tiny_model))(marked_text, add_special_tokens=False)["input_ids"]
    path.write_text(json.dumps(ids))
    assert cli.main([*command, "--ids", str(path)]) == 0
    assert capsys.readouterr().out == expected.render() + "\n"
    assert str(KEY) not in shown.out + shown.err


def test_the_command_says_what_is_wrong(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ALPACA_RAY_WATERMARK_KEY", raising=False)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    command = ["detect", "--model", str(tiny_model)]
    assert cli.main([*command, str(tmp_path / "latin")]) == 2
    shown = capsys.readouterr().err
    assert "ALPACA_RAY_WATERMARK_KEY is not set" in shown
    assert "the one that the server marks with" in shown
    monkeypatch.setenv("ALPACA_RAY_WATERMARK_KEY", str(KEY))
    for name, problem in (("latin", "is not UTF-8"), ("missing", "cannot be read: No such file")):
        assert cli.main([*command, str(tmp_path / name)]) == 2
        assert problem in capsys.readouterr().err
    for content in ("some text", '{"ids": [1]}', "[1.0]", "[true]", "7"):
        (tmp_path / "ids").write_text(content)
        assert cli.main([*command, "--ids", str(tmp_path / "ids")]) == 2
        assert "holds no token ids" in capsys.readouterr().err
