"""The largest batch whose step fits a fixed memory limit, found by bisection with a process for each try."""

from __future__ import annotations

from collections.abc import Callable

from .measure import MALLOC, Spec, WorkerError, ask_once

# What a worker says when memory ran out, and not something else.
SIGNS = (
    "can't allocate memory",
    "out of memory",
    "OutOfMemory",
    "MemoryError",
    "bad_alloc",
    "could not create a primitive",
)


def largest_batch(spec: Spec, limit: int, start: int) -> int:
    """The largest batch that fits.

    Args:
        spec: what `worker.py` is told, without `batch`.
        limit: bytes of address space (`RLIMIT_AS`) on a CPU, of GPU memory on a GPU, everything counted.
        start: the first batch to try.

    Raises:
        WorkerError: a try failed for another reason than memory.
    """
    return bisect(lambda batch: _fits({**spec, "batch": batch, "limit": limit}), start)


def bisect(fits: Callable[[int], bool], start: int) -> int:
    """The largest n with `fits(n)`, for a `fits` that is true up to somewhere and false from there on; 0 if none."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(spec: Spec) -> bool:
    try:
        ask_once(spec, "peak", MALLOC)
    except WorkerError as error:
        if any(sign in str(error) for sign in SIGNS):
            return False
        raise
    return True
