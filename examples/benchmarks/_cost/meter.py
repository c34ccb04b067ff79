"""The clock and the memory gauge of one process: wall time and resident memory on a CPU, torch's own on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")


class Meter:
    """Times and weighs one call at a time.

    Args:
        device: `cpu` or `cuda`.
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        """How long `call` takes: by CUDA events on a GPU, by the wall clock on a CPU."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """How far memory rises during `call` above what was in use before."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        _trim()
        before = _status("VmRSS")
        _reset_peak()
        call()
        return _status("VmHWM") - before


def allocated_peak_bytes(call: Callable[[], object]) -> int:
    """The same as torch's allocator counts it on a CPU: every allocation and release during `call`, in order."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def method(device: str, gauge: str) -> str:
    """How memory is measured here, in words."""
    if gauge == "allocated":
        return "allocations of torch's CPU allocator, from the profiler"
    if torch.device(device).type == "cuda":
        return "torch.cuda.max_memory_allocated"
    return "VmHWM of /proc/self/status, reset after loading" if CLEAR_REFS.exists() else "ru_maxrss of a fresh process"


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    with contextlib.suppress(FileNotFoundError):
        CLEAR_REFS.write_text("5")


def _trim() -> None:
    """Freed memory goes back to the system, so that it does not hide in the starting level."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
