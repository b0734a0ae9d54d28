"""Fine-tuning in plain torch, one process, one example at a time, no padding: what the sharded loop must agree with."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from alpaca_ray.config import TrainConfig
from alpaca_ray.train.encoding import Encoded
from alpaca_ray.train.order import batch_ids, steps_per_epoch


def adamw(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Alpaca's; all parameters decay."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def fine_tune(
    directory: Path,
    examples: Sequence[Encoded],
    config: TrainConfig,
    make_optimizer: Callable[[Iterable[torch.nn.Parameter], TrainConfig], torch.optim.Optimizer] = adamw,
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step. fp32; without warm-up."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").train()
    optimizer = make_optimizer(model.parameters(), config)
    num_steps = config.num_epochs * steps_per_epoch(len(examples), config.global_batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, num_steps)
    rows = []
    for step in range(num_steps):
        batch = [examples[i] for i in batch_ids(len(examples), config.global_batch_size, config.seed, step)]
        num_targets = sum(label >= 0 for row in batch for label in row.labels)
        losses = [sum_of_losses(model, row) / num_targets for row in batch]
        torch.autograd.backward(losses)
        norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, config.max_grad_norm / float(norm))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rows.append((sum(float(loss.detach()) for loss in losses), float(norm)))
    return rows


def sum_of_losses(model: PreTrainedModel, row: Encoded) -> torch.Tensor:
    log_probs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)  # (T, V)
    places = [t for t, label in enumerate(row.labels) if label >= 0]
    summed: torch.Tensor = -log_probs[[t - 1 for t in places], [row.labels[t] for t in places]].sum()
    return summed
