"""Measurements in processes of their own, side by side: memory once, time in interleaved rounds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

Spec = Mapping[str, Any]

WORKER = Path(__file__).with_name("worker.py")
# The same for every process whose memory is measured: a freed block of a megabyte or more goes back to the system at
# once, so that resident memory is what is alive and not what the allocator keeps for later. Time is measured without.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
# The opposite: freed memory is kept for the next step, so that the system need not hand out pages again.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class WorkerError(RuntimeError):
    """A worker ended instead of answering; the message is the end of what it wrote to its standard error."""


class Worker:
    """One process with one case loaded.

    Args:
        spec: what `worker.py` is told.
        environment: variables to add.
    """

    def __init__(self, spec: Spec, environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), **(environment or {})},
        )

    def ask(self, command: str) -> Any:
        """The answer to one command.

        Raises:
            WorkerError: the process ended.
        """
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise WorkerError(self._errors.read()[-2000:].strip())
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def workers(specs: Sequence[Spec], environment: Mapping[str, str] | None = None) -> Iterator[list[Worker]]:
    """A worker for each spec, all loading at the same time and ended with the block."""
    with ExitStack() as stack:
        started = [Worker(spec, environment) for spec in specs]
        for worker in started:
            stack.callback(worker.close)
        yield started


def ask_once(spec: Spec, command: str, environment: Mapping[str, str] | None = None) -> Any:
    """The answer of a process started for this command alone."""
    with workers([spec], environment) as (worker,):
        return worker.ask(command)


def compare(
    specs: Sequence[Spec],
    rounds: int,
    *,
    warm: int = 0,
    lead: int = 0,
    gauge: str | None = "peak",
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, float]]:
    """Peak memory, median time, and both as multiples of the first spec's.

    Time is taken in interleaved rounds, every spec once a round and in alternating order; `times` is the median over
    the rounds of the ratio to the first spec's time in the same round, `times_low` and `times_high` its quartiles.

    Args:
        specs: what to compare; the first is the yardstick.
        rounds: how often time is measured.
        warm: rounds before them that do not count.
        lead: calls right before each timed one, as in a loop. Memory that a process freed while others had their turn
            may have gone back to the host of a virtual machine, which a training loop never waits for.
        gauge: the command that weighs a call, `peak` or `allocated`; None leaves memory out.
        environment: variables to add for the processes whose time is taken.

    Returns:
        For each spec `seconds`, `times` and its quartiles, and with memory `bytes` and `times_bytes`.
    """
    measured: list[dict[str, float]] = [{} for _ in specs]
    if gauge:
        with workers(specs, MALLOC) as started:
            peaks = [worker.ask(gauge) for worker in started]
        for row, peak in zip(measured, peaks, strict=True):
            row |= {"bytes": peak, "times_bytes": peak / peaks[0]}
    seconds: list[list[float]] = [[] for _ in specs]
    with workers(specs, environment) as started:
        for turn in range(warm + rounds):
            order = range(len(specs))
            for index in reversed(order) if turn % 2 else order:
                for _ in range(lead):
                    started[index].ask("result")
                seconds[index].append(started[index].ask("seconds"))
    seconds = [own[warm:] for own in seconds]
    for row, own in zip(measured, seconds, strict=True):
        ratios = [a / b for a, b in zip(own, seconds[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else 3 * ratios
        row |= {"seconds": statistics.median(own), "times": middle, "times_low": low, "times_high": high}
    return measured
