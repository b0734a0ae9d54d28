"""The watermark of Kirchenbauer et al. 2023, width 1: green lists, the mark on logits, the detector.

The previous token and the key choose a share gamma of the vocabulary as green; green logits get delta on top. The
lists are bit for bit those of transformers' `lefthash`. V vocabulary: the model's `config.vocab_size`, padding rows of
its embedding included, since the lists of another V are others altogether. B rows of the engine's batch.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NoReturn

import numpy as np
import torch
from pydantic import Secret

from alpaca_ray import models
from alpaca_ray.config import UserError
from alpaca_ray.safety.detection import Detection, detection
from alpaca_ray.safety.watermark_key import check_key

# A list takes V bits: room for 10,900 at V 49,152 and 4,180 at 128,256. Deriving one takes 0.4 to 1 ms.
CACHE_BYTES = 64 * 2**20
Pair = tuple[int, int]  # a token and the one before it: (previous, token)


class Watermark:
    """Raises UserError for a key that others know or can guess, and for values without sense."""

    def __init__(
        self,
        key: int,
        gamma: float = 0.25,
        delta: float = 2.0,
        *,
        vocab_size: int,
        allow_public_key: bool = False,
    ) -> None:
        check_key(key, allow_public_key)
        if not (0 < gamma < 1 and int(vocab_size * gamma) > 0):
            raise UserError(f"gamma must be between 0 and 1 and leave a token green, not {gamma}")
        if not (0 < delta < math.inf):
            raise UserError(f"delta must be above 0, not {delta}: it is what green logits gain")
        self.gamma, self.delta, self.vocab_size = gamma, delta, vocab_size
        self._key = Secret[int](key)
        self._bytes_per_list = -(-vocab_size // 8)
        self._cache_size = max(1, CACHE_BYTES // self._bytes_per_list)
        self._list = lru_cache(self._cache_size)(self._derive)
        # What each byte of a list adds to 8 logits: looking it up takes half as long as unpacking and multiplying.
        self._bias_of_byte = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * np.float32(delta)

    def green_mask(self, previous_token: int) -> torch.Tensor:
        """(V,) bool, on the CPU."""
        green = np.unpackbits(self._packed([previous_token])[0], count=self.vocab_size)
        return torch.from_numpy(green).view(torch.bool)

    def bias(self, previous_tokens: Sequence[int]) -> torch.Tensor:
        """What is added to the logits: (B, V) float32, on the CPU; delta where green, else 0."""
        # NumPy, since torch would wake its threads for less than a millisecond's work
        added = np.take(self._bias_of_byte, self._packed(previous_tokens), axis=0)  # (B, V / 8, 8)
        return torch.from_numpy(added.reshape(len(previous_tokens), 8 * self._bytes_per_list)[:, : self.vocab_size])

    def warm(self) -> int:
        """Fill three quarters of the cache with the lists of the first ids, which takes 3 to 4 s; how many these are.

        Tokenizers number the commonest tokens first, as they merged them. May run in a thread of its own.
        """
        num_lists = min(self._cache_size * 3 // 4, self.vocab_size)
        for token in range(num_lists):
            self._list(token)
        return num_lists

    def detect(self, token_ids: Sequence[int], prompt_len: int = 0) -> Detection:
        """Judge all tokens but the first `prompt_len`; a repeated pair counts once, or a stock phrase would decide.

        Token ids without the tokenizer's own beginning-of-sequence token, as transformers' detector scores them.
        """
        pairs = set(list(pairwise(token_ids))[max(0, prompt_len - 1) :])
        return detection(self.num_green(pairs), len(pairs), self.gamma, self.delta)

    def num_green(self, pairs: Iterable[Pair]) -> int:
        """How many of the pairs are green, each as often as it is given."""
        return sum(self._is_green(previous, token) for previous, token in sorted(pairs))  # a list is derived once

    def _packed(self, previous_tokens: Sequence[int]) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        """(B, V / 8), a bit a token, 1 where green."""
        packed = b"".join([self._list(self._known(token)) for token in previous_tokens])
        return np.frombuffer(packed, np.uint8).reshape(len(previous_tokens), self._bytes_per_list)

    def _is_green(self, previous_token: int, token: int) -> bool:
        byte, bit = divmod(self._known(token), 8)
        return bool(self._list(self._known(previous_token))[byte] & 0x80 >> bit)  # packbits puts the first on top

    def _derive(self, previous_token: int) -> bytes:
        """A green list, 8 tokens a byte."""
        # As transformers' WatermarkLogitsProcessor does it. On the CPU, always: a GPU's randperm gives other lists.
        seed = (self._key.get_secret_value() * previous_token) % (2**64 - 1)
        generator = torch.Generator("cpu").manual_seed(seed)
        # The same order in int32 as in int64, 20 to 30 % sooner.
        order = torch.randperm(self.vocab_size, generator=generator, device="cpu", dtype=torch.int32)
        green = np.zeros(self.vocab_size, np.uint8)
        green[order[: int(self.vocab_size * self.gamma)].numpy().astype(np.intp)] = 1
        return np.packbits(green).tobytes()

    def _known(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise UserError(f"token id {token} is not in the vocabulary of {self.vocab_size}")
        return token

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Watermark holds its key and does not travel: make one where it is used")


def vocab_size(model: str) -> int:
    """V of a model, a reference as `models.resolve` takes it. Raises UserError."""
    return int(models.load_config(model).get_text_config().vocab_size)


def detect_text(text: str, model: str, watermark: Watermark) -> Detection:
    """Judge a text as the model's tokenizer reads it. Raises UserError where there is no such model."""
    tokenizer = models.load_tokenizer(model)
    return watermark.detect(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
