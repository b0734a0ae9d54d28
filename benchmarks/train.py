"""Training: our loop beside the HF Trainer, on the same examples, weights, threads and global batch, in one run.

python benchmarks/train.py [--quick]

SmolLM2-135M's shape with random weights, so nothing is downloaded; lengths as Alpaca's. A useful token is one of a
prompt or an answer, padding is none. bfloat16 where this CPU computes in it, else float32. The two take turns, step by
step, each in processes of its own that hold model and optimizer all the while; the first step of each is not timed.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import LengthGroupedSampler

from alpaca_ray.config import TrainConfig
from alpaca_ray.train import loop, metrics, model
from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded
from alpaca_ray.train.fsdp import Fsdp
from benchmarks.peers.hf_trainer import HfTrainer

Row = dict[str, Any]
SHAPE = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
)  # fmt: skip
NUM_THREADS = 2
MAX_LENGTH = 512
LEARNING_RATE = 2e-5
FOREVER = 1_000_000  # steps, so that the cosine stays at its top, as the peer's rate does
PUBLISHED_SIZE, PUBLISHED_GLOBAL_BATCH = 52_002, 128
GEMM_SIZE = 3072
NUM_DRAWS = 1000


@dataclass(frozen=True)
class Plan:
    """How much is measured. Sizes are numbers of examples; the one with fixed padding has no goal and is slow."""

    global_batch: int
    fixed_batch: int
    ranks_batch: int
    rounds: int
    micro_batches: tuple[int, ...]  # the peer's: Alpaca's 4, which is ours too, and the Trainer's default of 8


FULL = Plan(global_batch=16, fixed_batch=8, ranks_batch=16, rounds=3, micro_batches=(4, 8))
QUICK = Plan(global_batch=8, fixed_batch=4, ranks_batch=4, rounds=2, micro_batches=(4, 8))


def lengths(rng: random.Random) -> list[tuple[int, int]]:
    """(prompt, answer) in tokens, as many as Alpaca has.

    Two in five have an input (its dataset card). Prompts: the package's seed tasks in Alpaca's format, with an input
    88 tokens in the median, without 47. Answers: log-normal, so that the mean of a whole example is that of the
    published run, 138 (21.6M tokens in 3 epochs of 52K).
    """
    drawn = []
    for _ in range(PUBLISHED_SIZE):
        median, spread = (88, 0.22) if rng.random() < 0.4 else (47, 0.15)
        prompt = round(median * rng.lognormvariate(0, spread))
        drawn.append((prompt, max(2, min(MAX_LENGTH - prompt, round(49 * rng.lognormvariate(0, 0.9))))))
    return drawn


def as_they_come(
    stock: list[tuple[int, int]], size: int, micro_batches: tuple[int, ...], rng: random.Random
) -> list[Encoded]:
    """Examples in random order; of many such draws the one most like the stock in its mean length and its padding."""
    whole = [shape_of(stock, micro_batch) for micro_batch in micro_batches]

    def difference(drawn: list[tuple[int, int]]) -> float:
        shapes = [shape_of(drawn, micro_batch) for micro_batch in micro_batches]
        return sum(abs(a / b - 1) for pair in zip(shapes, whole, strict=True) for a, b in zip(*pair, strict=True))

    best = min((rng.sample(stock, size) for _ in range(NUM_DRAWS)), key=difference)
    return [example(prompt, answer, rng) for prompt, answer in best]


def shape_of(pairs: list[tuple[int, int]], micro_batch: int) -> tuple[float, float, float]:
    """(tokens, answer tokens, tokens when padded to the longest of the micro-batch), each per example."""
    sums = [sum(pair) for pair in pairs]
    parts = [sums[i : i + micro_batch] for i in range(0, len(sums), micro_batch)]
    totals = sum(sums), sum(answer for _, answer in pairs), sum(len(part) * max(part) for part in parts)
    return totals[0] / len(pairs), totals[1] / len(pairs), totals[2] / len(pairs)


def grouped(stock: list[tuple[int, int]], size: int, micro_batch: int, rng: random.Random) -> list[Encoded]:
    """Whole micro-batches as `group_by_length` makes them of the stock at Alpaca's global batch, drawn likewise."""
    sums = [sum(pair) for pair in stock]
    seeded = torch.Generator().manual_seed(rng.getrandbits(32))
    order = list(LengthGroupedSampler(PUBLISHED_GLOBAL_BATCH, lengths=sums, generator=seeded))
    parts = [order[i : i + micro_batch] for i in range(0, len(order) - micro_batch + 1, micro_batch)]
    wanted = statistics.mean(sums) * size

    def difference(drawn: list[list[int]]) -> float:
        return abs(sum(sums[i] for part in drawn for i in part) - wanted)

    best = min((rng.sample(parts, size // micro_batch) for _ in range(NUM_DRAWS)), key=difference)
    pairs = [stock[i] for part in best for i in part]
    return [example(prompt, answer, rng) for prompt, answer in pairs]


def example(num_prompt: int, num_answer: int, rng: random.Random) -> Encoded:
    ids = rng.choices(range(3, SHAPE.vocab_size), k=num_prompt + num_answer)
    return Encoded("", ids, [IGNORE_INDEX] * num_prompt + ids[num_prompt:])


class OurLoop:
    """A rank of our loop."""

    def __init__(self, directory: Path, num_threads: int, config: TrainConfig, rank: int, world_size: int) -> None:
        torch.set_num_threads(num_threads)
        store = f"file://{directory}/store{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        self.config = config
        self.state = Fsdp(model.load(config), config, model.make_mesh("cpu", world_size))
        self.state.model.train()

    def step(self, examples: list[Encoded]) -> dict[str, float]:
        """One optimizer step."""
        dist.barrier()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        row = loop.train_step(self.state, examples, FOREVER, self.config)
        taken = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
        return {"loss": row.loss, "grad_norm": row.grad_norm} | taken

    def state_bytes(self, examples: list[Encoded]) -> int:
        """This rank's parameters, gradients and optimizer, counted when a step has all three."""
        parameters = list(self.state.model.parameters())
        counted: list[int] = []

        def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            grads = [p.grad for p in parameters]
            kept = [value for of_one in optimizer.state.values() for value in of_one.values()]
            counted.append(sum(local_bytes(t) for t in (*parameters, *grads, *kept) if t is not None))

        hook = self.state.optimizer.register_step_pre_hook(count)
        self.step(examples)
        self.step(examples)  # the first step of all makes the optimizer's state only afterwards
        hook.remove()
        return counted[-1]


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def peak_flops(num_threads: int, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large matrix products."""
    torch.set_num_threads(num_threads)
    a, b, out = (torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype) for _ in range(3))
    times = []
    for _ in range(6):
        started_s = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - started_s)
    return 2 * GEMM_SIZE**3 / min(times)


class Processes:
    """As many processes as one side has ranks; each holds an object and calls its methods when told to."""

    def __init__(self, made: type, common: tuple[Any, ...], each: Sequence[tuple[Any, ...]] = ((),)) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for arguments in each:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs, made, (*common, *arguments)), daemon=True)
            process.start()
            theirs.close()  # so that a dead process is an EOFError here
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all ranks."""
        for pipe in self.pipes:
            pipe.send((method, arguments))
        return [pipe.recv() for pipe in self.pipes]

    def step(self, *arguments: Any) -> dict[str, float]:
        """One step: the slowest rank's wall time, all ranks' CPU time."""
        answers: list[dict[str, float]] = self.call("step", *arguments)
        both = {"wall_s": max(a["wall_s"] for a in answers), "cpu_s": sum(a["cpu_s"] for a in answers)}
        return answers[0] | both

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=10)
            process.kill()


def serve(pipe: Connection, made: type, arguments: tuple[Any, ...]) -> None:
    """What a process does: call after call, until the other end is closed."""
    held = made(*arguments)
    with suppress(EOFError):
        while True:
            method, call = pipe.recv()
            pipe.send(getattr(held, method)(*call))


class Bench:
    """Where the weights lie, and what all sides share."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory, self.plan = directory, plan
        self.dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
        torch.manual_seed(0)
        weights = LlamaForCausalLM(SHAPE)
        weights.save_pretrained(directory / "model")
        self.num_parameters = sum(p.numel() for p in weights.parameters())
        rng = random.Random(0)
        stock = lengths(rng)
        self.mean_length = statistics.mean(sum(pair) for pair in stock)
        micro_batch = plan.micro_batches[0]
        self.check = as_they_come(stock, micro_batch, (micro_batch,), rng)
        self.work = {
            "dynamic_padding": as_they_come(stock, plan.global_batch, plan.micro_batches, rng),
            "group_by_length": grouped(stock, plan.global_batch, micro_batch, rng),
            "fixed_padding": as_they_come(stock, plan.fixed_batch, (micro_batch,), rng),
        }
        counted = self.work["dynamic_padding"]
        mean_context = sum(len(e.input_ids) ** 2 for e in counted) / num_useful(counted)
        self.useful_flops = num_useful(counted) * metrics.flops_per_token(weights, mean_context)
        self.short = [example(8, 8, rng) for _ in range(4)]  # one for each of four ranks

    def ours(self, world_size: int) -> Processes:
        config = TrainConfig(
            base_model=str(self.directory / "model"), max_length=MAX_LENGTH, learning_rate=LEARNING_RATE,
            global_batch_size=self.plan.global_batch, micro_batch_size=self.plan.micro_batches[0], warmup_ratio=0.0,
            compute_dtype=self.dtype,
        )  # fmt: skip
        num_threads = max(1, NUM_THREADS // world_size)
        return Processes(OurLoop, (self.directory, num_threads, config), [(r, world_size) for r in range(world_size)])

    def peer(self) -> Processes:
        return Processes(HfTrainer, (self.directory / "model", NUM_THREADS, self.dtype, LEARNING_RATE, MAX_LENGTH))

    def computed_flops(self) -> float:
        """Of a step of ours, which makes the logits of the targets alone; the useful ones are of all tokens."""
        examples = self.work["dynamic_padding"]
        head = SHAPE.vocab_size * SHAPE.hidden_size
        return self.useful_flops - 6 * head * (num_useful(examples) - sum(e.num_targets for e in examples))

    def flop_ratio(self, examples: Sequence[Encoded], micro_batch: int, length: int | None) -> float:
        """Multiplications by weights, theirs by ours: what the ratio would be if both computed equally fast.

        They multiply every token of a row by the head, padding too; we multiply the tokens before a target.
        """
        head = SHAPE.vocab_size * SHAPE.hidden_size  # also the embedding, which is looked up, not multiplied
        targets = sum(e.num_targets for e in examples)
        theirs = row_tokens(examples, micro_batch, length) * self.num_parameters
        return theirs / (num_useful(examples) * (self.num_parameters - head) + targets * head)


def num_useful(examples: Sequence[Encoded]) -> int:
    return sum(len(e.input_ids) for e in examples)


def row_tokens(examples: Sequence[Encoded], micro_batch: int, length: int | None) -> int:
    """Tokens that the peer computes, padding included; `length`: of every row, or None for the longest beside it."""
    parts = [examples[i : i + micro_batch] for i in range(0, len(examples), micro_batch)]
    return sum(len(part) * (length or max(len(e.input_ids) for e in part)) for part in parts)


def first_step(bench: Bench, ours: Processes, peer: Processes) -> Iterator[Row]:
    """Nobody skips work: from the same weights both find the same loss and the same gradient."""
    mine, theirs = ours.step(bench.check), peer.step(bench.check, bench.plan.micro_batches[0], True)
    tolerance = 1e-3 if bench.dtype == "float32" else 2e-2
    for name in ("loss", "grad_norm"):
        off = abs(mine[name] / theirs[name] - 1)
        yield {"name": f"first_step_{name}", "ours": mine[name], "peer": theirs[name], "peer_name": "HF Trainer",
               "unit": "nats" if name == "loss" else "L2", "goal": f"equal to {tolerance:g}",
               "holds": off <= tolerance}  # fmt: skip


def against_trainer(bench: Bench, ours: Processes, peer: Processes) -> Iterator[Row]:
    """Useful tokens per second on each workload, ours and theirs by turns, after a step of each that is not timed."""
    goals = {"dynamic_padding": 2.0, "group_by_length": 1.2, "fixed_padding": None}
    for name, goal in goals.items():
        examples = bench.work[name]
        rounds = bench.plan.rounds if goal else 1
        micro_batches = bench.plan.micro_batches if name == "dynamic_padding" else bench.plan.micro_batches[:1]
        mine: list[Row] = []
        theirs: dict[int, list[Row]] = {size: [] for size in micro_batches}
        for _ in range(1 + rounds):
            mine.append(ours.step(examples))
            for size, taken in theirs.items():
                taken.append(peer.step(examples, size, name != "fixed_padding"))
        for size, taken in theirs.items():
            row_name = f"useful_tokens_per_s_{name}_micro_batch_{size}"
            yield compared(row_name, num_useful(examples), mine[1:], taken[1:], goal) | {
                "peer_name": f"HF Trainer, {name}, micro-batch {size}",
                "examples": len(examples),
                "peer_row_tokens": row_tokens(examples, size, None if goal else MAX_LENGTH),
                "ratio_at_equal_flops": round(bench.flop_ratio(examples, size, None if goal else MAX_LENGTH), 2),
                "peer_all": per_s(num_useful(examples), taken[1:]),
            }


def compared(name: str, num_tokens: int, mine: list[Row], theirs: list[Row], goal: float | None) -> Row:
    """Medians of tokens per wall second, and the same of CPU seconds."""
    ratio = middle(theirs, "wall_s") / middle(mine, "wall_s")
    return {
        "name": name, "ours": round(num_tokens / middle(mine, "wall_s"), 1),
        "peer": round(num_tokens / middle(theirs, "wall_s"), 1), "ratio": round(ratio, 2),
        "ratio_cpu": round(middle(theirs, "cpu_s") / middle(mine, "cpu_s"), 2),
        "ours_cpu_s": round(middle(mine, "cpu_s"), 1), "peer_cpu_s": round(middle(theirs, "cpu_s"), 1),
        "ours_all": per_s(num_tokens, mine), "useful_tokens": num_tokens, "unit": "useful tokens/s",
        "goal": f"{goal:g} times the peer" if goal else "none, for comparison",
        "holds": goal is None or ratio >= goal,
    }  # fmt: skip


def middle(taken: list[Row], name: str) -> float:
    return float(statistics.median(row[name] for row in taken))


def per_s(num_tokens: int, taken: list[Row]) -> list[float]:
    return [round(num_tokens / row["wall_s"], 1) for row in taken]


def share_of_peak(bench: Bench, ours: Processes) -> Iterator[Row]:
    """FLOP/s of a step as a part of what this machine does in a large matrix product, measured before and after."""
    dtype = getattr(torch, bench.dtype)
    examples = bench.work["dynamic_padding"]
    peak = peak_flops(NUM_THREADS, dtype)
    taken = [ours.step(examples) for _ in range(bench.plan.rounds)]
    peak = max(peak, peak_flops(NUM_THREADS, dtype))
    useful, computed = (flop / middle(taken, "wall_s") / peak for flop in (bench.useful_flops, bench.computed_flops()))
    yield {"name": "share_of_gemm_peak", "ours": round(useful, 3), "computed_share": round(computed, 3),
           "peak_gflops": round(peak / 1e9, 1), "dtype": bench.dtype,
           "ceiling_useful_tokens_per_s": round(peak * num_useful(examples) / bench.useful_flops, 1),
           "unit": "of the peak, useful FLOP", "goal": ">= 0.5", "holds": useful >= 0.5}  # fmt: skip


def two_ranks(bench: Bench, one: Processes, two: Processes) -> Iterator[Row]:
    """FSDP2 on two processes of one thread, by turns with one process of two threads."""
    examples = bench.work["dynamic_padding"][: bench.plan.ranks_batch]
    two.step(bench.check)
    mine, theirs = [], []
    for _ in range(bench.plan.rounds):
        mine.append(two.step(examples))
        theirs.append(one.step(examples))
    name = "useful_tokens_per_s_two_ranks"
    yield compared(name, num_useful(examples), mine, theirs, None) | {"peer_name": "ours, one process of two threads"}


def memory(bench: Bench, sides: dict[int, Processes]) -> Iterator[Row]:
    """Parameters, gradients and optimizer state of the fullest rank."""
    whole = 0
    for world_size, side in sides.items():
        fullest = max(side.call("state_bytes", bench.short))
        whole = whole or fullest
        share = fullest / whole
        yield {"name": f"state_bytes_per_rank_{world_size}_ranks", "ours": fullest, "unit": "bytes",
               "share_times_ranks": round(share * world_size, 4), "goal": f"1/{world_size} of one rank's, within 5 %",
               "holds": abs(share * world_size - 1) <= 0.05}  # fmt: skip


def measured(bench: Bench) -> Iterator[Row]:
    with ExitStack() as held:
        ours = held.enter_context(bench.ours(1))
        with bench.peer() as peer:
            yield from first_step(bench, ours, peer)
            yield from against_trainer(bench, ours, peer)
        yield from share_of_peak(bench, ours)
        two = held.enter_context(bench.ours(2))
        yield from two_ranks(bench, ours, two)
        with bench.ours(4) as four:
            yield from memory(bench, {1: ours, 2: two, 4: four})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller global batch, one micro-batch size of the peer")
    plan = QUICK if parser.parse_args().quick else FULL
    # A thread that waits for another sleeps: CPU seconds are work then, on a machine that is shared too.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE"}
    busy, rows = psutil.cpu_percent(2), []
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), plan)
        for row in measured(bench):
            print(f"{time.monotonic() - started_s:.0f} s: {json.dumps(row)}", file=sys.stderr, flush=True)
            rows.append(row)
    machine = {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "busy_before": busy / 100,
    }
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    setting = {"model": "SmolLM2-135M's shape, random weights", "parameters": bench.num_parameters,
               "dtype": bench.dtype,
               "threads": NUM_THREADS, "global_batch": plan.global_batch, "micro_batch": plan.micro_batches[0],
               "mean_tokens": round(bench.mean_length, 1)}  # fmt: skip
    print(
        json.dumps({"benchmark": "train", "machine": machine, "versions": versions, "setting": setting, "rows": rows})
    )
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
