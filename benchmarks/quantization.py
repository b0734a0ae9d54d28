"""What weights of 16 and 8 bits cost the embedded model: perplexity, and how often its likeliest token stays the same.

python benchmarks/quantization.py [--quick]

Docstrings of Python and of the installed packages, a window of 256 tokens from each, through the serving engine's
decoder with weights of each kind. The last line is one JSON object.
"""

import argparse
import importlib.metadata
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from alpaca_ray import models
from alpaca_ray.config import Quantization
from alpaca_ray.serve.decoder import Chunk, Decoder
from alpaca_ray.serve.torch_engine import decoder_for
from benchmarks.watermark import docstrings

LENGTH = 256
WEIGHTS: dict[str, Quantization | None] = {"float32": None, "float16": "float16", "int8": "int8"}
MOST = {"float16": 0.001, "int8": 0.1}  # rise of the perplexity
MIN_CHARACTERS = 2_000  # a docstring shorter than that seldom has 256 tokens


def windows(number: int) -> list[tuple[int, ...]]:
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    texts = [text for text in docstrings() if len(text) >= MIN_CHARACTERS]
    random.Random(0).shuffle(texts)
    ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    return [tuple(found[:LENGTH]) for found in ids if len(found) >= LENGTH][:number]


def logprobs(decoder: Decoder, window: Sequence[int]) -> Tensor:
    """Of every token of the vocabulary behind each token of the window but the last: (LENGTH - 1, V)."""
    logits = decoder.forward([Chunk(0, 0, tuple(window), len(window))])
    decoder.release(0)
    return logits[:-1].log_softmax(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 windows in place of 60")
    options = parser.parse_args()
    cut = windows(8 if options.quick else 60)
    model = models.load_model(models.EMBEDDED, "float32")
    losses: dict[str, list[float]] = defaultdict(list)
    same: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        decoders = {name: decoder_for(model, 1, LENGTH, given) for name, given in WEIGHTS.items()}
        for window in cut:
            found = {name: logprobs(decoder, window) for name, decoder in decoders.items()}
            said = torch.tensor(window[1:])[:, None]
            for name, ours in found.items():
                losses[name].append(-ours.gather(1, said).mean().item())
                same[name].append((ours.argmax(-1) == found["float32"].argmax(-1)).double().mean().item())
    perplexity = {name: math.exp(statistics.mean(of_all)) for name, of_all in losses.items()}
    rows = []
    for name, most in MOST.items():
        rise = perplexity[name] / perplexity["float32"] - 1
        rows += [
            {"name": f"perplexity_{name}", "ours": round(perplexity[name], 3), "peer": round(perplexity["float32"], 3),
             "peer_name": "float32", "rise": round(rise, 6), "unit": "", "goal": f"rise <= {most:g}",
             "holds": rise <= most},
            {"name": f"same_likeliest_token_{name}", "ours": round(statistics.mean(same[name]), 4),
             "unit": "of tokens", "goal": "none, for comparison", "holds": True},
        ]  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({"benchmark": "quantization", "versions": versions, "windows": len(cut), "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
