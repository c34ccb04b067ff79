"""The cells of the study, from the most telling to the least, and what is measured in each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .case import Case
from .reference import RESTARTS, STEPS, maximum
from .rules import BACKWARD_TO_INPUT, FORWARD, RULES


@dataclass(frozen=True)
class Cell:
    """A head before or after fitting, with or without dropout, and a ball around its embeddings.

    Attributes:
        main: Every rule with all its steps, and not only up to one.
    """

    task: str
    stage: str
    mode: str
    norm: str
    over: str
    epsilon: float
    main: bool = False

    @property
    def key(self) -> str:
        return f"{self.task}/{self.stage}/{self.mode}/{self.norm}/{self.over}/{self.epsilon:g}"


TASK_NAMES = ("sentiment", "paraphrase", "similarity")
CELLS = (
    Cell("sentiment", "end", "eval", "inf", "example", 0.15, main=True),
    Cell("sentiment", "end", "eval", "2", "example", 0.15, main=True),
    Cell("paraphrase", "end", "eval", "inf", "example", 0.15, main=True),
    Cell("similarity", "end", "eval", "inf", "example", 0.15, main=True),
    Cell("sentiment", "end", "eval", "inf", "example", 0.05),
    Cell("sentiment", "end", "eval", "inf", "example", 0.5),
    Cell("sentiment", "end", "train", "inf", "example", 0.15),
    Cell("sentiment", "start", "eval", "inf", "example", 0.15),
    Cell("paraphrase", "end", "train", "inf", "example", 0.15),
    Cell("paraphrase", "start", "eval", "inf", "example", 0.15),
    Cell("similarity", "end", "train", "inf", "example", 0.15),
    Cell("similarity", "start", "eval", "inf", "example", 0.15),
    Cell("sentiment", "end", "eval", "2", "example", 0.05),
    Cell("sentiment", "end", "eval", "2", "example", 0.5),
    Cell("sentiment", "end", "eval", "2", "token", 0.15),
    Cell("sentiment", "end", "eval", "inf", "token", 0.15),
    Cell("paraphrase", "end", "eval", "2", "example", 0.15),
    Cell("similarity", "end", "eval", "2", "example", 0.15),
    Cell("sentiment", "start", "train", "inf", "example", 0.15),
    Cell("paraphrase", "end", "eval", "inf", "example", 0.05),
    Cell("paraphrase", "end", "eval", "inf", "example", 0.5),
    Cell("similarity", "end", "eval", "inf", "example", 0.05),
    Cell("similarity", "end", "eval", "inf", "example", 0.5),
)
CHECKED = (CELLS[0], CELLS[2])  # where the search for the maximum is repeated with twice the steps and restarts


def measure(case: Case, cell: Cell, *, seed: int, steps: int = STEPS, restarts: int = RESTARTS) -> dict[str, Any]:
    """The maximum of each example and what each rule reaches of it."""
    begun = time.perf_counter()
    balls = case.balls(cell.norm, cell.over, cell.epsilon)
    best = maximum(case.run, balls, case.kind, seed=seed, steps=steps, restarts=restarts)
    rows = [
        {"rule": name, "steps": count, "cost": round(cost, 2), "reached": _numbers(values)}
        for name, count, cost, values in _rules(case, cell, seed)
    ]
    return {"maximum": _numbers(best), "rules": rows, "seconds": round(time.perf_counter() - begun, 1)}


def check(case: Case, cell: Cell, *, seed: int, steps: int = STEPS, restarts: int = RESTARTS) -> dict[str, Any]:
    """The same maximum by a search of twice the steps from twice the starts."""
    balls = case.balls(cell.norm, cell.over, cell.epsilon)
    longer = maximum(case.run, balls, case.kind, seed=seed + 1, steps=2 * steps, restarts=2 * restarts)
    return {"steps": 2 * steps, "restarts": 2 * restarts, "maximum": _numbers(longer)}


def _rules(case: Case, cell: Cell, seed: int) -> Iterator[tuple[str, int, float, Tensor]]:
    for rule in RULES:
        if rule.suits(cell.norm, case.kind) and (cell.main or not rule.tried):
            for count in rule.steps if cell.main else [k for k in rule.steps if k <= 1]:
                reached = case.reached(rule, cell.norm, cell.over, cell.epsilon, count, seed)
                yield rule.name, count, rule.cost(count), reached
    if cell.norm == "2":
        for count in (1, 2, 3) if cell.main else (1,):
            cost = 2.0 + count * (FORWARD + BACKWARD_TO_INPUT)
            yield "VAT's power iteration", count, cost, case.power_iteration(cell.over, cell.epsilon, count, seed)
        if cell.over == "example":
            for name, values in case.packages(cell.epsilon, seed).items():
                yield name, 1, 2.0 + FORWARD + BACKWARD_TO_INPUT, values


def _numbers(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
