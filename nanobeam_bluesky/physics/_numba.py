"""How the kernels of this package are compiled and spread over threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

_CHUNK = 64  # patterns that are worth a task of their own, about 2 ms


def kernel(function: F) -> F:
    """Compile `function` without the GIL, cached on disk where that is possible."""
    return _compiled(function, {"contract"})


def summing_kernel(function: F) -> F:
    """Compile like `kernel`, but sums of numbers may be taken in any order, several at a time."""
    return _compiled(function, {"contract", "reassoc", "nsz", "nnan"})


def _compiled(function: F, fastmath: set[str]) -> F:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the installation nor the user's cache folder is writable
        compiled = numba.njit(**options)(function)
    return compiled  # type: ignore[no-any-return]


def in_threads(run: Callable[[slice], object], n: int) -> None:
    """Call `run` on slices of ``range(n)``, on ``NUMBA_NUM_THREADS`` threads.

    Plain threads around kernels that release the GIL: unlike numba's own parallel loops
    they may be entered from several threads at once.
    """
    threads = min(numba.config.NUMBA_NUM_THREADS, n // _CHUNK)
    if threads < 2:
        run(slice(0, n))
        return
    size = max(_CHUNK, -(-n // (4 * threads)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [slice(i, min(i + size, n)) for i in range(0, n, size)]))
