"""ray.data.llm's HttpRequestProcessor, a fixed pool of actors; `qps` is each actor's part of the limit.

python benchmarks/peers/ray_data_llm.py BODIES OUT --actors 8 --requests-per-minute R

It knows no limit in tokens. See asyncio_loop.py for BODIES and the environment.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data.llm import HttpRequestProcessorConfig, build_processor

BATCH_SIZE = 16  # an actor sends a batch one after the other, and has four batches of a block under way
MAX_RETRIES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bodies", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--actors", type=int, required=True)
    parser.add_argument("--requests-per-minute", type=int, required=True)
    options = parser.parse_args()
    ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = HttpRequestProcessorConfig(
        url=os.environ["OPENAI_BASE_URL"] + "/completions",
        headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
        qps=max(1, options.requests_per_minute // 60 // options.actors),
        max_retries=MAX_RETRIES,
        batch_size=BATCH_SIZE,
        concurrency=(options.actors, options.actors),  # one number would be the most it may grow to
    )
    processor = build_processor(
        config, preprocess=lambda row: {"payload": json.loads(row["body"])}, postprocess=lambda row: {"text": text(row)}
    )
    rows = [{"body": line} for line in options.bodies.read_text().splitlines()]
    answered = processor(ray.data.from_items(rows, override_num_blocks=options.actors))
    answered.write_json(str(options.out))


def text(row: dict[str, Any]) -> str:
    """Of an answer; a refusal comes as a row like any other, and ends the run here."""
    return str(row["http_response"]["choices"][0]["text"])


if __name__ == "__main__":
    main()
