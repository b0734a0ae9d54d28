"""A demonstration as token ids: prompt + answer -> input_ids, and labels that count the answer only."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from alpaca_ray.models import load_tokenizer
from alpaca_ray.prompts import answer_ids, prompt_of
from alpaca_ray.schema import Example, Reject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch's cross_entropy skips this label

PROMPT_FORMATS: dict[str, Callable[[Example], str]] = {"alpaca": prompt_of}

ENCODED_SCHEMA = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
REJECT_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string()), ("text", pa.string())])


@dataclass(frozen=True)
class Encoded:
    """`labels[t]` is `input_ids[t]` over the answer and its end-of-sequence token, IGNORE_INDEX over the prompt."""

    id: str
    input_ids: list[int]
    labels: list[int]

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts. None stands first, so shifting the labels by one loses none."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode(
    example: Example, tokenizer: "PreTrainedTokenizerBase", prompt_format: str, max_length: int
) -> Encoded | Reject:
    """The target is the answer and the end-of-sequence token, straight after the prompt.

    An example that is longer than `max_length` tokens is rejected whole ("too_long"): cutting it would drop the end
    that the model is to learn, or leave nothing to learn at all. So is one with a blank answer ("empty_answer").
    """
    prompt = PROMPT_FORMATS[prompt_format](example)
    if not example.output.strip():
        return Reject("empty_answer", prompt)
    prompt_ids: list[int] = tokenizer(prompt).input_ids  # as at inference, so with a BOS where the tokenizer adds one
    target_ids = [*answer_ids(prompt, prompt_ids, example.output, tokenizer), tokenizer.eos_token_id]
    if len(prompt_ids) + len(target_ids) > max_length:
        return Reject("too_long", prompt + example.output)
    return Encoded(example.id, prompt_ids + target_ids, [IGNORE_INDEX] * len(prompt_ids) + target_ids)


class Encoder:
    """`encode` over tables, with a tokenizer that is loaded once; an actor of Ray Data runs it."""

    def __init__(self, base_model: str, prompt_format: str, max_length: int) -> None:
        self._tokenizer = load_tokenizer(base_model)
        self._prompt_format = prompt_format
        self._max_length = max_length

    def __call__(self, examples: pa.Table) -> pa.Table:
        """EXAMPLE_SCHEMA in; the columns of ENCODED_SCHEMA and of REJECT_SCHEMA out, null where the other applies."""
        schema = pa.unify_schemas([ENCODED_SCHEMA, REJECT_SCHEMA])
        return pa.Table.from_pylist([self._row(Example(**row)) for row in examples.to_pylist()], schema=schema)

    def _row(self, example: Example) -> dict[str, Any]:
        result = encode(example, self._tokenizer, self._prompt_format, self._max_length)
        return {"id": example.id, **asdict(result)}
