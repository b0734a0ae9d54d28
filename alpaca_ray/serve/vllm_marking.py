"""The mark in vLLM's worker process, as a logits processor.

What vLLM's sampler does to a row, in this order: log-probabilities of the raw logits; allowed ids and bad words;
logits processors, `Marking` behind the built-in ones; penalties; the likeliest token where greedy; temperature, min_p,
top_k and top_p; the draw. So the mark goes on first, as in the PyTorch engine, and no log-probability has it.
"""

import os
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from alpaca_ray import models
from alpaca_ray.config import WatermarkConfig
from alpaca_ray.safety.watermark import Watermark
from alpaca_ray.safety.watermark_key import read_key
from alpaca_ray.serve.engine import SamplingParams, SchemaError
from alpaca_ray.serve.grammar import Grammar, Grammars
from alpaca_ray.serve.sampling import RowSampling, choose

if TYPE_CHECKING:
    from torch import Tensor, device

SETTINGS = "alpaca_ray"  # our part of what vLLM hands to its worker, and of a request's extra arguments
PARENT_ENV = "ALPACA_RAY_VLLM_PARENT"  # the process that the engine belongs to


def worker_watermark(model: str, config: WatermarkConfig) -> Watermark | None:
    """Raises UserError where there is no key, which ends the worker before it has said a token."""
    if not config.enabled:
        return None
    key = read_key(config.key_env, Path(config.key_file) if config.key_file else None, config.allow_public_key)
    vocab_size = int(models.load_config(model).get_text_config().vocab_size)
    return Watermark(key.get_secret_value(), config.gamma, config.delta, vocab_size=vocab_size,
                     allow_public_key=config.allow_public_key)  # fmt: skip


def end_with(pid: int) -> None:
    """End this process when that one ends, however it ends. Linux.

    vLLM's processes outlive a parent that was killed, and keep all they have of a GPU from the one that replaces it.
    They do end when their worker has ended.
    """
    ended = os.pidfd_open(pid)

    def wait() -> None:
        select.select([ended], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


@dataclass
class MarkedRow:
    """A row of vLLM's batch. `output_ids` is vLLM's own list and grows; `sampling`: where the token is chosen here."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    sampling: RowSampling | None = None
    num_taken: int = 0  # of output_ids, by `sampling`

    @property
    def previous(self) -> int:
        """The token before the next one."""
        return (self.output_ids or self.prompt_ids)[-1]

    def catch_up(self) -> RowSampling | None:
        """`sampling`, after all tokens so far."""
        if self.sampling is not None:
            for token_id in self.output_ids[self.num_taken :]:
                self.sampling.append(token_id)
        self.num_taken = len(self.output_ids)
        return self.sampling


class Marking(LogitsProcessor):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """In vLLM's worker: every row gets the mark, and some get their token. Whatever fails here ends the engine.

    vLLM draws with a generator that lives as long as the request, so a seeded completion could not go on in another
    replica. Such rows are drawn as in the PyTorch engine, from (seed, index), and vLLM finds one token left to take.
    """

    def __init__(self, vllm_config: Any, device: "device", is_pin_memory: bool) -> None:
        settings = vllm_config.additional_config[SETTINGS]
        if parent := os.environ.get(PARENT_ENV):
            end_with(int(parent))
        self._watermark = worker_watermark(settings["model"], WatermarkConfig(**settings["watermark"]))
        self._vocab_size, self._device = vllm_config.model_config.get_vocab_size(), device
        self._model: str = settings["model"]
        self._grammars: Grammars | None = None
        self._rows: dict[int, MarkedRow] = {}

    def is_argmax_invariant(self) -> bool:
        """False: greedy rows are marked too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """vLLM's batch has changed."""
        process_dict_updates(self._rows, batch_update, self._row)

    def apply(self, logits: "Tensor") -> "Tensor":
        """logits: (B, V), float32, changed in place. KeyError for a row that vLLM did not tell of."""
        rows = [self._rows[i] for i in range(len(logits))]
        if self._watermark is not None:
            logits += self._watermark.bias([row.previous for row in rows]).to(logits.device)
        chosen_here = [(i, sampling) for i, row in enumerate(rows) if (sampling := row.catch_up()) is not None]
        if chosen_here:
            indices = [i for i, _ in chosen_here]
            token_ids = self._choose(logits[indices], [sampling for _, sampling in chosen_here])
            for i, token_id in zip(indices, token_ids, strict=True):
                if token_id is not None:
                    logits[i] = float("-inf")
                    logits[i, token_id] = 0
        return logits

    def _choose(self, logits: "Tensor", samplings: list[RowSampling]) -> list[int | None]:
        """None where nothing can be: whoever asked for it finds that out for himself, and the others go on."""
        try:
            return choose(logits.clone(), samplings)
        except SchemaError:
            if len(samplings) == 1:
                return [None]
            return [self._choose(logits[i : i + 1], [sampling])[0] for i, sampling in enumerate(samplings)]

    def _row(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> MarkedRow:
        assert prompt_ids, "prompts are token ids"
        asked = (params.extra_args or {}).get(SETTINGS)
        return MarkedRow(prompt_ids, output_ids, None if asked is None else self._sampling(**asked))

    def _sampling(self, emitted: list[int], **values: Any) -> RowSampling:
        params = SamplingParams(**values)
        assert params.seed is not None, "the engine gives one: all workers of a model have to draw the same"
        grammar = None if params.json_schema is None else self._grammar(params.json_schema)
        return RowSampling.start(params, params.seed, emitted, self._vocab_size, self._device, grammar)

    def _grammar(self, json_schema: str) -> Grammar:
        self._grammars = self._grammars or Grammars(models.load_tokenizer(self._model), self._vocab_size)
        return self._grammars.start(json_schema)
