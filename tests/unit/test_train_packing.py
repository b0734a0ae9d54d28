"""Packing: which rows come out, that documents in a row see nothing of each other, and how little is wasted."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.train import attention, model
from alpaca_ray.train.collate import collate, num_row_tokens
from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded
from alpaca_ray.train.packing import PackedRow, micro_batches, pack, spread

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(2, 64), min_size=1, max_size=40)


def document(name: str, length: int, seed: int = 0) -> Encoded:
    """A prompt of a third, an answer of the rest."""
    rng = random.Random(f"{seed}/{name}")
    ids = [rng.randrange(3, 90) for _ in range(length)]
    prompt = max(1, length // 3)
    return Encoded(name, ids, [IGNORE_INDEX] * prompt + ids[prompt:])


def documents(lengths: list[int]) -> list[Encoded]:
    return [document(f"{i:03d}", length) for i, length in enumerate(lengths)]


def names(rows: list[PackedRow]) -> list[str]:
    return [e.id for row in rows for e in row.documents]


@given(lengths=LENGTHS)
def test_each_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = pack(documents(lengths), 64)
    assert sorted(names(rows)) == [f"{i:03d}" for i in range(len(lengths))]
    assert all(row.num_tokens <= 64 for row in rows)


@given(lengths=LENGTHS, seed=st.integers(0, 9))
def test_the_rows_do_not_depend_on_the_order_of_the_examples(lengths: list[int], seed: int) -> None:
    examples = documents(lengths)
    shuffled = random.Random(seed).sample(examples, len(examples))
    assert pack(shuffled, 64) == pack(examples, 64)
    assert spread(shuffled, 3, 10_000) == spread(examples, 3, 10_000)


@given(lengths=LENGTHS)
def test_best_fit_leaves_no_two_rows_half_empty(lengths: list[int]) -> None:
    """Then two of them would have been one; hence at most twice the rows that the tokens need."""
    rows = pack(documents(lengths), 64)
    assert sum(row.num_tokens <= 32 for row in rows) <= 1


def test_the_fullest_row_with_room_is_taken() -> None:
    rows = pack(documents([40, 50, 12, 20]), 64)
    assert [[len(e.input_ids) for e in row.documents] for row in rows] == [[50, 12], [40, 20]]


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="example 000 has 65 tokens, and a row takes 64"):
        pack(documents([65]), 64)


@given(lengths=LENGTHS, micro=st.integers(1, 5), world_size=st.integers(1, 9), packing=st.booleans())
def test_ranks_share_a_batch_and_keep_in_step(lengths: list[int], micro: int, world_size: int, packing: bool) -> None:
    config = TrainConfig(base_model="x", max_length=64, micro_batch_size=micro, packing=packing)
    shares = micro_batches(documents(lengths), config, world_size)

    assert len(shares) == world_size
    assert len({len(share) for share in shares}) == 1
    assert sorted(names([row for share in shares for rows in share for row in rows])) == [
        f"{i:03d}" for i in range(len(lengths))
    ]
    assert all(len(rows) <= micro for share in shares for rows in share)
    assert all(row.num_tokens <= 64 for share in shares for rows in share for row in rows)


def alpaca_like(num: int, seed: int) -> list[Encoded]:
    """Prompts of 40 to 110 tokens, answers log-normal with a mean of 65, 512 at most together."""
    rng = random.Random(seed)
    lengths = [rng.randint(40, 110) + max(1, round(rng.lognormvariate(3.77, 0.9))) for _ in range(num)]
    return documents([min(512, length) for length in lengths])


@pytest.mark.parametrize("world_size", [1, 4, 8])
@pytest.mark.parametrize("micro", [1, 4])
def test_of_alpacas_lengths_95_percent_of_what_is_computed_is_useful(world_size: int, micro: int) -> None:
    config = TrainConfig(base_model="x", micro_batch_size=micro)
    for step in range(5):
        batch = alpaca_like(128, step)
        shares = micro_batches(batch, config, world_size)
        useful = sum(len(e.input_ids) for e in batch)
        computed = sum(num_row_tokens(rows, packing=True) for share in shares for rows in share)
        loads = [sum(row.num_tokens for rows in share for row in rows) for share in shares]
        assert useful >= 0.95 * computed
        assert useful >= 0.95 * world_size * max(loads)  # nor does a rank wait long for the others
        rows = pack(batch, 512)
        assert useful >= 0.95 * 512 * len(rows)  # if rows were padded, as where they are memory that is set aside


SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def build(dtype: torch.dtype = torch.float32, targets_at_once: int = 1024) -> PreTrainedModel:
    torch.manual_seed(0)
    plain: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    attention.install(plain)
    return model.give_loss(plain, targets_at_once)


@pytest.fixture(scope="module")
def rows() -> list[PackedRow]:
    return [PackedRow(tuple(documents([9, 17, 5, 30]))), PackedRow((document("b", 40),))]


def logits(plain: PreTrainedModel, rows: list[PackedRow]) -> list[Tensor]:
    """Of each document, (T, V)."""
    arguments = collate(rows, True, CPU)
    lengths = arguments["cu_seq_lens_q"].diff().tolist()
    del arguments["places"], arguments["targets"]
    with torch.no_grad():
        return list(plain(**arguments).logits[0].split(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [0, 1, 3, 4])
def test_another_document_changes_no_bit(rows: list[PackedRow], dtype: torch.dtype, changed: int) -> None:
    plain = build(dtype)
    all_documents = [e for row in rows for e in row.documents]
    other = document("other", len(all_documents[changed].input_ids), seed=1)
    perturbed = [PackedRow(tuple(other if i == changed else e for i, e in enumerate(all_documents)))]

    before, after = logits(plain, rows), logits(plain, perturbed)
    same = [torch.equal(b, a) for b, a in zip(before, after, strict=True)]
    assert same == [i != changed for i in range(len(all_documents))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 0.0)])
def test_a_document_in_a_row_has_the_losses_that_it_has_alone(
    rows: list[PackedRow], dtype: torch.dtype, tolerance: float
) -> None:
    plain = build(dtype)
    packed = logits(plain, rows)
    for e, ours in zip([e for row in rows for e in row.documents], packed, strict=True):
        with torch.no_grad():
            alone = plain(torch.tensor([e.input_ids])).logits[0]
        targets = torch.tensor(e.labels[1:])
        losses = [torch.nn.functional.cross_entropy(x[:-1], targets, reduction="none") for x in (ours, alone)]
        torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("at_once", [1024, 7, 1])
@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradient_are_those_of_transformers(rows: list[PackedRow], packing: bool, at_once: int) -> None:
    """However many logits are made at a time, and packed or padded."""
    plain, reference = build(torch.float64, at_once), build(torch.float64)
    loss = plain(**collate(rows, packing, CPU))
    loss.backward()

    expected = torch.zeros((), dtype=torch.float64)
    for e in [e for row in rows for e in row.documents]:
        part = reference(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss * e.num_targets
        part.backward()
        expected += part.detach()

    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)  # transformers' own loss is in fp32
    for ours, theirs in zip(plain.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_logits_are_never_whole(rows: list[PackedRow]) -> None:
    plain, seen = build(targets_at_once=8), list[tuple[int, ...]]()
    head = plain.get_submodule("lm_head")
    head.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape)))
    plain(**collate(rows, True, CPU)).backward()

    num_targets = sum(e.num_targets for row in rows for e in row.documents)
    assert max(seen) == (8, 96)
    assert sum(n for n, _ in seen) == 2 * num_targets  # once more in the backward pass


def test_nothing_to_learn_is_a_loss_of_nothing() -> None:
    plain = build()
    loss = plain(**collate([], True, CPU))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in plain.parameters())


def test_the_folded_attention_of_bf16_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 13, 8, generator=generator) for heads in (6, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention._folded(q, k, v, None), expected)


@pytest.mark.parametrize("extra", [{"sliding_window": 8}, {"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
def test_attention_of_another_kind_is_refused(extra: dict[str, Any]) -> None:
    states = [torch.zeros(1, 4, 12, 8)] * 3
    boundaries = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(UserError, match=r"train\.packing .*" + next(iter(extra))):
        attention.attend(torch.nn.Module(), *states, None, cu_seq_lens_q=boundaries, max_length_q=12, **extra)


def test_rows_without_boundaries_are_masked_as_ever(rows: list[PackedRow]) -> None:
    """A caller who only restarts the position ids, as transformers documents it, leaks nothing either."""
    plain = build()
    arguments = collate(rows, True, CPU)
    with torch.no_grad():
        masked = plain(arguments["input_ids"], position_ids=arguments["position_ids"]).logits[0]
    torch.testing.assert_close(masked, torch.cat(logits(plain, rows)), rtol=1e-5, atol=1e-6)


def test_a_model_that_scales_its_logits_makes_them_itself(rows: list[PackedRow]) -> None:
    plain = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=0.01))
    attention.install(plain)
    e = rows[0].documents[3]
    expected = plain(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss * e.num_targets
    ours = model.give_loss(plain)(**collate([PackedRow((e,))], True, CPU))
    torch.testing.assert_close(ours, expected)
