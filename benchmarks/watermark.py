"""The watermark on the embedded model: how often it is found, how often wrongly, what it costs in text and in time.

python benchmarks/watermark.py [--quick]

True positives: the engine's answers to the package's instructions, their end-of-sequence token barred so that all reach
200 tokens; a text counts as found where p <= 1e-3. False positives: disjoint windows of 50 to 200 tokens of the
docstrings of Python and of the installed packages, a paragraph that stands in several of them taken once. All windows
are judged by each of several keys, since under one key the windows err together: they share their commonest pairs of
tokens, whatever their distance. The mean over keys is the rate, its spread over keys is shown. Times are of the CPU,
on one thread, for 16 rows.
"""

import argparse
import asyncio
import importlib.metadata
import json
import math
import os
import random
import re
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.generation.logits_process import WatermarkLogitsProcessor

from alpaca_ray import models
from alpaca_ray.safety.detection import Detection, detection, z_score
from alpaca_ray.safety.watermark import Watermark
from alpaca_ray.schema import read_evaluation_tasks, read_seed_tasks
from alpaca_ray.serve.decoder import Chunk, Decoder
from alpaca_ray.serve.engine import SamplingParams, TokenRequest
from alpaca_ray.serve.torch_engine import TorchEngine, decoder_for, end_token_ids

LENGTHS = (50, 100, 150, 200)
TEMPERATURES = (0.0, 0.7, 1.0)
DELTAS = (0.0, 1.0, 2.0, 4.0)
GAMMA, DELTA = 0.25, 2.0
LEVEL = 1e-3
PUBLISHED = {50: 0.765, 100: 0.93, 150: 0.965}  # of OPT-1.3B at temperature 1 (Kirchenbauer et al. 2024, simple_1)
NUM_WINDOWS, MIN_CHARACTERS = 20_000, 600  # a docstring shorter than that gives no window of 200 tokens
NUM_SLOTS, MAX_LENGTH = 48, 384
NUM_ROWS = 16  # of a step that is timed
BARRED = -1e9  # what a logit is where -inf would make an entropy NaN
Row = dict[str, Any]
Window = list[int]


@dataclass
class Cell:
    """Texts of one temperature and one delta: 200 tokens each, and what the unmarked model says of them."""

    temperature: float
    watermark: Watermark | None
    prompts: list[tuple[int, ...]]
    completions: list[list[int]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)  # in nats, of the unmarked model at temperature 1
    entropies: list[list[float]] = field(default_factory=list)  # in nats, unmarked; a greedy text's at temperature 1

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.mean(statistics.mean(losses) for losses in self.losses))

    def steps(self) -> list[list[int]]:
        """The previous tokens of all its rows, step by step."""
        whole = [[prompt[-1], *ids] for prompt, ids in zip(self.prompts, self.completions, strict=True)]
        return [[ids[k] for ids in whole] for k in range(LENGTHS[-1])]

    def detections(self, length: int, read: Callable[[list[int]], list[int]] = list) -> list[Detection]:
        assert self.watermark is not None
        return [self.watermark.detect(read(ids[:length])) for ids in self.completions]

    def mean_entropies(self, length: int) -> list[float]:
        return [statistics.mean(entropies[:length]) for entropies in self.entropies]


def strong_key(rng: random.Random) -> int:
    """A key that is refused for no weakness: its low half is odd and far from 0."""
    return rng.getrandbits(30) << 32 | 2**31 | rng.getrandbits(30) | 1


class Endless:
    """A Decoder that never ends a text, and notes how much choice the model had at each of its tokens.

    `entropies`: in nats, by all tokens that the model had read, from the first; `temperature` is that of the texts.
    """

    def __init__(self, decoder: Decoder, barred: Sequence[int]) -> None:
        self.num_slots, self.max_length, self.vocab_size = decoder.num_slots, decoder.max_length, decoder.vocab_size
        self.device, self._decoder, self._barred = decoder.device, decoder, list(barred)
        self._read: list[list[int]] = [[] for _ in range(decoder.num_slots)]
        self._by_place: list[dict[int, float]] = [{} for _ in range(decoder.num_slots)]
        self.temperature = 1.0
        self.entropies: dict[tuple[int, ...], list[float]] = {}

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """See `Decoder`."""
        logits = self._decoder.forward(chunks)  # (N, V)
        logits[:, self._barred] = BARRED
        log_p = torch.log_softmax(logits / self.temperature, -1)
        entropies = iter((-(log_p.exp() * log_p).sum(-1)).tolist())
        for chunk in chunks:
            self._read[chunk.slot][chunk.start :] = chunk.token_ids
            if chunk.num_logits:
                self._by_place[chunk.slot][chunk.start + len(chunk.token_ids)] = next(entropies)
        return logits

    def release(self, slot: int) -> None:
        """See `Decoder`."""
        self.entropies[tuple(self._read[slot])] = [entropy for _, entropy in sorted(self._by_place[slot].items())]
        self._by_place[slot] = {}
        self._decoder.release(slot)


class Writer:
    """The embedded model in the engine that serves it."""

    def __init__(self) -> None:
        self._num_threads = torch.get_num_threads()
        model = models.load_model(models.EMBEDDED, "float32")
        self.tokenizer: Any = models.load_tokenizer(models.EMBEDDED)
        self.decoder = Endless(decoder_for(model, NUM_SLOTS, MAX_LENGTH), [*end_token_ids(model)])
        self.vocab_size = self.decoder.vocab_size
        texts = [task.instruction for task in read_evaluation_tasks(None)]
        texts += [task.instruction for task in read_seed_tasks(None)]
        self._prompts = [self._prompt(text) for text in texts if len(text) < 150]

    def cell(self, temperature: float, delta: float, num_texts: int) -> Cell:
        key = strong_key(random.Random(f"{temperature} {delta}"))
        watermark = Watermark(key, GAMMA, delta, vocab_size=self.vocab_size) if delta > 0 else None
        cell = Cell(temperature, watermark, self._prompts[:num_texts])
        assert len(cell.prompts) == num_texts
        return cell

    def read(self, ids: list[int]) -> list[int]:
        """Through text and back, as a detector gets it."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        read: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return read

    def write(self, cell: Cell) -> None:
        """Fill the cell."""
        marks = cell.watermark.bias if cell.watermark else None
        self.decoder.temperature = cell.temperature or 1.0
        engine = TorchEngine(self.decoder, marks=marks, num_threads=self._num_threads)
        asyncio.run(self._fill(engine, cell))
        engine.close()
        texts = zip(cell.prompts, cell.completions, strict=True)
        cell.entropies = [self.decoder.entropies.pop((*prompt, *ids[:-1])) for prompt, ids in texts]
        assert all(len(entropies) == LENGTHS[-1] for entropies in cell.entropies)

    async def _fill(self, engine: TorchEngine, cell: Cell) -> None:
        async def answer(seed: int, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
            params = SamplingParams(LENGTHS[-1], cell.temperature, seed=seed, num_logprobs=0)
            deltas = [delta async for delta in engine.generate(TokenRequest(prompt, params))]
            told = [logprob for delta in deltas for logprob in delta.logprobs]
            return [one.token_id for one in told], [-one.logprob for one in told if one.logprob is not None]

        answers = await asyncio.gather(*(answer(seed, prompt) for seed, prompt in enumerate(cell.prompts)))
        cell.completions, cell.losses = [ids for ids, _ in answers], [losses for _, losses in answers]
        assert all(len(ids) == LENGTHS[-1] for ids in cell.completions)

    def _prompt(self, instruction: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": instruction}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def found(writer: Writer, cell: Cell) -> Iterator[Row]:
    """How often marked texts are found, by length, what the verdicts are, and how sure the model was where missed."""
    for length in LENGTHS:
        ours, entropies = cell.detections(length), cell.mean_entropies(length)
        share, from_text = share_found(ours), share_found(cell.detections(length, writer.read))
        scored, verdicts = sum(one.num_scored for one in ours), dict(Counter(one.verdict for one in ours))
        missed = sorted(round(nats, 2) for nats, one in zip(entropies, ours, strict=True) if one.p_value > LEVEL)
        yield row(f"found_t{cell.temperature:g}_len{length}", share, None, "of marked texts at p <= 1e-3",
                  published(share, len(ours), length) if cell.temperature == 1.0 else None, texts=len(ours),
                  from_text=round(from_text, 3), entropy_nats=round(statistics.mean(entropies), 2),
                  missed_entropies_nats=missed, green_share=round(sum(one.num_green for one in ours) / scored, 3),
                  pairs_scored=round(scored / len(ours), 1), verdicts=verdicts)  # fmt: skip


def share_found(detections: Sequence[Detection]) -> float:
    return statistics.mean(found.p_value <= LEVEL for found in detections)


def published(share: float, num_texts: int, length: int) -> tuple[str, bool] | None:
    """The published rate as a goal, less two standard errors of so few texts."""
    if length not in PUBLISHED:
        return None
    rate = PUBLISHED[length]
    lowest = rate - 2 * math.sqrt(rate * (1 - rate) / num_texts)
    return f">= {lowest:.3f}: published {rate} less two standard errors", share >= lowest


def text_cost(cells: dict[float, Cell]) -> Iterator[Row]:
    """What delta does to the text, at temperature 1; the error is that of the mean over texts."""
    plain = cells[0.0]
    for delta, cell in cells.items():
        means = [statistics.mean(losses) for losses in cell.losses]
        error = cell.perplexity * statistics.stdev(means) / math.sqrt(len(means))
        yield row(f"perplexity_delta{delta:g}", cell.perplexity, ("the same model, unmarked", plain.perplexity),
                  "under the unmarked model", None, texts=len(means), standard_error=round(error, 2))  # fmt: skip


def docstrings() -> Iterator[str]:
    """Of all files of Python and of the installed packages, without the paragraphs of those before."""
    seen: set[str] = set()
    opening = re.compile(r':\s*\n\s*r?"""(.*?)"""', re.DOTALL)  # behind a colon: of a class or a function
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    for path in sorted({path for root in roots for path in root.rglob("*.py")}):
        for text in opening.findall(path.read_text(encoding="utf-8", errors="replace")):
            paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
            yield "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in seen)
            seen.update(paragraphs)


def windows(tokenizer: Any) -> list[Window]:
    """20,000 of text, of all four lengths in turn, none from the same place; a docstring gives its second one when
    each has given its first."""
    texts = [text for text in docstrings() if len(text) >= MIN_CHARACTERS]
    random.Random(0).shuffle(texts)
    left: list[Window] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    cut: list[Window] = []
    lengths = cycle(LENGTHS)
    length = next(lengths)
    while left and len(cut) < NUM_WINDOWS:
        behind = []
        for ids in left:
            if len(ids) >= length:
                cut.append(ids[:length])
                behind.append(ids[length:])
                length = next(lengths)
        left = behind
    return cut[:NUM_WINDOWS]


def false_positives(cut: list[Window], vocab_size: int, num_keys: int) -> Iterator[Row]:
    """Ours beside transformers' detector as it comes: repeated pairs counted, p-value of the normal distribution."""
    rng = random.Random(0)
    ours: list[list[float]] = []
    theirs: list[float] = []
    for _ in range(num_keys):
        watermark = Watermark(strong_key(rng), GAMMA, DELTA, vocab_size=vocab_size)
        mine, normal = p_values(watermark, cut)
        ours.append(mine)
        theirs += normal
    for level in (1e-2, 1e-3):
        by_key = [share_at_most(mine, level) for mine in ours]
        rate = statistics.mean(by_key)
        enough = len(cut) >= NUM_WINDOWS
        peer = ("transformers' formula, repeats counted", share_at_most(theirs, level))
        yield row(f"false_positives_{level:g}", rate, peer, "of unmarked windows",
                  (f"<= {level:g} on {NUM_WINDOWS} windows", rate <= level and enough), windows=len(cut),
                  tokens=sum(map(len, cut)), keys=num_keys, by_key=[round(share, 5) for share in by_key])  # fmt: skip
        for length in LENGTHS:
            mine = [p for of_key in ours for p, ids in zip(of_key, cut, strict=True) if len(ids) == length]
            yield row(f"false_positives_{level:g}_len{length}", share_at_most(mine, level), None,
                      "of unmarked windows", None, windows=len(mine) // num_keys, keys=num_keys)  # fmt: skip


def p_values(watermark: Watermark, cut: list[Window]) -> tuple[list[float], list[float]]:
    """Of each window: ours, and transformers'. All pairs are looked up by their first token, so that the list of a
    token is derived once; that the detector says the same is checked on a hundred of them."""
    pairs = sorted({pair for window in cut for pair in pairwise(window)})
    green = {pair: watermark.num_green([pair]) for pair in pairs}
    p_value = lru_cache(None)(lambda num_green, num_scored: detection(num_green, num_scored, GAMMA, DELTA).p_value)
    ours, theirs = [], []
    for window in cut:
        counted = list(pairwise(window))
        distinct = set(counted)
        ours.append(p_value(sum(green[pair] for pair in distinct), len(distinct)))
        z = z_score(sum(green[pair] for pair in counted), len(counted), GAMMA)
        theirs.append(0.5 * math.erfc(z / math.sqrt(2)))
    assert ours[:100] == [watermark.detect(window).p_value for window in cut[:100]]
    return ours, theirs


def share_at_most(p_values: Sequence[float], level: float) -> float:
    return sum(p <= level for p in p_values) / len(p_values)


def step_cost(vocab_size: int, steps: list[list[int]]) -> Iterator[Row]:
    """A step of 16 rows: lists of tokens seen before, of new ones, and those of real texts from an empty cache."""
    rng, logits = random.Random(0), torch.randn(NUM_ROWS, vocab_size)
    key = strong_key(rng)
    watermark = Watermark(key, vocab_size=vocab_size)
    processor: Any = WatermarkLogitsProcessor(vocab_size, "cpu", hashing_key=key)

    def mark(by: Watermark, previous: list[int]) -> torch.Tensor:
        return logits[: len(previous)].add_(by.bias(previous))  # as the engine adds it

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
    for name in ("cold", "warm"):
        started = Watermark(key, vocab_size=vocab_size)
        warming_ms, num_lists = 0.0, 0
        if name == "warm":
            started_s = time.process_time()
            num_lists = started.warm()
            warming_ms = 1000 * (time.process_time() - started_s)
        step_ms = [cpu_ms(partial(mark, started, step[:NUM_ROWS])) for step in steps]
        yield row(f"step_from_{name}", statistics.mean(step_ms), peer, f"ms of CPU, mean of {len(steps)} steps", None,
                  first_20_steps=round(statistics.mean(step_ms[:20]), 3), warmed_lists=num_lists,
                  last_50_steps=round(statistics.mean(step_ms[-50:]), 3), warming_ms=round(warming_ms))  # fmt: skip


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


def measure(num_texts: int, num_keys: int) -> Iterator[Row]:
    writer = Writer()
    torch.set_num_threads(1)  # in this thread, whose work is short, which a second one only delays
    yield from false_positives(windows(writer.tokenizer), writer.vocab_size, num_keys)
    by_delta: dict[float, Cell] = {}
    for temperature, delta in [(t, DELTA) for t in TEMPERATURES] + [(1.0, d) for d in DELTAS if d != DELTA]:
        cell = writer.cell(temperature, delta, num_texts)
        writer.write(cell)
        if delta == DELTA:
            yield from found(writer, cell)
        if temperature == 1.0:
            by_delta[delta] = cell
    yield from text_cost(dict(sorted(by_delta.items())))
    yield from step_cost(writer.vocab_size, by_delta[DELTA].steps())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="16 texts and 2 keys in place of 48 and 4")
    rows = [*(measure(16, 2) if parser.parse_args().quick else measure(48, 4))]
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")}
    print(json.dumps({"benchmark": "watermark", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
