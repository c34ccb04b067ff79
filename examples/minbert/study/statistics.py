"""Means over seeds, and paired bootstrap intervals of the difference from a reference configuration."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tasks import Task

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One configuration, mode and task, over the seeds.

    Attributes:
        mean, std: of the dev metric over seeds (std with n − 1; None for one seed).
        seeds: how many.
        difference: mean minus the reference's mean.
        interval: 95 % bootstrap interval of the difference, or None for the reference itself.
    """

    mean: float
    std: float | None
    seeds: int
    difference: float | None = None
    interval: tuple[float, float] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cell":
        """The cell of a JSON object."""
        return cls(**values | {"interval": values["interval"] and tuple(values["interval"])})

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {name: _or_none(value) for name, value in asdict(self).items()}


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def metric(task: Task, predictions: Array, labels: Array) -> Array:
    """Accuracy or Pearson along the last axis; 0 where predictions are constant, NaN where labels are.

    Args:
        task: which task.
        predictions: (..., n).
        labels: (..., n).
    """
    if task.kind != "score":
        return np.asarray((predictions == labels).mean(-1), dtype=np.float64)
    p = predictions - predictions.mean(-1, keepdims=True)
    q = labels - labels.mean(-1, keepdims=True)
    products, spread, label_spread = (p * q).sum(-1), (p * p).sum(-1), (q * q).sum(-1)
    size = np.sqrt(spread * label_spread)
    correlation = np.divide(products, size, out=np.zeros_like(products), where=size > 0)
    return np.where(label_spread > 0, correlation, np.nan)


def compare(
    task: Task, own: Array, reference: Array | None, labels: Array, *, resamples: int = 2000, seed: int = 0
) -> Cell:
    """Summarises one configuration against the reference.

    Each bootstrap sample draws dev rows and seeds with replacement, the same for both configurations: the rows are the
    same questions, and a seed is the same start and order of the data. The interval has the percentiles of these, and
    so is there for one seed too, over rows alone; with few seeds it is too narrow for what another seed would give,
    which `bootstrap.py`, for the claims of docs/study.md, corrects.

    Args:
        task: which task.
        own: predictions, (seeds, n).
        reference: predictions of the reference configuration, (seeds, n), or None if this is the reference.
        labels: (n,).
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        The cell.
    """
    scores = metric(task, own, labels)
    mean = float(scores.mean())
    std = float(scores.std(ddof=1)) if len(scores) > 1 else None
    if reference is None:
        return Cell(mean, std, len(scores))
    difference = mean - float(metric(task, reference, labels).mean())
    draw = np.random.default_rng(seed)
    count, rows = own.shape
    differences = np.empty(resamples)
    for i in range(resamples):
        seeds = draw.integers(count, size=count)
        picked = draw.integers(rows, size=rows)
        ours = metric(task, own[seeds][:, picked], labels[picked])
        theirs = metric(task, reference[seeds][:, picked], labels[picked])
        differences[i] = ours.mean() - theirs.mean()
    low, high = np.nanquantile(differences, [0.025, 0.975])
    interval = None if math.isnan(low) else (float(low), float(high))
    return Cell(mean, std, len(scores), difference, interval)
