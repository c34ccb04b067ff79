"""What of a stage is compared: the columns of a task, and the runs of its arms, matched by their seeds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import InputError
from ..tasks import TASKS
from .record import Record, unpacked
from .stages import Stage

REFERENCE = "t-vanilla"
"""What every arm is compared with."""
Array = NDArray[np.float64]


class Measure(NamedTuple):
    """A column: its title, whether less is better, and its numbers in a judged model's record, (rows,) or (1,)."""

    title: str
    less: bool
    of: Callable[[dict[str, Any]], Array]


def _by_row(name: str) -> Callable[[dict[str, Any]], Array]:
    """By row where the record has that, which is after the last epoch; else the number of the run."""
    return lambda held: unpacked(held["by_row"][name]) if "by_row" in held else np.array([held[name]])


def _scalar(name: str) -> Callable[[dict[str, Any]], Array]:
    return lambda held: np.array([held[name]])


def measures(task: str) -> list[Measure]:
    """The columns of a task. The first two are those that claims are made of."""
    name = TASKS[task].metric
    columns = [
        Measure(name, False, _by_row(name)),
        Measure("NLL", True, _by_row("nll")),
        Measure("NLL, scaled", True, _scalar("nll_scaled")),
    ]
    if TASKS[task].kind != "score":
        columns += [Measure("ECE", True, _scalar("ece")), Measure("ECE, scaled", True, _scalar("ece_scaled"))]
    return columns


def paired(stage: Stage, records: Sequence[Record]) -> tuple[dict[str, list[Record]], list[int]]:
    """The runs of each arm by the seeds that all arms have.

    An arm without any run, and a seed that some arm still lacks, are left out while the stage is in the making.

    Raises:
        InputError: the reference has no run yet, or no two seeds are complete.
    """
    runs = _by_seed(stage, records)
    seeds = _shared(runs)
    if not complete(stage, records):
        raise InputError(f"expected two seeds or more with all arms, {REFERENCE} among them; got {len(seeds)}")
    return {arm: [found[seed] for seed in seeds] for arm, found in runs.items()}, seeds


def complete(stage: Stage, records: Sequence[Record]) -> bool:
    """Whether a comparison can be made: the reference has run, and all arms on two seeds or more."""
    runs = _by_seed(stage, records)
    return REFERENCE in runs and len(runs) > 1 and len(_shared(runs)) >= 2


def _by_seed(stage: Stage, records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    runs = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in stage.arms}
    return {arm: found for arm, found in runs.items() if found}


def _shared(runs: dict[str, dict[int, Record]]) -> list[int]:
    return sorted(set.intersection(*(set(found) for found in runs.values()))) if runs else []


def matrix(runs: Sequence[Record], task: str, moment: str, measure: Measure) -> Array:
    """A measure by seed and row, (seeds, rows)."""
    return np.stack([measure.of(run[moment][task]["held_out"]) for run in runs])


def cost(runs: Sequence[Record], reference: Sequence[Record]) -> float:
    """CPU time of an arm's training over the reference's, the median over seeds of the ratio."""
    times = [[run["cpu_seconds_a_step"] * run["steps"] for run in each] for each in (runs, reference)]
    return float(np.median(np.array(times[0]) / np.array(times[1])))
