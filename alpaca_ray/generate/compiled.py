"""numba, without its effects at import: nothing is compiled or written before a function is called."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba

Number = Any  # numba tells numbers apart by their numpy types, which Python's do not have
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    return cast(Function, numba.njit(function))


def keep_on_disk(*functions: Callable[..., Any]) -> None:
    """Keep compiled code: in NUMBA_CACHE_DIR, else beside the source, else in the user's cache directory."""
    for function in functions:
        with suppress(RuntimeError):  # none of them can be written to: every process compiles for itself
            cast(Any, function).enable_caching()
