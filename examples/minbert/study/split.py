"""Which rows a run trains on, is tuned on, and is judged on.

Three parts that never meet: rows of train that no arm trains on, fixed once, by which arms are judged; the rest of
train, of which a seed draws its training rows; and dev, by which settings are chosen.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .. import InputError
from ..data import Split, read_split
from ..objective import seed_of
from ..tasks import TASKS

HELD_OUT = {"sst": 3000, "para": 3000, "sts": 2000}
DEV = 600
"""Rows of dev that settings are chosen on: all arms on the same."""


class Parts(NamedTuple):
    """The three parts of a task's rows."""

    train: Split
    dev: Split
    held_out: Split


def parts(folder: Path, task: str, rows: int | None, seed: int, held_out: int | None = None) -> Parts:
    """The rows of a run.

    Args:
        folder: the data folder.
        task: which task.
        rows: training rows to draw; None takes all that are not held out. A smaller draw is part of a larger one.
        seed: of the run; the same for all arms, so that a seed's runs differ in the arm alone.
        held_out: rows held out, `HELD_OUT` if None (tests have fewer).

    Raises:
        InputError: there are not as many.
    """
    everything = read_split(folder, TASKS[task], "train")
    count = len(everything.examples)
    reserved = HELD_OUT[task] if held_out is None else held_out
    order = random.Random(seed_of("held out", task)).sample(range(count), count)
    kept, pool = order[:reserved], order[reserved:]
    wanted = len(pool) if rows is None else rows
    if not 0 < wanted <= len(pool):
        raise InputError(f"rows: expected 1 to {len(pool)} of {task}, where {reserved} of {count} are kept, got {rows}")
    drawn = random.Random(seed_of("training", task, seed)).sample(pool, len(pool))[:wanted]  # so that draws are nested
    return Parts(chosen(everything, drawn), read_split(folder, TASKS[task], "dev", DEV), chosen(everything, kept))


def chosen(split: Split, rows: list[int]) -> Split:
    """Some rows of a split, in the order given: that of the SST file goes with the label."""
    return replace(split, examples=[split.examples[row] for row in rows])
