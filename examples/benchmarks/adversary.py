"""Measure how much of the maximum that defines the regularizer each way of searching reaches, and at what cost.

    python examples/benchmarks/adversary.py --output-dir runs/adversary

writes `adversary.json`, `adversary.md` (the tables) and `adversary.png` (share against cost). The JSON is written after
every cell, and a command that is given again goes on after the last one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _adversary.case import Case
from _adversary.cells import CELLS, CHECKED, Cell, check, measure
from _adversary.figures import draw
from _adversary.reference import RESTARTS, STEPS
from _adversary.subject import SAMPLE, TASKS, Batch, Model, fit, load
from _adversary.tables import markdown

import smartreg

QUICK = {"examples": 2, "train_rows": 16, "epochs": 1, "search_steps": 2, "search_restarts": 2}
QUICK_CELLS = (CELLS[9], CELLS[12])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path, default=SAMPLE, help="folder in the CS224N layout (default: sample)")
    parser.add_argument("--output-dir", type=Path, required=True, help="where JSON, Markdown and PNG go")
    parser.add_argument("--examples", type=int, default=10, help="dev rows to measure on (default: %(default)s)")
    parser.add_argument("--train-rows", type=int, default=512, help="rows to fit to, at most (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of fitting (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="stop after this many (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two small cells, to see whether everything runs")
    options = parser.parse_args(arguments)
    for task in TASKS.values():
        if not (options.data_dir / f"{task.stem}-train.csv").is_file():
            parser.error(f"--data-dir {options.data_dir}: no {task.stem}-train.csv in it")
    sizes = {name: getattr(options, name) for name in ("examples", "train_rows", "epochs", "seed")}
    sizes |= {"search_steps": STEPS, "search_restarts": RESTARTS}
    cells: tuple[Cell, ...] = CELLS[: options.cells]
    if options.quick:
        sizes, cells = {**sizes, **QUICK}, QUICK_CELLS
    results = started(options.output_dir / "adversary.json", {**sizes, "data": options.data_dir.name})
    if results is None:
        parser.error(f"--output-dir {options.output_dir} holds results of other options: remove them or choose another")
    Study(options.data_dir, options.output_dir, results).run(cells)
    return 0


def started(file: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier command with the same options has left, or the frame for new results; None if they differ."""
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if found["options"] == options else None
    environment = {"torch": torch.__version__, "smartreg": smartreg.__version__, "machine": platform.machine()}
    return {"options": options, "environment": environment, "cells": {}}


class Study:
    """Measures what is missing, and writes after every cell."""

    def __init__(self, data_dir: Path, folder: Path, results: dict[str, Any]) -> None:
        self.data_dir, self.folder, self.results = data_dir, folder, results
        self.options = results["options"]
        self._models: dict[tuple[str, str], tuple[Model, Batch]] = {}

    def run(self, cells: tuple[Cell, ...]) -> None:
        done = self.results["cells"]
        if all(cell.key in done for cell in cells):
            print(f"{self.folder} has all {len(cells)} cells already", flush=True)
        search = {"steps": self.options["search_steps"], "restarts": self.options["search_restarts"]}
        for number, cell in enumerate(cells, 1):
            if cell.key not in done:
                done[cell.key] = measure(self._case(cell), cell, seed=self.options["seed"], **search)
                self._say(number, len(cells), cell)
        for cell in cells:
            if cell in CHECKED and "check" not in done[cell.key]:
                done[cell.key]["check"] = check(self._case(cell), cell, seed=self.options["seed"], **search)
                self._say(len(cells), len(cells), cell)
        self.folder.joinpath("adversary.md").write_text(markdown(self.results), encoding="utf-8")
        draw(self.results, self.folder / "adversary.png")

    def _case(self, cell: Cell) -> Case:
        """The model of a cell, fitted once for each head."""
        if (cell.task, cell.stage) not in self._models:
            begun, sizes = time.perf_counter(), self.options
            rows = {"rows": sizes["examples"], "train_rows": sizes["train_rows"]}
            model, train, dev = load(cell.task, self.data_dir, **rows, seed=sizes["seed"])
            if cell.stage == "end":
                fit(model, cell.task, train, epochs=sizes["epochs"], seed=sizes["seed"])
            print(f"{cell.task}, {cell.stage}: ready after {time.perf_counter() - begun:.0f} s", flush=True)
            self._models[cell.task, cell.stage] = model, dev
        model, dev = self._models[cell.task, cell.stage]
        return Case(model, dev, cell.task, train=cell.mode == "train")

    def _say(self, number: int, count: int, cell: Cell) -> None:
        found = self.results["cells"][cell.key]
        mean = sum(found["maximum"]) / len(found["maximum"])
        text = f"[{number}/{count}] {cell.key}: maximum {mean:.4g}, {found['seconds']:.0f} s"
        if "check" in found:
            longer = found["check"]["maximum"]
            text += f"; twice the steps and restarts: {sum(longer) / len(longer) / mean - 1:+.2%}"
        print(text, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / "adversary.json"
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
