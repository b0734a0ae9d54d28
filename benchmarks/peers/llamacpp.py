"""llama.cpp's library, all streams in one batch, as its own server's slots do it. A Work a line in, times a line out.

PYTHON_OF_ITS_OWN benchmarks/peers/llamacpp.py FILE.gguf f32|q4

f32: the file's tensors are written out in float32 first, so that it computes on the same weights as the other sides.
Greedy. The end-of-sequence token is nothing special at this level.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

MAX_STREAMS, MAX_LENGTH = 16, 512


class Batch:
    """A llama_batch that is filled anew for every call."""

    def __init__(self, num_tokens: int) -> None:
        self.raw = llama_cpp.llama_batch_init(num_tokens, 0, 1)
        self.raw.n_tokens = 0

    def add(self, token_id: int, position: int, stream: int, wants_logits: bool) -> int:
        i = self.raw.n_tokens
        self.raw.token[i], self.raw.pos[i] = token_id, position
        self.raw.n_seq_id[i], self.raw.seq_id[i][0], self.raw.logits[i] = 1, stream, wants_logits
        self.raw.n_tokens += 1
        return int(i)


class Model:
    """A model and its context."""

    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = MAX_STREAMS * MAX_LENGTH, MAX_STREAMS
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = os.cpu_count()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = Batch(512)

    def run(self, items: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """(token, position, stream, wants logits) -> the likeliest next token of each stream that wants it."""
        found: dict[int, int] = {}
        for begin in range(0, len(items), 512):
            self.batch.raw.n_tokens = 0
            placed = [(item[2], self.batch.add(*item), item[3]) for item in items[begin : begin + 512]]
            if llama_cpp.llama_decode(self.context, self.batch.raw) != 0:
                raise RuntimeError("llama_decode failed")
            for stream, index, wants in placed:
                if wants:
                    logits = llama_cpp.llama_get_logits_ith(self.context, index)
                    found[stream] = int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())
        return found

    def answer(self, work: dict[str, Any]) -> list[list[float]]:
        """When each token of each stream came."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        prompts = work["prompt_ids"]
        started_s = time.perf_counter()
        items = [(token, k, s, k == len(ids) - 1) for s, ids in enumerate(prompts) for k, token in enumerate(ids)]
        times_s: list[list[float]] = [[] for _ in prompts]
        for step in range(work["num_tokens"]):
            chosen = self.run(items)
            for of_stream in times_s:
                of_stream.append(time.perf_counter() - started_s)
            items = [(token, len(prompts[s]) + step, s, True) for s, token in sorted(chosen.items())]
        return times_s


def written_out(path: Path, target: Path) -> Path:
    """The same model with its tensors in float32."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def main(path: Path, bits: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library talks; the pipe is for answers alone
    with tempfile.TemporaryDirectory() as directory:
        model = Model(str(written_out(path, Path(directory) / "f32.gguf") if bits == "f32" else path))
        for line in sys.stdin:
            print(json.dumps({"times_s": model.answer(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
