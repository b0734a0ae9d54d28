"""What 8-bit weights cost the embedded model: perplexity of text, and how often its likeliest token stays the same.

python benchmarks/int8.py [--quick]

Docstrings of Python and of the installed packages, a window of 256 tokens from each, through the serving engine's
decoder in float32 and in int8. The last line is one JSON object.
"""

import argparse
import importlib.metadata
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from alpaca_ray import models
from alpaca_ray.serve.decoder import Chunk, Decoder
from alpaca_ray.serve.torch_engine import decoder_for
from benchmarks.watermark import docstrings

LENGTH = 256
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
    exact, eights = (decoder_for(model, 1, LENGTH, int8=int8) for int8 in (False, True))
    losses: dict[str, list[float]] = {"float32": [], "int8": []}
    same: list[float] = []
    with torch.inference_mode():
        for window in cut:
            ours, theirs = logprobs(eights, window), logprobs(exact, window)
            said = torch.tensor(window[1:])[:, None]
            for name, found in (("int8", ours), ("float32", theirs)):
                losses[name].append(-found.gather(1, said).mean().item())
            same.append((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    perplexity = {name: round(math.exp(statistics.mean(found)), 2) for name, found in losses.items()}
    rise = perplexity["int8"] / perplexity["float32"] - 1
    rows = [
        {"name": "perplexity", "ours": perplexity["int8"], "peer": perplexity["float32"], "peer_name": "float32",
         "rise": round(rise, 4), "unit": "", "goal": "at most 10 % higher", "holds": rise <= 0.1},
        {"name": "same_likeliest_token", "ours": round(statistics.mean(same), 4), "unit": "of tokens",
         "goal": "none, for comparison", "holds": True},
    ]  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({"benchmark": "int8", "versions": versions, "windows": len(cut), "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
