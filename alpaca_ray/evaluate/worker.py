"""One model at work on a table of examples: a loss for each given answer, a response to each instruction."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from alpaca_ray import models
from alpaca_ray.config import EvaluateConfig
from alpaca_ray.evaluate.responses import respond
from alpaca_ray.evaluate.scores import AnswerLoss, Response
from alpaca_ray.prompts import prompt_of
from alpaca_ray.schema import EXAMPLE_SCHEMA, Example

LOSSES, RESPONSES = ("heldout", "reference"), "responses"  # the parts of the work

WORK_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("position", pa.int64()),  # among the examples of its part
        *EXAMPLE_SCHEMA,
    ]
)

RESULT_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("part", pa.string()),
        ("position", pa.int64()),
        ("nats", pa.float64()),  # these two are null for a response, and for an example that is too long
        ("target_tokens", pa.int64()),
        ("text", pa.string()),  # these three are null for a loss
        ("cut", pa.bool_()),
        ("num_tokens", pa.int64()),
    ]
)


class ModelWorker:
    """An actor with one model. It holds one copy of the weights, in the precision of what it does at the time."""

    def __init__(self, name: str, reference: str, config: EvaluateConfig, max_length: int) -> None:
        from transformers.utils.logging import disable_progress_bar

        from alpaca_ray.evaluate.loss import set_threads  # torch comes with it: not for the driver

        disable_progress_bar()  # type: ignore[no-untyped-call]  # one line of the job's log for every redraw
        set_threads(config.placement.num_cpus)
        self._name, self._reference, self._config, self._max_length = name, reference, config, max_length
        self._tokenizer = models.load_tokenizer(reference)
        self._dtype, self._model = "", None
        self._load("float32")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """WORK_SCHEMA in, RESULT_SCHEMA out."""
        rows = batch.to_pylist()
        results = self._losses([row for row in rows if row["part"] in LOSSES])
        results += self._responses([row for row in rows if row["part"] == RESPONSES])
        return pa.Table.from_pylist([{"model": self._name, **result} for result in results], schema=RESULT_SCHEMA)

    def _losses(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not rows:
            return []
        from alpaca_ray.evaluate.loss import answer_losses

        # Training moves a loss by a few per cent; bfloat16 alone moves that of one answer by 0.3 % (135M model).
        model, examples = self._load("float32"), [example_of(row) for row in rows]
        losses = answer_losses(model, self._tokenizer, examples, self._max_length, self._config.batch_size)
        return [_key(row) | (asdict(loss) if loss else {}) for row, loss in zip(rows, losses, strict=True)]

    def _responses(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not rows:
            return []
        config = self._config
        # bfloat16 halves what a GPU reads per token. A CPU without instructions for it is 5 times slower with it.
        model = self._load("bfloat16" if config.placement.num_gpus > 0 else "float32")
        prompts = [prompt_of(example_of(row)) for row in rows]
        responses = respond(model, self._tokenizer, prompts, config.max_new_tokens, config.batch_size)
        return [_key(row) | asdict(response) for row, response in zip(rows, responses, strict=True)]

    def _load(self, dtype: str) -> Any:
        if self._dtype != dtype:
            self._model = None  # frees the other copy first
            model: Any = models.load_model(self._reference, dtype)
            self._model = model.to("cuda") if self._config.placement.num_gpus > 0 else model
            self._dtype = dtype
        return self._model


def example_of(row: Mapping[str, Any]) -> Example:
    """The example in a row of WORK_SCHEMA."""
    return Example(row["id"], row["instruction"], row["input"], row["output"])


def loss_of(row: Mapping[str, Any]) -> AnswerLoss | None:
    """The loss in a row of RESULT_SCHEMA; None for an example that is too long."""
    return None if row["nats"] is None else AnswerLoss(row["nats"], row["target_tokens"])


def response_of(row: Mapping[str, Any]) -> Response:
    """The response in a row of RESULT_SCHEMA."""
    return Response(row["text"], row["cut"], row["num_tokens"])


def _key(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"part": row["part"], "position": row["position"]}
