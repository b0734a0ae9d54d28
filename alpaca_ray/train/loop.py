"""The training loop: encoded examples in, one row of metrics a step out; torch only, and the same on any world size."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.train.collate import collate, num_row_tokens
from alpaca_ray.train.encoding import Encoded
from alpaca_ray.train.order import batch_ids, steps_per_epoch
from alpaca_ray.train.packing import MicroBatch, micro_batches
from alpaca_ray.train.strategy import Strategy


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
    row_tokens: int = 0  # all that were computed, padding included

    @property
    def useful_share(self) -> float:
        """Tokens of examples among those that were computed."""
        return self.tokens_per_s * self.step_time_s / self.row_tokens


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
    shares = micro_batches(batch, config, dist.get_world_size())
    loss = backward(state, shares, config)
    grad_norm = state.update(
        rate, config.max_grad_norm, lambda norm: refuse_not_finite(loss, norm, state.step + 1, batch)
    )
    took_s = time.perf_counter() - started_s
    num_targets = sum(example.num_targets for example in batch)
    num_tokens = sum(len(example.input_ids) for example in batch)
    row_tokens = sum(num_row_tokens(rows, config.packing) for share in shares for rows in share)
    return StepMetrics(state.step, loss, rate, grad_norm, num_targets, num_tokens / took_s, took_s, row_tokens)


def backward(state: Strategy, shares: Sequence[Sequence[MicroBatch]], config: TrainConfig) -> float:
    """Add up the gradients of a global batch, which all ranks share, and return its loss.

    "global": the mean over its target tokens. "micro_batch": the mean of the micro-batches' means, as Alpaca had it,
    which weighs a token by the company it is in.
    """
    device, rank = state.device, dist.get_rank()
    local_sum = torch.zeros((), dtype=torch.float64, device=device)
    mine = list(zip(shares[rank], divisors(shares, config.loss_normalization)[rank], strict=True))
    for i, (rows, divisor) in enumerate(mine):
        loss = state.model(**collate(rows, config.packing, device)) / divisor
        state.backward(loss, last=i == len(mine) - 1)
        local_sum += loss.detach()
    dist.all_reduce(local_sum)
    return float(local_sum)


def divisors(shares: Sequence[Sequence[MicroBatch]], normalization: str) -> list[list[int]]:
    """What the summed loss of each micro-batch is divided by; see backward."""
    counts = [[sum(e.num_targets for row in rows for e in row.documents) for rows in share] for share in shares]
    if normalization == "global":
        num_targets = sum(sum(share) for share in counts)
        return [[num_targets] * len(share) for share in counts]
    num_means = sum(count > 0 for share in counts for count in share)
    return [[max(1, count) * num_means for count in share] for share in counts]


def refuse_not_finite(loss: float, grad_norm: float, step: int, batch: Sequence[Encoded]) -> None:
    """Raises NotFinite with the step and the ids of the examples in it."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise NotFinite(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; examples {', '.join(e.id for e in batch)}. "
        "Lower train.learning_rate, set train.compute_dtype to float32, or look at these examples"
    )
