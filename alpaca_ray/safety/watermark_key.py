"""The watermark's key: where it is read from, and which keys are refused. Its value stands in no error and no repr.

transformers' scheme, whose bits ours are, seeds torch's CPU generator with `key * token modulo 2**64 - 1`, and that
generator (a Mersenne twister) takes the low 32 bits of a seed. A key is worth 32 bits, then, and a few more for tokens
above 2**64 / key: enough against chance and the curious, not against who can spend some CPU-years on marked texts.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Secret

from alpaca_ray.config import UserError

KEY_ENV = "ALPACA_RAY_WATERMARK_KEY"
PUBLIC_KEY = 15485863  # the default of transformers and lm-watermarking: anyone can detect and forge with it
MIN_KEY, MAX_KEY = 2**32, 2**63 - 1
NUM_SEED_BITS = 32
# Low bits near 0 (or 2**32) seed as a small key does, which is the first that a guesser tries. Low bits that end in
# many zeros leave few seeds: with 32 of them nearly all tokens would share one green list.
MIN_DISTANCE, MAX_ZERO_BITS = 2**20, 11
HOW_TO_MAKE_ONE = 'make one with: python -c "import secrets; print(secrets.randbits(62))"'


def check_key(key: int, allow_public_key: bool = False, where: str = "the watermark's key") -> None:
    """Raises UserError for a key that others know or can guess; `where` names its source in the text."""
    low = key % 2**NUM_SEED_BITS
    if key == PUBLIC_KEY and allow_public_key:
        return
    if low == PUBLIC_KEY:
        raise UserError(
            f"{where} is the published default, or seeds as it does: anyone can detect and forge with it; "
            f"{HOW_TO_MAKE_ONE}, or set allow_public_key to use the published one all the same"
        )
    if not MIN_KEY <= key <= MAX_KEY:
        raise UserError(f"{where} must lie between 2**32 and 2**63 - 1; {HOW_TO_MAKE_ONE}")
    if min(low, 2**NUM_SEED_BITS - low) < MIN_DISTANCE or low % 2 ** (MAX_ZERO_BITS + 1) == 0:
        raise UserError(f"{where} is weak: its low 32 bits, which decide the lists, are easy to guess; "
                        f"{HOW_TO_MAKE_ONE}")  # fmt: skip


def read_key(
    key_env: str = KEY_ENV,
    key_file: Path | None = None,
    allow_public_key: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Secret[int]:
    """The key from a file where one is named, else from the environment variable. Raises UserError."""
    where = f"the watermark's key in {key_file or key_env}"
    text = _file_text(key_file) if key_file else (os.environ if environ is None else environ).get(key_env, "").strip()
    if not text:
        what = "is empty" if key_file else "is not set"
        raise UserError(
            f"{key_file or key_env} {what}: it holds the watermark's key; to detect, give the one that the server "
            f"marks with; for a new server {HOW_TO_MAKE_ONE}"
        )
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):  # 2**63 has 19 digits
        raise UserError(f"{where} is not a whole number of at most 19 digits; {HOW_TO_MAKE_ONE}")
    check_key(int(text), allow_public_key, where)
    return Secret[int](int(text))


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"  # the other's text quotes the content
        raise UserError(f"the watermark's key file {path} cannot be read: {reason}") from None
