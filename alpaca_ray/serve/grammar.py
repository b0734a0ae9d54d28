"""Completions that obey a JSON schema: which tokens may come next, by llguidance."""

from typing import TYPE_CHECKING, Any

import numpy as np

from alpaca_ray.serve.engine import SchemaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Spaces where people put them and nowhere else: a model may else go on with white space until its tokens are spent.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


class Grammar:
    """What one completion may still say. It keeps its own place: `append` each token."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def append(self, token_id: int) -> None:
        """The completion has one more token."""
        self._matcher.consume_token(token_id)

    def allowed(self) -> Mask:
        """(V,), True where a token may come next; the end of sequence alone where nothing else may.

        Raises SchemaError where the text so far is too much for the schema, or against it.
        """
        if self._matcher.is_error():
            raise SchemaError(self._matcher.get_error())
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)


class Grammars:
    """Schemas for one tokenizer. V vocabulary: the model's, padding rows of its embedding included."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled: Any = None

    def start(self, json_schema: str) -> Grammar:
        """For a new completion. Takes a second at the first call, and may take as long for a large schema.

        Raises SchemaError.
        """
        import llguidance  # only where a schema is asked for

        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json_schema, overrides=JSON_STYLE)
        except ValueError as error:
            raise SchemaError(str(error)) from None
        matcher = llguidance.LLMatcher(self._llguidance_tokenizer(), grammar, log_level=0)
        if matcher.is_error():
            raise SchemaError(" ".join(matcher.get_error().split()))
        return Grammar(matcher, self._vocab_size)

    def _llguidance_tokenizer(self) -> Any:
        if self._compiled is None:
            from llguidance.hf import from_tokenizer

            self._compiled = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size)  # type: ignore[arg-type]
        return self._compiled
