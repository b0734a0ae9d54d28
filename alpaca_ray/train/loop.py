"""The training loop: encoded examples in, one row of metrics a step out; torch only, and the same on any world size.

B: rows of a micro-batch, T: tokens of its longest row, V: vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded
from alpaca_ray.train.order import batch_ids, steps_per_epoch
from alpaca_ray.train.strategy import Strategy

PADDING_ID = 0  # any id will do: attention mask and labels hide it
# The part of a rank that has no example left: it must still take part in every collective of forward and backward.
NO_EXAMPLE = Encoded("", [PADDING_ID, PADDING_ID], [IGNORE_INDEX, IGNORE_INDEX])


class NotFinite(UserError):
    """A loss or gradient norm that is NaN or infinite; the model is left as it was before that step."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over the global batch."""

    step: int  # steps done, so the first is 1
    loss: float  # nats per target token
    learning_rate: float
    grad_norm: float  # before clipping
    target_tokens: int
    tokens_per_s: float  # prompts included, padding not
    step_time_s: float


def total_steps(num_examples: int, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.num_epochs * steps_per_epoch(num_examples, config.global_batch_size)


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to 0; `step` counts from 0.

    Transformers' schedule one step ahead: there the first step has rate 0 and does nothing.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    state: Strategy,
    examples: Sequence[Encoded],
    config: TrainConfig,
    on_step: Callable[[StepMetrics], None],
    on_checkpoint: Callable[[], None],
) -> None:
    """Train a sharded model from `state.step` to the end; every rank must call it.

    `on_checkpoint` comes every `checkpoint_every_steps` and after the last step. Raises NotFinite, on all ranks at
    the same step.
    """
    num_steps = total_steps(len(examples), config)
    state.model.train()
    while state.step < num_steps:
        ids = batch_ids(len(examples), config.global_batch_size, config.seed, state.step)
        on_step(train_step(state, [examples[i] for i in ids], num_steps, config))
        if state.step % config.checkpoint_every_steps == 0 or state.step == num_steps:
            on_checkpoint()


def train_step(state: Strategy, batch: Sequence[Encoded], num_steps: int, config: TrainConfig) -> StepMetrics:
    """One optimizer step on a global batch."""
    started_s = time.perf_counter()
    # Dropout, where a model has it, is a function of step and rank: a resumed run draws the same.
    torch.manual_seed(config.seed + state.step * dist.get_world_size() + dist.get_rank())
    rate = learning_rate(state.step, num_steps, config)
    loss = backward(state, batch, config.micro_batch_size)
    grad_norm = state.update(
        rate, config.max_grad_norm, lambda norm: refuse_not_finite(loss, norm, state.step + 1, batch)
    )
    took_s = time.perf_counter() - started_s
    num_targets = sum(example.num_targets for example in batch)
    num_tokens = sum(len(example.input_ids) for example in batch)
    return StepMetrics(state.step, loss, rate, grad_norm, num_targets, num_tokens / took_s, took_s)


def backward(state: Strategy, batch: Sequence[Encoded], micro_batch_size: int) -> float:
    """Add up the gradients of a global batch and return its loss, both means over all its target tokens.

    A mean per micro-batch would weigh a token by the company it is in.
    """
    num_targets = sum(e.num_targets for e in batch)
    device = next(state.model.parameters()).device
    local_sum = torch.zeros((), dtype=torch.float64, device=device)
    parts = micro_batches(batch, micro_batch_size, dist.get_rank(), dist.get_world_size())
    for i, rows in enumerate(parts):
        part = loss_sum(state.model, *collate(rows, device))
        state.backward(part / num_targets, last=i == len(parts) - 1)
        local_sum += part.detach()
    dist.all_reduce(local_sum)
    return float(local_sum) / num_targets


def micro_batches(
    batch: Sequence[Encoded], micro_batch_size: int, rank: int, world_size: int
) -> list[Sequence[Encoded]]:
    """The rank's share of a global batch. All ranks get the same number of micro-batches, the last ones perhaps empty:
    each forward and backward of FSDP is a collective, and a rank that left one out would hang the others.
    """
    mine = batch[rank::world_size]
    longest_share = math.ceil(len(batch) / world_size)
    return [mine[i : i + micro_batch_size] for i in range(0, longest_share, micro_batch_size)]


def collate(rows: Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels, each (B, T), padded on the right to the longest row."""
    rows = rows or [NO_EXAMPLE]
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.full(shape, PADDING_ID)
    labels = torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        attention_mask[i, :length] = 1
    return input_ids.to(device), attention_mask.to(device), labels.to(device)


def loss_sum(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in fp32, summed over the targets of a micro-batch; 0 where it has none."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def refuse_not_finite(loss: float, grad_norm: float, step: int, batch: Sequence[Encoded]) -> None:
    """Raises NotFinite with the step and the ids of the examples in it."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise NotFinite(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; examples {', '.join(e.id for e in batch)}. "
        "Lower train.learning_rate, set train.compute_dtype to float32, or look at these examples"
    )
