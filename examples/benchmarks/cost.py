"""What the regularizers cost: every table of the documentation's page on cost, from one command.

    python examples/benchmarks/cost.py --output-dir runs/cost

Writes `cost.json`, `cost.md` and `cost.png`. Run it on an otherwise idle machine. With `--sections` and `--axes` a part
is measured alone, anew or for the first time; what else stands in the folder, measured on the same machine, stays.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from _cost.machine import describe
from _cost.measure import WorkerError
from _cost.meter import method
from _cost.report import show, write
from _cost.sections import AXES, SECTIONS, Run
from rich.console import Console

QUICK = {
    "size": "tiny",
    "main": (2, 8),
    "small": (2, 8),
    "half": (2, 8),
    "batches": (2,),
    "lengths": (8,),
    "steps": (1,),
    "logits": (64, 4096),
}
MEMORY = {"resident": "peak", "torch": "allocated"}
LEFT_OUT_OF_QUICK = ("fit", "compiled")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--output-dir", type=Path, required=True, help="folder for cost.json, cost.md and cost.png")
    made.add_argument(
        "--quick", action="store_true", help="tiny shapes, in seconds: a test of the command, no measurement"
    )
    made.add_argument("--sections", type=_sections, help=f"comma-separated, of {', '.join(SECTIONS)} (default: all)")
    made.add_argument("--axes", type=_axes, default=AXES, help=f"of the grid, any of {', '.join(AXES)} (default: all)")
    made.add_argument("--rounds", type=_count(1), help="how often each time is taken (default: 5; 2 with --quick)")
    made.add_argument(
        "--lead", type=_count(0), default=3, help="untimed steps before each timed one of the grid (default: 3)"
    )
    made.add_argument(
        "--memory", choices=MEMORY, default="resident", help="resident memory, or what torch's CPU allocator counts"
    )
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    made.add_argument("--threads", type=int, default=_cores(), help="threads on a CPU (default: its cores)")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parser().parse_args(arguments)
    console = Console()
    rounds = options.rounds or (2 if options.quick else 5)
    shapes = QUICK if options.quick else {}
    shapes = {**shapes, "axes": options.axes, "lead": options.lead}
    run = Run(options.device, options.threads, rounds, lambda text: console.log(text), MEMORY[options.memory], **shapes)
    names = options.sections or [name for name in SECTIONS if not (options.quick and name in LEFT_OUT_OF_QUICK)]
    settings = {"device": run.device, "threads": run.threads, "dtype": "float32", "model": run.size}
    settings["memory is"] = method(run.device, run.gauge)
    settings["untimed steps before each of the grid"] = run.lead
    results = earlier(options.output_dir, {"machine": describe(run.device), "settings": settings})
    # Gradients are compared first, whatever was asked for: times of modes that disagree mean nothing.
    for name in dict.fromkeys(["agreement", *names]):
        console.log(name)
        before, started = psutil.getloadavg()[0], time.monotonic()
        try:
            rows = SECTIONS[name](run)
        except WorkerError as error:
            raise SystemExit(f"{name}: a measurement failed\n{error}") from error
        kept = [row for row in results.get(name, []) if name == "grid" and row["axis"] not in options.axes]
        results[name] = sorted(kept + rows, key=_place_in_grid)
        conditions = {"rounds": rounds, "load before": round(before, 2)}
        conditions["minutes"] = round((time.monotonic() - started) / 60, 1)
        place = f"grid, {', '.join(options.axes)}" if name == "grid" else name
        others = results.get("conditions", {})
        results["conditions"] = (without_axes(others, options.axes) if name == "grid" else others) | {place: conditions}
        write(options.output_dir, results)
    show(console, results)
    for path in write(options.output_dir, results):
        console.print(f"wrote {path}")


def earlier(folder: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """What was measured in this folder before, under the same machine and settings; else `fresh`."""
    try:
        found: dict[str, Any] = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return fresh
    differing = [key for part in fresh for key, value in fresh[part].items() if found[part].get(key) != value]
    if differing:
        raise SystemExit(
            f"{folder}: holds results of another machine or other settings ({', '.join(differing)}); name another one"
        )
    return found


def without_axes(conditions: dict[str, Any], axes: Sequence[str]) -> dict[str, Any]:
    """The conditions of what is left of earlier results once these axes of the grid have been measured anew.

    >>> without_axes({"kept": 1, "grid, main, batch": 2, "grid, steps": 3}, ["main", "steps"])
    {'kept': 1, 'grid, batch': 2}
    """
    left = {}
    for place, found in conditions.items():
        section, *measured = place.split(", ")
        remaining = [axis for axis in measured if axis not in axes]
        if remaining or not measured:
            left[", ".join([section, *remaining])] = found
    return left


def _place_in_grid(row: dict[str, Any]) -> int:
    return AXES.index(row["axis"]) if "axis" in row else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(least: int) -> Callable[[str], int]:
    def count(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {value}")
        return int(value)

    return count


def _sections(value: str) -> tuple[str, ...]:
    return _chosen(value, tuple(SECTIONS))


def _axes(value: str) -> tuple[str, ...]:
    return _chosen(value, AXES)


def _chosen(value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; expected any of {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
