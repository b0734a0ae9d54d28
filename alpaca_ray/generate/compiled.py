"""numba, without its effects at import: nothing is compiled or written before a function is called."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    return cast(Function, numba.njit(function))


def keep_on_disk(*functions: Callable[..., Any]) -> None:
    """Keep compiled code: in NUMBA_CACHE_DIR, else beside the source, else in the user's cache directory."""
    for function in functions:
        with suppress(RuntimeError):  # none of them can be written to: every process compiles for itself
            cast(Any, function).enable_caching()


@compiled
def popcount(x: int) -> int:
    """Number of bits set in a uint64; LLVM knows this pattern and makes it one instruction."""
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
