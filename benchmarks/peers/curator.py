"""bespokelabs-curator's online processor: chat completions, one process, told the limits.

PYTHON_OF_ITS_OWN benchmarks/peers/curator.py BODIES OUT --requests-per-minute R

It wants other versions of our libraries, so it runs in an environment of its own. See asyncio_loop.py for BODIES.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

NO_LIMIT = 1_000_000_000  # tokens per minute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bodies", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests-per-minute", type=int, required=True)
    options = parser.parse_args()
    bodies = [json.loads(line) for line in options.bodies.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as cache:
        # Read when it is imported. Else it asks its maker's servers and a model map on the network.
        os.environ |= {
            "TELEMETRY_ENABLED": "0", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "CURATOR_CACHE_DIR": cache,
        }  # fmt: skip
        answers = ask(bodies, options.requests_per_minute)
    options.out.write_text("\n".join(json.dumps(answer) for answer in answers))


def ask(bodies: list[dict[str, Any]], requests_per_minute: int) -> list[Any]:
    import tiktoken

    # Its tokenizer's vocabulary comes over the network: bytes stand in for tokens, of which no limit is set here.
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=single_bytes, special_tokens={})
    tiktoken.get_encoding = lambda name: encoding
    from bespokelabs import curator

    class Tasks(curator.LLM):  # type: ignore[misc]
        def prompt(self, row: dict[str, Any]) -> str:
            return str(row["prompt"])

        def parse(self, row: dict[str, Any], response: str) -> dict[str, Any]:
            return {"seed": row["seed"], "text": response}

    tasks = Tasks(
        model_name=bodies[0]["model"],
        backend="openai",
        generation_params={"max_tokens": bodies[0]["max_tokens"]},
        backend_params={
            "base_url": os.environ["OPENAI_BASE_URL"],
            "max_requests_per_minute": requests_per_minute,
            "max_tokens_per_minute": NO_LIMIT,
            "max_retries": 10,
            "require_all_responses": True,
        },
    )
    return list(tasks([{"prompt": body["prompt"], "seed": body["seed"]} for body in bodies]).dataset)


if __name__ == "__main__":
    main()
