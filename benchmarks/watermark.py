"""The watermark on the embedded model: how often it is found, how often wrongly, what it costs in text and in time.

python benchmarks/watermark.py [--quick]

True positives: completions of the package's evaluation instructions, their end-of-sequence token barred so that all
reach 200 tokens; a text counts as found where p <= 1e-3. False positives: windows of Python's own reference manual
under many keys. One key's rate differs from the nominal one, since all texts share their commonest pairs of tokens;
the spread over keys is shown. Times are of the CPU, on one thread, for 16 rows.
"""

import argparse
import importlib.metadata
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import WatermarkLogitsProcessor

from alpaca_ray import models
from alpaca_ray.safety.detection import z_score
from alpaca_ray.safety.watermark import Watermark
from alpaca_ray.schema import read_evaluation_tasks

LENGTHS = (25, 50, 100, 200)
TEMPERATURES = (0.0, 0.7, 1.0)
DELTAS = (0.0, 1.0, 2.0, 4.0)
GAMMA = 0.25
LEVEL = 1e-3
# At temperature 1: those published for OPT-1.3B, at 150 tokens in place of 200 (Kirchenbauer et al. 2024, simple_1).
GOALS = {50: 0.765, 100: 0.93, 200: 0.965}
WINDOW, NUM_WINDOWS = 100, 20_000
NUM_ROWS = 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    """N completions of 200 tokens each, and what the unmarked model says of them."""

    completions: list[list[int]]
    steps: list[list[int]]  # the previous tokens of all N, step by step
    entropy_nats: float  # mean over tokens, of the distribution that was sampled from before the mark
    perplexity: float  # of the completions under the unmarked model at temperature 1
    watermark: Watermark | None

    def share_found(self, length: int, read: Callable[[list[int]], list[int]]) -> float:
        assert self.watermark is not None
        found = [self.watermark.detect(read(ids[:length])).p_value <= LEVEL for ids in self.completions]
        return statistics.mean(found)

    def verdicts(self, length: int) -> dict[str, int]:
        assert self.watermark is not None
        said = [self.watermark.detect(ids[:length]).verdict for ids in self.completions]
        return {verdict: said.count(verdict) for verdict in sorted(set(said))}


class Writer:
    """The embedded model over one batch of prompts, left-padded. N prompts, T tokens so far, V vocabulary."""

    def __init__(self, num_texts: int) -> None:
        reference = models.EMBEDDED
        self.tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(reference)
        self.model: PreTrainedModel = models.load_model(reference, "float32")
        self.vocab_size = int(self.model.config.vocab_size)
        tasks = [task for task in read_evaluation_tasks(None) if len(task.instruction) < 300]
        self._prompts = [self._prompt(tasks[i % len(tasks)].instruction) for i in range(num_texts)]

    def read(self, ids: list[int]) -> list[int]:
        """Through text and back, as a detector gets it."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        read: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return read

    def _prompt(self, instruction: str) -> list[int]:
        messages = [{"role": "user", "content": instruction}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def write(self, temperature: float, delta: float, seed: int) -> Texts:
        """A fresh key for each call."""
        key = random.Random(seed).getrandbits(62)
        watermark = Watermark(key, GAMMA, delta, vocab_size=self.vocab_size) if delta > 0 else None
        generator = torch.Generator().manual_seed(seed)
        longest = max(map(len, self._prompts))
        pad = [longest - len(prompt) for prompt in self._prompts]
        ids = torch.tensor([[0] * n + prompt for n, prompt in zip(pad, self._prompts, strict=True)])  # (N, T)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])  # (N, T)
        cache, positions = DynamicCache(), (mask.cumsum(1) - 1).clamp(min=0)
        fed, steps, entropies, losses = ids, [], [], []
        for _ in range(LENGTHS[-1]):
            output = self.model(fed, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                use_cache=True, logits_to_keep=1)  # fmt: skip
            logits = output.logits[:, -1]  # (N, V)
            logits[:, self.tokenizer.eos_token_id] = -math.inf
            steps.append(ids[:, -1].tolist())
            chosen, entropy = choose(logits, temperature, watermark, steps[-1], generator)
            entropies.append(entropy)
            losses.append(-torch.log_softmax(logits, -1).gather(1, chosen).mean().item())
            fed, positions = chosen, positions[:, -1:] + 1
            ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        perplexity = math.exp(statistics.mean(losses))
        return Texts(ids[:, longest:].tolist(), steps, statistics.mean(entropies), perplexity, watermark)


def choose(logits: torch.Tensor, temperature: float, watermark: Watermark | None, previous: list[int],
           generator: torch.Generator) -> tuple[torch.Tensor, float]:  # fmt: skip
    """Tokens (N, 1), and the mean entropy in nats of the unmarked distributions; greedy: of those at temperature 1."""
    log_p = torch.log_softmax(logits / (temperature or 1.0), -1).clamp(min=-100)  # -inf * 0 would be NaN
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    marked = logits + watermark.bias(previous) if watermark else logits
    if temperature == 0:
        return marked.argmax(-1, keepdim=True), entropy
    return torch.multinomial(torch.softmax(marked / temperature, -1), 1, generator=generator), entropy


def found(writer: Writer, texts: dict[float, Texts]) -> Iterator[Row]:
    """How often marked texts are found, by temperature and length."""
    for temperature, written in texts.items():
        for length in LENGTHS:
            share = written.share_found(length, list)
            target = GOALS.get(length) if temperature == 1.0 else None
            goal = (f">= {target}, as published", share >= target) if target else None
            yield row(f"found_t{temperature:g}_len{length}", share, None, "of marked texts at p <= 1e-3", goal,
                      texts=len(written.completions), entropy_nats=round(written.entropy_nats, 2),
                      found_from_text=round(written.share_found(length, writer.read), 3),
                      verdicts=written.verdicts(length))  # fmt: skip


def text_cost(texts: dict[float, Texts]) -> Iterator[Row]:
    """What delta does to the text, at temperature 1."""
    plain = texts[0.0].perplexity
    for delta, written in texts.items():
        peer = ("the same model, unmarked", plain)
        yield row(
            f"perplexity_delta{delta:g}", written.perplexity, peer, "under the unmarked model, temperature 1", None
        )


def false_positives(writer: Writer) -> Iterator[Row]:
    """Ours beside transformers' detector as it comes: repeated pairs counted, p-value of the normal distribution."""
    text = "\n".join(topics.values())
    ids: list[int] = writer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, WINDOW)]
    rng, num_keys = random.Random(0), -(-NUM_WINDOWS // len(windows))
    ours: list[list[float]] = []
    theirs: list[float] = []
    for _ in range(num_keys):
        watermark = Watermark(rng.getrandbits(62), GAMMA, vocab_size=writer.vocab_size)
        ours.append([watermark.detect(window).p_value for window in windows])
        theirs += [_normal_p_value(watermark, window) for window in windows]
    for level in (1e-2, 1e-3):
        by_key = [share_at_most(p_values, level) for p_values in ours]
        rate = statistics.mean(by_key)
        peer = ("transformers' formula, repeats counted", share_at_most(theirs, level))
        yield row(f"false_positives_{level:g}", rate, peer, "of unmarked windows", (f"<= {level:g}", rate <= level),
                  windows=num_keys * len(windows), keys=num_keys, lowest_key=round(min(by_key), 5),
                  highest_key=round(max(by_key), 5))  # fmt: skip


def _normal_p_value(watermark: Watermark, window: list[int]) -> float:
    pairs = list(pairwise(window))
    return 0.5 * math.erfc(z_score(watermark.num_green(pairs), len(pairs), GAMMA) / math.sqrt(2))


def share_at_most(p_values: Sequence[float], level: float) -> float:
    return sum(p <= level for p in p_values) / len(p_values)


def step_cost(vocab_size: int, steps: list[list[int]]) -> Iterator[Row]:
    """A step of 16 rows: lists of tokens seen before, of new ones, and those of real texts from an empty cache."""
    rng, logits = random.Random(0), torch.randn(NUM_ROWS, vocab_size)
    key = rng.getrandbits(62)
    watermark = Watermark(key, vocab_size=vocab_size)
    processor: Any = WatermarkLogitsProcessor(vocab_size, "cpu", hashing_key=key)

    def mark(by: Watermark, previous: list[int]) -> torch.Tensor:
        return logits + by.bias(previous)

    fresh = iter(rng.sample(range(vocab_size), 40 * NUM_ROWS))
    seen = [next(fresh) for _ in range(NUM_ROWS)]
    watermark.bias(seen)
    cached_ms, uncached_ms, peer_ms = [], [], []
    for _ in range(30):  # A B A B
        new = [next(fresh) for _ in range(NUM_ROWS)]
        cached_ms.append(cpu_ms(partial(mark, watermark, seen)))
        peer_ms.append(cpu_ms(partial(processor, torch.tensor(new)[:, None], logits)))
        uncached_ms.append(cpu_ms(partial(mark, watermark, new)))
    peer = ("transformers' WatermarkLogitsProcessor", statistics.median(peer_ms))
    cached = statistics.median(cached_ms)
    # 3 % of a step at 480 tokens/s over 16 streams
    yield row("step_cached", cached, peer, "ms of CPU", ("<= 1", cached <= 1))
    yield row("step_uncached", statistics.median(uncached_ms), peer, "ms of CPU", None)
    cold = Watermark(key, vocab_size=vocab_size)
    from_cold_ms = [cpu_ms(partial(mark, cold, step[:NUM_ROWS])) for step in steps]
    yield row("step_from_cold", statistics.mean(from_cold_ms), peer, f"ms of CPU, mean of {len(steps)} steps", None,
              last_50_steps=round(statistics.mean(from_cold_ms[-50:]), 3))  # fmt: skip


def cpu_ms(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return 1000 * (time.process_time() - started_s)


def row(name: str, ours: float, peer: tuple[str, float] | None, unit: str, goal: tuple[str, bool] | None,
        **more: object) -> Row:  # fmt: skip
    """A row of the result, shown at once; `peer` is a name and a value, `goal` what should be and whether it is."""
    made: Row = {"name": name, "ours": round(ours, 5)}
    if peer:
        made |= {"peer": round(peer[1], 5), "peer_name": peer[0], "ratio": round(peer[1] / ours, 2) if ours else None}
    made |= {"unit": unit, "goal": goal[0] if goal else "none, for comparison", "holds": not goal or bool(goal[1])}
    made |= more
    print(json.dumps(made), file=sys.stderr, flush=True)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="16 texts a cell in place of 64")
    writer = Writer(num_texts=NUM_ROWS if parser.parse_args().quick else 4 * NUM_ROWS)
    by_temperature = {t: writer.write(t, 2.0, seed) for seed, t in enumerate(TEMPERATURES)}
    by_delta = {d: by_temperature[1.0] if d == 2.0 else writer.write(1.0, d, seed=10) for d in DELTAS}
    torch.set_num_threads(1)  # what follows is short work, which a second thread only delays
    rows = [*found(writer, by_temperature), *text_cost(by_delta), *false_positives(writer),
            *step_cost(writer.vocab_size, by_temperature[1.0].steps)]  # fmt: skip
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")}
    print(json.dumps({"benchmark": "watermark", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
