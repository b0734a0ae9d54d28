"""transformers' Trainer, one process: a step at a time, so that it can take turns with our loop.

It is set to do nothing but train: no saving, no evaluation, nothing reported; AdamW as it comes.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded

PADDING_ID = 0


class HfTrainer:
    """The model, and an optimizer that outlives each call of `Trainer.train`."""

    def __init__(self, model: Path, num_threads: int, dtype: str, learning_rate: float, max_length: int) -> None:
        torch.set_num_threads(num_threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        self.dtype, self.learning_rate, self.max_length = dtype, learning_rate, max_length
        self.optimizer: torch.optim.Optimizer | None = None
        self.directory = tempfile.mkdtemp()

    def step(self, examples: list[Encoded], micro_batch_size: int, padded_to_longest: bool) -> dict[str, float]:
        """One optimizer step on the examples, in their order. Times from the first batch to the weights' change."""
        trainer = Trainer(
            self.model,
            self.arguments(micro_batch_size, len(examples) // micro_batch_size),
            data_collator=lambda rows: collate(rows, None if padded_to_longest else self.max_length),
            train_dataset=[{"input_ids": e.input_ids, "labels": e.labels} for e in examples],
            optimizers=(self.optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(times := Times())
        if self.optimizer is None:
            self.optimizer = trainer.create_optimizer()
        loss = trainer.train().training_loss
        return {"loss": loss, "grad_norm": trainer.state.log_history[0]["grad_norm"]} | times.taken

    def arguments(self, micro_batch_size: int, accumulation: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=self.directory,
            use_cpu=True,
            bf16=self.dtype == "bfloat16",
            max_steps=1,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",  # the examples come as the sampler under test arranged them
            logging_steps=1,  # for the gradient norm; printed nowhere
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )


class Times(TrainerCallback):
    """Wall and CPU seconds of the one step."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started_s = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wall_s, cpu_s = self.started_s
        self.taken = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}


def collate(rows: list[dict[str, list[int]]], length: int | None) -> dict[str, torch.Tensor]:
    """(B, T), padded on the right to the longest row, or to `length`."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    missing = 0 if length is None else length - max(len(row) for row in ids)
    padded = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PADDING_ID),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    fill = {"input_ids": PADDING_ID, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {name: torch.nn.functional.pad(part, (0, missing), value=fill[name]) for name, part in padded.items()}
