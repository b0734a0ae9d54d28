"""Token ids to text and bytes as they come, and the stop strings in it."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character


class Detokenizer:
    """Token ids to text, piece by piece; the pieces together are the text of all ids at once.

    A token's text depends on its neighbours (a leading space, a character cut in two), so text is the difference of
    two decodings that share a few tokens before it, as in Hugging Face's text-generation-inference.
    """

    CONTEXT = 6  # tokens of the prompt that the first piece is decoded with

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_token_ids[-self.CONTEXT :])
        self._start, self._shown = 0, len(self._ids)  # text of ids[:shown] is out; ids[start:] are decoded

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """The text that is certain now. An incomplete character is held back until the `last` push."""
        self._ids += token_ids
        before = decode(self._tokenizer, self._ids[self._start : self._shown])
        after = decode(self._tokenizer, self._ids[self._start :])
        if after.endswith(REPLACEMENT) and not last:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    """Their text, special tokens left out, nothing tidied."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenBytes:
    """The bytes that each token stands for. A character may be spread over several tokens, so text would not do."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        alphabet: Any = bytes_to_unicode  # untyped
        decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
        kinds = decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        self._byte_of = {character: byte for byte, character in alphabet().items()}
        self._is_byte_level, self._has_byte_tokens = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            self._known[token_id] = self._find(token_id)
        return self._known[token_id]

    def _find(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # a model's embedding may have more rows than its tokenizer has tokens
            return b""
        if token_id in self._tokenizer.added_tokens_decoder:
            return token.encode()
        if self._is_byte_level and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if self._has_byte_tokens and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()  # SentencePiece's mark for a space


def decoder_kinds(state: dict[str, object]) -> set[object]:
    """The types of a `tokenizers` decoder and of those it is made of."""
    inner = state.get("decoders")
    return {state["type"]}.union(*(decoder_kinds(one) for one in inner) if isinstance(inner, list) else ())


class StopMatcher:
    """Cuts a growing text before the first stop string; holds back an end that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str, last: bool = False) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string ended it. `last`: nothing follows, hold nothing."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
