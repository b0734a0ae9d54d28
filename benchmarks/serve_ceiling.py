"""What memory and arithmetic allow a decoding step on this machine, for benchmarks/serve.py."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

REPEATS = 8


@dataclass(frozen=True)
class Ceiling:
    """Bytes and multiplications of a step against how fast they go here, in float32."""

    num_weights: int  # of the linear layers, the head among them: each is read once a step
    bytes_per_s: float  # read from memory
    flops_16_rows: float  # of a linear layer with 16 rows whose weights lie in the cache
    flops_large: float  # of a large matrix product

    def tokens_per_s(self, num_rows: int) -> float:
        """Of a step whose rows have a token each; attention and all else left out."""
        memory_s = 4 * self.num_weights / self.bytes_per_s
        arithmetic_s = 2 * self.num_weights * num_rows / (self.flops_16_rows if num_rows > 1 else self.flops_large)
        return num_rows / max(memory_s, arithmetic_s)

    def as_row(self) -> dict[str, Any]:
        """For the result."""
        return {"read_gb_per_s": round(self.bytes_per_s / 1e9, 1), "linear_weights": self.num_weights,
                "gflops_16_rows": round(self.flops_16_rows / 1e9, 1),
                "gflops_large": round(self.flops_large / 1e9, 1)}  # fmt: skip


def measure_ceiling(model: Path) -> Ceiling:
    """On all cores, the best of some tries of each."""
    torch.set_num_threads(os.cpu_count() or 1)
    config: Any = AutoConfig.from_pretrained(model)
    width, inner = config.hidden_size, config.intermediate_size
    attention = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim + width
    per_layer = width * attention + 3 * width * inner
    num_weights = config.num_hidden_layers * per_layer + width * config.vocab_size
    many = torch.ones(2**28)  # 1 GiB
    with torch.inference_mode():
        return Ceiling(
            num_weights=num_weights,
            bytes_per_s=many.nbytes / best_s(many.max),
            flops_16_rows=max(linear_flops(width, 2 * inner), linear_flops(inner, width), linear_flops(width, width)),
            flops_large=large_flops(3072),
        )


def linear_flops(num_in: int, num_out: int) -> float:
    """Of oneDNN's kernel with packed weights, torch's fastest at so few rows."""
    rows = torch.ones(16, num_in)
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(num_out, num_in), 16)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def many() -> None:
        for _ in range(50):
            multiply(rows, packed, None, "none", [], "")

    return 50 * 2 * 16 * num_in * num_out / best_s(many)


def large_flops(size: int) -> float:
    a, b, out = (torch.ones(size, size) for _ in range(3))
    return 2 * size**3 / best_s(lambda: torch.mm(a, b, out=out))


def best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return min(times)
