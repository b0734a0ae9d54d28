"""The server that one writes first: transformers' `generate` behind FastAPI, one request at a time.

python benchmarks/peers/generate_server.py MODEL --host HOST --port PORT
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from threading import Thread
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


def main(directory: str, host: str, port: int) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    app, turn = FastAPI(), asyncio.Lock()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            async with turn:
                pieces = generate(model, tokenizer, body)
                while (event := await asyncio.to_thread(next, pieces, None)) is not None:
                    yield f"data: {json.dumps(event)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, host=host, port=port, log_level="warning")


def generate(model: Any, tokenizer: Any, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The text as it comes, then the usage."""
    inputs = tokenizer(body["prompt"], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": body["temperature"], "top_p": body["top_p"], "top_k": 0}
    options = {"do_sample": False} if body["temperature"] == 0 else sampling
    ids: list[Any] = []

    def run() -> None:
        ids.append(model.generate(**inputs, streamer=streamer, max_new_tokens=body["max_tokens"], **options))

    thread = Thread(target=run)
    thread.start()
    for text in streamer:
        yield {"choices": [{"text": text}]}
    thread.join()
    num_prompt_tokens = inputs["input_ids"].shape[1]
    usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": ids[0].shape[1] - num_prompt_tokens}
    yield {"choices": [], "usage": usage}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    main(options.model, options.host, options.port)
