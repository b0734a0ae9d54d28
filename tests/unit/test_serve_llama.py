"""Our forward pass against transformers' own, on random weights in float32."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from alpaca_ray.config import Quantization, ServeArgs, UserError
from alpaca_ray.serve.attention import segments
from alpaca_ray.serve.decoder import Chunk, Decoder, ModuleDecoder
from alpaca_ray.serve.engine import SamplingParams, TokenRequest
from alpaca_ray.serve.linear import fuse, has_bfloat16, has_quantization
from alpaca_ray.serve.llama import LlamaDecoder, supports
from alpaca_ray.serve.torch_engine import decoder_for, load_engine

VOCAB, LENGTH = 97, 96
IDS = [int(i) for i in torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(0))]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no groups": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "yarn rope": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def llama(**variant: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config: dict[str, Any] = {"vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    model: Any = LlamaForCausalLM(LlamaConfig(**(shape | config | variant)))
    for name, parameter in model.named_parameters():  # biases and norms begin as zeros and ones, which hide mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.5)
    return model.eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4))
    return model.eval()


def sliding() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "sliding_window": 8}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **shape, **heads)
    model: Any = MistralForCausalLM(config)
    return model.eval()


@torch.inference_mode()
def by_transformers(model: Any, ids: Sequence[int] = IDS) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits


@torch.inference_mode()
def by_chunks(decoder: Decoder, sizes: Sequence[int], slot: int = 0, ids: Sequence[int] = IDS) -> Tensor:
    logits, start = [], 0
    for size in sizes:
        logits.append(decoder.forward([Chunk(slot, start, ids[start : start + size], size)]))
        start += size
    return torch.cat(logits)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_whole_in_chunks_and_token_by_token(variant: str) -> None:
    model = llama(**VARIANTS[variant])
    assert supports(model)
    decoder, expected = LlamaDecoder(model, 3, LENGTH), by_transformers(model)

    assert close(by_chunks(decoder, [LENGTH], slot=0), expected)
    assert close(by_chunks(decoder, [7, 1, 40, 2, LENGTH - 50], slot=1), expected)
    assert close(by_chunks(decoder, [1] * LENGTH, slot=2), expected)


@pytest.mark.parametrize("make", [gpt2, sliding])
def test_other_architectures_decode_as_transformers_does(make: Any) -> None:
    model = make()
    decoder, expected = decoder_for(model, 2, 1000), by_transformers(model)

    assert isinstance(decoder, ModuleDecoder)
    assert decoder.max_length == LENGTH
    assert close(by_chunks(decoder, [LENGTH], slot=0), expected)
    assert close(by_chunks(decoder, [20, 1, 1, 30, LENGTH - 52], slot=1), expected)


def test_what_our_pass_does_not_know_is_left_to_transformers() -> None:
    longrope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
    longrope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    assert not supports(llama(rope_parameters=longrope))
    assert not supports(llama(hidden_act="gelu"))
    assert not supports(gpt2())


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.inference_mode()
def test_rows_in_one_call_do_not_see_each_other(make: Any) -> None:
    model = make()
    decoder, expected = decoder_for(model, 8, LENGTH), by_transformers(model)
    # Neighbours of all lengths, a gap between the slots, chunks of several rows among single tokens.
    done = {0: 30, 1: 31, 2: 95, 4: 0, 5: 1, 6: 40, 7: 64}
    now = {0: 1, 1: 1, 2: 1, 4: 20, 5: 1, 6: 9, 7: 1}
    decoder.forward([Chunk(slot, 0, IDS[:size], 0) for slot, size in done.items() if size])

    logits = decoder.forward([Chunk(slot, done[slot], IDS[done[slot] : done[slot] + n], 1) for slot, n in now.items()])

    assert close(logits, torch.stack([expected[done[slot] + n - 1] for slot, n in now.items()]))


@pytest.mark.parametrize(("width", "num_sharing", "num_key_heads"), [(64, 3, 3), (64, 1, 4), (128, 4, 2), (8, 8, 1)])
def test_attention_of_a_row_has_the_same_bits_among_any_others(
    width: int, num_sharing: int, num_key_heads: int
) -> None:
    generator, rng, num_slots, most = torch.Generator().manual_seed(0), random.Random(0), 16, 512
    keys, values = torch.randn(2, num_slots, num_key_heads, most, width, generator=generator)
    query = torch.randn(num_slots, num_key_heads * num_sharing, width, generator=generator)

    def attended(slots: range, lengths: Sequence[int]) -> Tensor:
        found = segments([Chunk(slot, lengths[slot] - 1, (1,), 1) for slot in slots], query)
        return torch.cat([segment.attend(query[slots.start : slots.stop], keys, values) for segment in found])

    for shortest, longest in [(1, most), (100, 200)] * 10:
        lengths = [rng.randrange(shortest, longest + 1) for _ in range(num_slots)]
        whole = attended(range(num_slots), lengths)
        for slot in range(num_slots):
            some = range(rng.randrange(slot + 1), rng.randrange(slot, num_slots) + 1)
            assert torch.equal(attended(some, lengths)[slot - some.start], whole[slot])
            assert torch.equal(attended(range(slot, slot + 1), lengths)[0], whole[slot])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_come_for_the_tokens_that_want_them(make: Any) -> None:
    model = make()
    decoder, expected = decoder_for(model, 3, LENGTH), by_transformers(model)

    with torch.inference_mode():
        none = decoder.forward([Chunk(0, 0, IDS[:5], 0), Chunk(1, 0, IDS[:6], 0)])
        some = decoder.forward([Chunk(0, 5, IDS[5:9], 0), Chunk(1, 6, IDS[6:9], 1), Chunk(2, 0, IDS[:4], 4)])

    assert none.shape == (0, VOCAB)
    assert close(some, torch.cat([expected[8:9], expected[:4]]))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_call_may_be_repeated(make: Any) -> None:
    model = make()
    decoder, expected = decoder_for(model, 1, LENGTH), by_transformers(model)
    by_chunks(decoder, [10, 10])

    with torch.inference_mode():
        again = decoder.forward([Chunk(0, 10, IDS[10:20], 10)])

    assert close(again, expected[10:20])


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.inference_mode()
def test_a_call_that_failed_halfway_may_be_repeated(make: Any) -> None:
    model = make()
    decoder, expected = ModuleDecoder(model, 1, LENGTH), by_transformers(model)
    by_chunks(decoder, [10])
    last_layer = (model.model.layers if make is llama else model.transformer.h)[-1]
    hook = last_layer.register_forward_pre_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        decoder.forward([Chunk(0, 10, IDS[10:20], 10)])
    hook.remove()

    assert close(decoder.forward([Chunk(0, 10, IDS[10:20], 10)]), expected[10:20])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_nothing_of_a_row_reaches_the_next_one_in_its_slot(make: Any) -> None:
    model = make()
    with torch.inference_mode():
        model.get_input_embeddings().weight[VOCAB - 1] = float("nan")
    ids = [i % (VOCAB - 1) for i in IDS]
    decoder, expected = decoder_for(model, 2, LENGTH), by_transformers(model, ids)
    poisoned = by_chunks(decoder, [90], ids=[VOCAB - 1] * 90)
    assert not poisoned.isfinite().any()

    decoder.release(0)
    by_chunks(decoder, [60], slot=0, ids=ids)
    by_chunks(decoder, [90], slot=1, ids=ids)
    with torch.inference_mode():  # the longer neighbour widens the call to where the poison was
        logits = decoder.forward([Chunk(0, 60, ids[60:61], 1), Chunk(1, 90, ids[90:91], 1)])

    assert close(logits[:, :-1], expected[[60, 90], :-1])  # the last is NaN where the embedding is the head, too


def test_the_cache_is_bounded_and_said() -> None:
    decoder = LlamaDecoder(llama(), num_slots=3, max_length=LENGTH)
    assert decoder.cache_bytes == 2 * 2 * 3 * LENGTH * 2 * 8 * 4  # layers, k and v, slots, tokens, heads, width, bytes


needs_fbgemm = pytest.mark.skipif(not has_quantization(), reason="torch has no FBGEMM on this machine")


@needs_fbgemm
@pytest.mark.parametrize("num_rows", [1, 3, 16, 70])
def test_an_8_bit_layer_is_near_the_layer_and_a_row_is_the_same_alone(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    layers = [torch.nn.Linear(64, width, bias) for width, bias in ((40, True), (24, True))]
    rows = torch.randn(num_rows, 64, generator=generator)
    rows[0, 3] = 30.0  # an outlier makes its own row coarser, and no other
    with torch.inference_mode():
        exact = torch.cat([layer(rows) for layer in layers], dim=-1)
        eights = fuse(layers, "int8")
        found = eights(rows)
        alone = torch.cat([eights(row[None]) for row in rows])
    assert torch.equal(found, alone)
    off = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert off.max() < 0.15
    assert off[1:].numel() == 0 or off[1:].max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_layers_it_was_fused_from_and_a_row_is_the_same_among_any_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(64, 40, dtype=dtype), torch.nn.Linear(64, 24, dtype=dtype)]
    rows = torch.randn(96, 64, generator=generator).to(dtype)
    with torch.inference_mode():
        fused = fuse(layers)
        found = fused(rows)
        expected = torch.cat([layer.float()(rows.float()) for layer in layers], dim=-1)
        assert torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)
        if dtype == torch.bfloat16 and not has_bfloat16():
            return  # torch's own kernel, which promises no such thing
        for num_rows in range(1, 97):
            assert torch.equal(fused(rows[:num_rows]), found[:num_rows]), num_rows


@needs_fbgemm
def test_an_8_bit_layer_overflows_nowhere() -> None:
    layer = torch.nn.Linear(512, 8, bias=False)
    torch.nn.init.ones_(layer.weight)
    with torch.inference_mode():
        found = fuse([layer], "int8")(torch.tensor([[1.0], [-1.0]]).expand(2, 512).contiguous())
    assert torch.allclose(found, torch.tensor([[512.0], [-512.0]]).expand(2, 8))


@needs_fbgemm
def test_an_8_bit_layer_takes_rows_and_weights_of_zeros() -> None:
    layer = torch.nn.Linear(32, 8)
    torch.nn.init.zeros_(layer.weight)
    with torch.inference_mode():
        assert torch.equal(fuse([layer], "int8")(torch.zeros(2, 32)), layer.bias.expand(2, 8))


@needs_fbgemm
def test_a_layer_in_float16_is_the_layer_of_those_weights_and_a_row_is_the_same_among_any_others() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(64, 40), torch.nn.Linear(64, 24)]
    rows = torch.randn(96, 64, generator=generator)
    with torch.inference_mode():
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        halved = fuse(layers, "float16")
        found = halved(rows)
        assert torch.allclose(found, torch.nn.functional.linear(rows, weight.half().float(), bias), atol=1e-6)
        for num_rows in range(1, 97):
            assert torch.equal(halved(rows[:num_rows]), found[:num_rows]), num_rows


@needs_fbgemm
@pytest.mark.parametrize("quantization", ["float16", "int8"])
def test_quantization_is_refused_where_it_would_do_nothing(quantization: Quantization) -> None:
    with pytest.raises(UserError, match=f"quantization: {quantization} is for Llama models, not GPT2LMHeadModel"):
        decoder_for(gpt2(), 1, 8, quantization)
    for wrong in ({"dtype": "bfloat16"}, {"dtype": "float32", "engine": "vllm"}):
        with pytest.raises(ValueError, match=f"quantization: {quantization} is for engine: torch"):
            ServeArgs.model_validate({"model": "m", "quantization": quantization, **wrong})


@needs_fbgemm
def test_the_engine_computes_with_the_weights_that_its_args_say(tiny_model: Path) -> None:
    async def logprob(quantization: str | None) -> float:
        given = {"model": str(tiny_model), "dtype": "float32", "max_length": 16, "quantization": quantization}
        engine = load_engine(ServeArgs.model_validate(given))
        try:
            params = SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=1)
            deltas = [delta async for delta in engine.generate(TokenRequest((5, 6, 7), params))]
        finally:
            engine.close()
        found = deltas[0].logprobs[0].logprob
        assert found is not None
        return found

    exact, halved, eights = (asyncio.run(logprob(quantization)) for quantization in (None, "float16", "int8"))
    assert len({exact, halved, eights}) == 3
    assert halved == pytest.approx(exact, abs=1e-4)
    assert eights == pytest.approx(exact, abs=0.05)
