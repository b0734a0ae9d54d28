"""Serving: tokens per second, time to first token and between tokens, of ours layer by layer and of other servers.

python benchmarks/serve.py [--quick] [--parts ours peers] [--vllm-python PATH] [--llamacpp-python PATH --gguf FILE]

The embedded model, 16 streams at once and 1, in one run, all sides by turns; prompts are the package's evaluation
instructions, others in each round. Every side gets the same model directory, whose end-of-sequence token is one that
the model never gives: so all streams have the same number of tokens, which is checked. Peers are servers, read by the
same client as ours; the bare engine and llama.cpp are read in their own processes, without HTTP. vLLM and llama.cpp
live in environments of their own, whose python is told. First the engine with the mark and without it, many pairs with
nothing beside them, for its cost is less than what rounds differ by; then the layers of ours by turns; then each peer
by turns with ours, one peer after the other: together they would not fit into memory.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from alpaca_ray import models
from alpaca_ray.schema import read_evaluation_tasks
from alpaca_ray.serve.app import OPENMP
from alpaca_ray.serve.linear import has_bfloat16
from benchmarks.serve_ceiling import Ceiling, measure_ceiling
from benchmarks.serve_layers import LAYERS, SMALLER, Layer, end, served
from benchmarks.serve_sides import (
    HttpSide,
    LineSide,
    Pass,
    Side,
    Sides,
    Work,
    endless_model,
    free_port,
    percentile,
    serving,
)

Row = dict[str, Any]
PEERS_DIR = Path(__file__).parent / "peers"
MARKING = ("engine", "engine_watermark")
OURS = ("engine", *LAYERS)
WHOLE = LAYERS[-1]
NUM_STREAMS = 16
PEERS = {
    "generate": "transformers' generate, one request at a time",
    "continuous": "transformers serve --continuous-batching",
    "vllm": "vLLM's server",
    "llamacpp_f32": "llama.cpp, float32, no HTTP",
    "llamacpp_q4": "llama.cpp, the 4-bit file, no HTTP",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured: marked and unmarked pairs, rounds of ours and of the peers, tokens of a completion."""

    pairs: int
    rounds: int
    peer_rounds: int
    num_tokens: int


FULL = Plan(pairs=12, rounds=4, peer_rounds=2, num_tokens=128)
QUICK = Plan(pairs=4, rounds=3, peer_rounds=1, num_tokens=48)


class Prompts:
    """The evaluation instructions, in the model's own chat format."""

    def __init__(self, model: Path) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        turns = [[{"role": "user", "content": task.instruction}] for task in read_evaluation_tasks(None)]
        self.texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        self.ids = [tuple(tokenizer(text)["input_ids"]) for text in self.texts]

    def work(self, round_index: int, num_streams: int, num_tokens: int) -> Work:
        """Other prompts in each round: a mark's lists are known only of tokens seen before."""
        chosen = [(round_index * NUM_STREAMS + i) % len(self.texts) for i in range(num_streams)]
        return Work(tuple(self.texts[i] for i in chosen), tuple(self.ids[i] for i in chosen), num_tokens)


def peers(sides: Sides, model: Path, options: argparse.Namespace) -> dict[str, Callable[[], Side]]:
    """How to start each."""
    made: dict[str, Callable[[], Side]] = {}

    def server(name: str, command: Sequence[str], fields: dict[str, Any] | None = None) -> None:
        def make() -> Side:
            port = free_port()
            given = [*command, "--host", "127.0.0.1", "--port", str(port)]
            process = serving(given, port, "/health", sides.log_dir / f"{name}.log")
            url = f"http://127.0.0.1:{port}"
            return HttpSide(name, url, str(model), fields=fields, process=process)

        made[name] = make

    bin_dir = Path(sys.executable).parent
    server("generate", [sys.executable, str(PEERS_DIR / "generate_server.py"), str(model)])
    # One set of sampling parameters for all requests: the model's own, which is greedy. 0.0 would be NaN to it. Its
    # cache is nearly all memory unless it is told how much: here as much as ours has.
    server("continuous",
           [str(bin_dir / "transformers"), "serve", str(model), "--continuous-batching",
            "--dtype", options.peer_dtype, "--device", "cpu",
            "--cb-block-size", "32", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512"],
           {"temperature": None, "top_p": None, "seed": None, "stream_options": None})  # fmt: skip
    if options.vllm_python:
        server("vllm", [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
                        "--dtype", options.peer_dtype, "--max-model-len", "512", "--max-num-seqs", "16"])  # fmt: skip
    if options.llamacpp_python:
        for name, bits in (("llamacpp_f32", "f32"), ("llamacpp_q4", "q4")):
            command = [options.llamacpp_python, str(PEERS_DIR / "llamacpp.py"), str(options.gguf), bits]
            made[name] = partial(LineSide, name, command, sides.log_dir / f"{name}.log")
    return made


Taken = dict[tuple[str, str], list[Pass]]  # by side and kind of work


class Bench:
    """Who is asked, what, and how often."""

    def __init__(self, sides: Sides, prompts: Prompts, plan: Plan) -> None:
        self.sides, self.prompts, self.plan = sides, prompts, plan

    def turns(self, names: Sequence[str], rounds: int, kinds: Sequence[str]) -> Taken:
        """The sides by turns, forth and back, after a pass of each that is not timed."""
        taken: Taken = defaultdict(list)
        for name in names:
            self.sides.ask(name, self.prompts.work(-1, NUM_STREAMS, 4))
        for index in range(rounds):
            for name in names if index % 2 == 0 else names[::-1]:
                for kind in kinds:
                    if done := self.sides.ask(name, self.work(kind, index)):
                        taken[name, kind].append(done)
                        say(f"round {index}, {name}, {kind}: {done.tokens_per_s:.1f} tokens/s")
        return taken

    def work(self, kind: str, index: int) -> Work:
        many = self.prompts.work(index, NUM_STREAMS, self.plan.num_tokens)
        return {
            "16": many,
            "1": self.prompts.work(index, 1, self.plan.num_tokens),
            "16_sampled": replace(many, temperature=1.0, top_p=0.95),
        }[kind]

    def against(self, name: str, make: Callable[[], Side], ours: Sequence[str]) -> Taken:
        """A peer and ours, by turns."""
        self.sides.add(name, make)
        kinds = ("16", "1", "16_sampled") if name == "vllm" else ("16", "1")
        taken = self.turns((*ours, name), self.plan.peer_rounds, kinds)
        self.sides.end(name)
        return taken


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def rate(taken: Taken, name: str, kind: str) -> float:
    return statistics.median(done.tokens_per_s for done in taken[name, kind])


def figures(taken: Taken, beside: str) -> Iterator[Row]:
    """What was measured of each side; `beside`: what took turns with it."""
    for (name, kind), passes in taken.items():
        whose = "ours" if name in (*MARKING, *OURS, *SMALLER) else "peer"
        row: Row = {"name": f"{name}_{kind}", "beside": beside, whose: round(rate(taken, name, kind), 1)}
        for what, of_one in (("first_ms", "first_ms"), ("between_ms", "gaps_ms"), ("per_token_ms", "token_ms")):
            values = [value for done in passes for value in getattr(done, of_one)]
            row[what] = {f"p{percent}": round(percentile(values, percent), 1) for percent in (50, 95)}
        row["all"] = [round(done.tokens_per_s, 1) for done in passes]
        yield row | {"unit": "tokens/s", "goal": "none, for comparison", "holds": True}


def costs(taken: Taken) -> Iterator[Row]:
    """What is left of the bare engine's tokens per second at 16 streams, from pairs of the same round."""
    pairs = [("watermark", "engine_watermark", "engine", 0.03), ("serve", "serve", "engine", None),
             ("moderation", "moderation", "watermark", None), ("admission", "admission", "moderation", None),
             ("all_layers", WHOLE, "engine", 0.10)]  # fmt: skip
    for name, with_it, without, most in pairs:
        if (with_it, "16") not in taken or (without, "16") not in taken:
            continue
        both = zip(taken[with_it, "16"], taken[without, "16"], strict=True)
        shares = [1 - a.tokens_per_s / b.tokens_per_s for a, b in both]
        cost = statistics.median(shares)
        yield {"name": f"cost_of_{name}_16", "ours": round(cost, 4), "all": [round(share, 3) for share in shares],
               "unit": "of tokens/s", "against": without,
               "goal": "none, for comparison" if most is None else f"<= {most:g}",
               "holds": most is None or cost <= most}  # fmt: skip


def ratios(name: str, dtype: str, taken: Taken) -> Iterator[Row]:
    """Ours with every layer on against a server that has none of them; beside it, ours with none.

    The peer computes in `dtype`, ours in the same. But vLLM's goals are for 16 bits: where the CPU does not compute in
    bfloat16, our weights are in float16.
    """
    goals = {("generate", "16"): 6.0, ("continuous", "16"): 4.0, ("vllm", "16"): 1.0, ("vllm", "1"): 0.9}
    ours: str = WHOLE
    if name.startswith("llamacpp"):
        ours = "engine"
    elif name == "vllm" or dtype == SMALLER[0]:
        ours = SMALLER[0]
    for kind in [kind for of, kind in taken if of == name and (ours, kind) in taken]:
        goal, peer, mine = goals.get((name, kind)), rate(taken, name, kind), rate(taken, ours, kind)
        others = [of for of in ("serve", WHOLE, *SMALLER) if of != ours and (of, kind) in taken]
        yield {"name": f"against_{name}_{kind}", "ours": round(mine, 1), "ours_is": ours, "peer": round(peer, 1),
               "peer_name": PEERS[name], "ratio": round(mine / peer, 2),
               "ratios_of": {of: round(rate(taken, of, kind) / peer, 2) for of in others}, "peer_dtype": dtype,
               "unit": "tokens/s", "goal": f">= {goal:g} times" if goal else "none, for comparison",
               "holds": goal is None or mine / peer >= goal}  # fmt: skip


def missing_peers(sides: Sides, asked: Collection[str]) -> Iterator[Row]:
    """Those that are not installed, and those that failed."""
    for name, peer_name in PEERS.items():
        if name not in asked or name in sides.absent:
            why = sides.absent.get(name, "not installed")
            yield {"name": f"against_{name}", "peer_name": peer_name, "unit": "tokens/s",
                   "goal": "measured where installed", "why": why, "holds": name not in asked}  # fmt: skip


def missing(sides: Sides) -> Iterator[Row]:
    """Of ours, what failed."""
    for name in (*MARKING, *LAYERS, *SMALLER):
        if name in sides.absent:
            yield {"name": name, "unit": "tokens/s", "goal": "answers", "why": sides.absent[name], "holds": False}


def equality(taken: Taken) -> Iterator[Row]:
    """Nobody computes something easier: unmarked and greedy, ours and `generate` say the same."""
    if ("generate", "16") in taken and ("serve", "16") in taken:
        both = list(zip(taken["serve", "16"], taken["generate", "16"], strict=False))
        texts = [(a.text, b.text) for mine, theirs in both for a, b in zip(mine.streams, theirs.streams, strict=True)]
        equal = sum(a == b for a, b in texts)
        yield {"name": "greedy_texts_equal_to_generate", "ours": equal, "of": len(texts), "unit": "texts",
               "goal": "all but 1 in 16, where two tokens tie in the last bit",
               "holds": equal >= len(texts) * 15 / 16}  # fmt: skip


def shares(taken: Taken, ceiling: Ceiling) -> Iterator[Row]:
    """Tokens per second as a part of what memory and arithmetic allow, prompts not counted."""
    for kind, num_rows in (("16", NUM_STREAMS), ("1", 1)):
        most = ceiling.tokens_per_s(num_rows)
        for name in ("engine", WHOLE):
            if (name, kind) in taken:
                step_ms = statistics.median(ms for done in taken[name, kind] for ms in done.token_ms)
                decoding = 1000 * num_rows / step_ms
                yield {"name": f"share_of_ceiling_{name}_{kind}", "ours": round(decoding / most, 3),
                       "decoding_tokens_per_s": round(decoding, 1), "ceiling_tokens_per_s": round(most, 1),
                       "unit": "of the ceiling", "goal": "none, for comparison", "holds": True}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter completions")
    parser.add_argument("--parts", nargs="+", choices=("ours", "peers"), default=["ours", "peers"])
    parser.add_argument("--vllm-python", help="of an environment with vLLM")
    fastest = "bfloat16" if has_bfloat16() else "float32"
    told = "of vLLM and of continuous batching; default: bfloat16 where the CPU computes in it, which is their fastest"
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default=fastest, help=told)
    parser.add_argument("--llamacpp-python", help="of an environment with llama-cpp-python and gguf")
    parser.add_argument("--gguf", type=Path, help="the embedded model's file, for llama.cpp")
    options = parser.parse_args()
    if options.llamacpp_python and not options.gguf:
        parser.error("--llamacpp-python needs --gguf: the .gguf file inside the wheel that models.py names")
    return options


def main() -> int:
    options = arguments()
    plan = QUICK if options.quick else FULL
    busy, started_s = psutil.cpu_percent(2), time.monotonic()
    with ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory()))
        model = endless_model(Path(models.resolve(models.EMBEDDED)), directory / "model")
        ceiling = measure_ceiling(model)
        sides = held.enter_context(Sides(directory))
        for side, flags in (("engine", []), ("engine_watermark", ["--watermark"])):
            openmp = [f"{name}={value}" for name, value in OPENMP.items()]  # as the application has it
            command = ["env", *openmp, sys.executable, "-m", "benchmarks.serve_engine", str(model), *flags]
            sides.add(side, partial(LineSide, side, command, directory / f"{side}.log"))
        bench = Bench(sides, Prompts(model), plan)
        rows: list[Row] = []
        if "ours" in options.parts:
            marking = bench.turns(MARKING, plan.pairs, ("16",))
            rows += [*figures(marking, "marking"), *costs(marking)]
        sides.end("engine_watermark")  # its memory is wanted
        begin = held.enter_context(served(str(model), sides))
        begin(LAYERS[::-1])
        if "ours" in options.parts:
            ours = bench.turns(OURS, plan.rounds, ("16", "1"))
            rows += [*figures(ours, "ours"), *costs(ours), *shares(ours, ceiling)]
        dtypes = {"continuous": options.peer_dtype, "vllm": options.peer_dtype, "llamacpp_q4": "Q4_1"}
        end(sides, [layer for layer in LAYERS if layer not in ("serve", WHOLE)])
        made: dict[str, Callable[[], Side]] = {}
        if "peers" in options.parts:
            made = peers(sides, model, options)
            begin(SMALLER)
        applications: list[Layer] = ["serve", WHOLE, *SMALLER]
        for name, make in made.items():
            beside = bench.against(name, make, ["engine"] if name.startswith("llamacpp") else applications)
            rows += [*figures(beside, name), *ratios(name, dtypes.get(name, "float32"), beside)]
            if name == "generate":
                rows += equality(beside)
                # An application that waits takes its part of the cores, and an operator has one, in the fastest dtype.
                done = ["serve", *((WHOLE, "int8") if options.peer_dtype == SMALLER[0] else ())]
                end(sides, [layer for layer in applications if layer in done])
                applications = [layer for layer in applications if layer not in done]
        rows += [*missing(sides), *(missing_peers(sides, made) if "peers" in options.parts else [])]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9),
               "busy_before": busy / 100, **ceiling.as_row()}  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch", "transformers")}
    setting = {"model": models.EMBEDDED, "dtype": "float32", "num_tokens": plan.num_tokens, "streams": NUM_STREAMS,
               "pairs": plan.pairs, "rounds": plan.rounds, "peer_rounds": plan.peer_rounds,
               "seconds": round(time.monotonic() - started_s)}  # fmt: skip
    print(
        json.dumps({"benchmark": "serve", "machine": machine, "versions": versions, "setting": setting, "rows": rows})
    )
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
