"""Two runs of `minbert_multitask.py` beside each other, on the dev rows that both were measured on."""

from pathlib import Path
from typing import Any

import numpy as np

from .. import InputError
from ..data import SAMPLE, Example, read_split
from ..evaluate import read_predictions
from ..files import read_json
from ..tasks import TASKS
from .statistics import Array, compare


def dev_rows(metrics: dict[str, Any], task: str) -> list[Example]:
    """The dev rows that a run was measured on, of its `metrics.json`."""
    settings = metrics["settings"]
    data = Path(settings["data_dir"]) if settings["data_dir"] is not None else SAMPLE
    return read_split(data, TASKS[task], "dev", settings["dev_limit"]).examples


def predictions(run: Path, task: str, ids: list[str], otherwise: str) -> Array:
    """What a run predicted for these dev rows, (n,).

    Args:
        run: its folder.
        task: of which.
        ids: of the rows.
        otherwise: what to do where it was measured on others.

    Raises:
        InputError: it was.
    """
    file = run / "predictions" / f"{task}-dev-output.csv"
    pairs = read_predictions(file)
    if [row for row, _ in pairs] != ids:
        raise InputError(f"{file}: its rows are not those of the dev data; {otherwise}")
    return np.array([value for _, value in pairs])


def lines(run: Path, other: Path) -> list[str]:
    """A line a task: both main metrics, their difference, and its 95 % interval over dev rows."""
    metrics = read_json(run / "metrics.json")
    if not metrics.keys() >= {"tasks", "settings"}:
        raise InputError(f"{run / 'metrics.json'}: no metrics of a run of minbert_multitask.py")
    otherwise = f"compare runs with the same --data-dir and --dev-limit as {run}"
    found = []
    for name in metrics["tasks"]:
        task, rows = TASKS[name], dev_rows(metrics, name)
        ids, labels = [row.id for row in rows], np.array([row.label for row in rows], dtype=np.float64)
        own, reference = (predictions(each, name, ids, otherwise)[None] for each in (run, other))
        cell, beside = compare(task, own, reference, labels), compare(task, reference, None, labels)
        interval = "" if cell.interval is None else " [{:+.4f}, {:+.4f}]".format(*cell.interval)
        found.append(f"{name} {task.metric}: {cell.mean:.4f} and {beside.mean:.4f}, {cell.difference:+.4f}{interval}")
    return found
