"""What is measured: one function for each table, from the settings of the run to rows of numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .cases import averages, divergence
from .cases.variants import ALL, EFFICIENT, PEER, PLAIN, STANDARD
from .fit import largest_batch
from .measure import KEEP, ask_once, compare

UNIFORM = "towards_uniform"
AXES = ("main", "batch", "length", "steps")

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """The settings of one run.

    Attributes:
        device, threads, rounds: where, with how many threads, and how often time is taken.
        size: which model.
        main: batch and length of the shape that the claims are about.
        small: batch and length of a shape for what need not be as large.
        half: the same for half precision, which a CPU without instructions for it computes slowly.
        batches, lengths, steps: the values along which cost is followed.
        logits: rows and classes of the divergence.
        limit: bytes in which the largest batch must fit; 0 leaves the table out.
        say: where progress is told.
        gauge: how memory is weighed, `peak` or `allocated`.
        axes: which parts of the grid to measure.
        lead: steps before each timed one of the grid. The C library learns from the first few which freed memory to
            keep, and what went back to the system while the others had their turn is asked for again: a training loop
            has both behind it.
    """

    device: str
    threads: int
    rounds: int
    say: Say
    gauge: str = "peak"
    size: str = "small"
    main: tuple[int, int] = (32, 128)
    small: tuple[int, int] = (8, 128)
    half: tuple[int, int] = (4, 32)
    batches: tuple[int, ...] = (8, 16, 32, 64)
    lengths: tuple[int, ...] = (32, 64, 128, 256)
    steps: tuple[int, ...] = (1, 2, 3)
    logits: tuple[int, int] = (2048, 32000)
    limit: int = 2 * 2**30
    fit_length: int = 32
    axes: tuple[str, ...] = AXES
    lead: int = 3
    shared: Row = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", {"device": self.device, "threads": self.threads, "size": self.size})

    def spec(self, case: str, shape: tuple[int, int], steps: int = 1, **more: Any) -> Row:
        """What a worker is told."""
        return {"case": case, "batch": shape[0], "length": shape[1], "steps": steps, **self.shared, **more}

    def shapes(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """The main shape, and then along batch (short sentences), length (few sentences) and ascent steps."""
        along = {
            "main": [(self.main, 1)],
            "batch": [((batch, min(self.lengths)), 1) for batch in self.batches],
            "length": [((min(self.batches), length), 1) for length in self.lengths],
            "steps": [(self.small, steps) for steps in self.steps],
        }
        for axis in self.axes:
            for shape, steps in along[axis]:
                yield axis, shape, steps


def agreement(run: Run) -> list[Row]:
    """Largest difference between the gradients of the modes; an error where it is too large."""
    shape = (min(4, run.main[0]), min(32, run.main[1]))
    differences = ask_once(run.spec("agreement", shape), "result")
    return [{"compared": what, "difference": difference} for what, difference in differences.items()]


def grid(run: Run) -> list[Row]:
    """Time, memory and arithmetic of every variant, for every shape."""
    rows, known, counted = [], {}, {}
    for axis, shape, steps in run.shapes():
        key = (shape, steps)
        if key not in known:
            run.say(f"batch {shape[0]}, length {shape[1]}, steps {steps}")
            specs = [run.spec("variants", shape, steps, variant=name) for name in ALL]
            known[key] = compare(specs, run.rounds, gauge=run.gauge, lead=run.lead)
        if (shape[1], steps) not in counted:
            counted[shape[1], steps] = ask_once(run.spec("flops", shape, steps), "result")
        flops = counted[shape[1], steps]
        for name, measured in zip(ALL, known[key], strict=True):
            place = {"axis": axis, "batch": shape[0], "length": shape[1], "steps": steps, "variant": name}
            rows.append({**place, **measured, "times_flops": flops[name] / flops[PLAIN]})
    return rows


def kept(run: Run) -> list[Row]:
    """The time of the main shape once more, in processes that keep freed memory for their next step."""
    if run.device != "cpu":
        return []  # torch's allocator of a GPU always does
    measured = compare(
        [run.spec("variants", run.main, variant=n) for n in ALL], run.rounds, gauge=None, environment=KEEP, warm=1
    )
    return [{"variant": name, **row} for name, row in zip(ALL, measured, strict=True)]


def searches(run: Run) -> list[Row]:
    """Time, memory and arithmetic of the library's ways to search, at the main shape, in one comparison."""
    ways = [(PLAIN, "none", 0, {}), (STANDARD, "Algorithm 1", 1, {}), (EFFICIENT, "Algorithm 1", 1, {})]
    for steps in (0, 1):
        ways += [(mode, UNIFORM, steps, {"start": UNIFORM}) for mode in (STANDARD, EFFICIENT)]
    ways.append((PEER, "its own", 1, {}))
    specs = [run.spec("variants", run.main, steps, variant=name, **start) for name, _, steps, start in ways]
    rows = []
    for (name, search, steps, start), measured in zip(
        ways, compare(specs, run.rounds, gauge=run.gauge, lead=run.lead), strict=True
    ):
        flops = ask_once(run.spec("flops", run.main, steps, **start), "result")
        place = {"variant": name, "search": search, "steps": steps}
        rows.append({**place, **measured, "times_flops": flops[name] / flops[PLAIN]})
    return rows


def fit(run: Run) -> list[Row]:
    """The largest batch within the memory limit."""
    found = {}
    for name in ALL:
        run.say(f"largest batch: {name}")
        spec = run.spec("variants", (0, run.fit_length), variant=name)
        found[name] = largest_batch(spec, run.limit, start=run.main[0])
    return [
        {"variant": n, "length": run.fit_length, "batch": b, "limit": run.limit, "times": b / max(1, found[PEER])}
        for n, b in found.items()
    ]


def divergences(run: Run) -> list[Row]:
    """Forward and backward of the divergence, against the usual form."""
    names = (divergence.USUAL, divergence.FORMULA, divergence.OURS)
    shape = {"rows": run.logits[0], "classes": run.logits[1]}
    specs = [{"case": "divergence", **run.shared, **shape, "variant": name} for name in names]
    measured = compare(specs, run.rounds, warm=1, gauge=run.gauge)
    return [
        {"form": name, **shape, **row, "speedup": 1 / row["times"]} for name, row in zip(names, measured, strict=True)
    ]


def moving_averages(run: Run) -> list[Row]:
    """One update of the average of all parameters, against one flat `torch.lerp`."""
    names = (averages.FLAT, averages.OURS, *averages.OTHERS)
    specs = [run.spec("averages", (1, 8), variant=name) for name in names]
    measured = compare(specs, 5 * run.rounds, warm=2, gauge=run.gauge)
    return [
        {"average": name, **row, "seconds": row["seconds"] / averages.REPEATS}
        for name, row in zip(names, measured, strict=True)
    ]


def amortised(run: Run) -> list[Row]:
    """The penalty on every k-th step alone, times k: cost of a step, averaged over k."""
    periods = (1, 2, 4)
    specs = [run.spec("variants", run.small, variant=PLAIN)]
    specs += [run.spec("variants", run.small, variant=STANDARD, every=k) for k in periods]
    plain, *measured = compare(specs, run.rounds, gauge=None)
    rows = [{"every": 0, "seconds": plain["seconds"], "times": 1.0}]
    return rows + [
        {"every": k, "seconds": row["seconds"] / k, "times": row["times"] / k}
        for k, row in zip(periods, measured, strict=True)
    ]


def compiled(run: Run) -> list[Row]:
    """The model under `torch.compile`, against the same step without."""
    if shutil.which("g++") is None and shutil.which("clang++") is None and run.device == "cpu":
        run.say("compiled: left out, torch.compile needs a C++ compiler")
        return []
    names = (PLAIN, STANDARD, EFFICIENT)
    specs = [
        run.spec("variants", run.small, variant=name, compiled=is_compiled)
        for name in names
        for is_compiled in (False, True)
    ]
    measured = compare(specs, run.rounds, warm=2, gauge=None)
    rows = []
    for index, name in enumerate(names):
        eager, fast = measured[2 * index : 2 * index + 2]
        rows.append(
            {
                "variant": name,
                "eager": eager["seconds"],
                "compiled": fast["seconds"],
                "speedup": eager["seconds"] / fast["seconds"],
                "times": fast["seconds"] / measured[1]["seconds"],
            }
        )
    return rows


def half_precision(run: Run) -> list[Row]:
    """What `ascent_autocast=False` costs under bfloat16 autocast."""
    choices = [(PLAIN, True), (STANDARD, True), (STANDARD, False)]
    specs = [run.spec("variants", run.half, variant=n, autocast=True, ascent_autocast=a) for n, a in choices]
    measured = compare(specs, run.rounds, warm=1, gauge=None)
    return [
        {"variant": n, "ascent": "bfloat16" if a else "float32", **row}
        for (n, a), row in zip(choices, measured, strict=True)
    ]


def where_time_goes(run: Run) -> list[Row]:
    """Self time by kind of operation, of the variants side by side."""
    found = {n: ask_once(run.spec("where_time_goes", run.small, variant=n), "result") for n in ALL}
    return [{"kind": kind, **{name: found[name].get(kind, 0.0) for name in ALL}} for kind in found[PLAIN]]


SECTIONS: dict[str, Callable[[Run], list[Row]]] = {
    "agreement": agreement,
    "grid": grid,
    "searches": searches,
    "kept": kept,
    "fit": fit,
    "divergences": divergences,
    "averages": moving_averages,
    "amortised": amortised,
    "compiled": compiled,
    "half": half_precision,
    "where": where_time_goes,
}
