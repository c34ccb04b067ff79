"""Intervals of the difference of two arms over seeds and rows, and what many comparisons do to them.

Both arms have the same seeds (rows trained on, order, start) and the same held-out rows, so it is differences by seed
and row that are resampled: seeds with replacement and, crossed with them, rows. The bootstrap's variance is corrected
for what few seeds take from it, by n / (n − 1), and the interval is Student's, with the degrees of freedom that Welch
and Satterthwaite give a sum of a part from seeds and a part from rows: with five seeds a plain percentile interval
of seeds alone holds the truth in 85 of 100 cases, not in 95.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """A mean difference of two arms.

    Attributes:
        mean: own minus other.
        low, high: the interval.
        p: two-sided probability of as large a difference where there is none.
        seeds, rows: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    rows: int


def difference(own: Array, other: Array, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Difference:
    """The paired difference of two arms.

    Args:
        own: a number for each seed and row, (seeds, rows), whose mean is the metric; (seeds, 1) for a metric of whole
            runs, such as a calibration error.
        other: of the other arm, in the same order.
        level: of the interval.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes differ, or there are fewer than two seeds.
    """
    if own.shape != other.shape or own.ndim != 2:
        raise ValueError(f"own, other: expected one shape (seeds, rows), got {own.shape} and {other.shape}")
    seeds, rows = own.shape
    if seeds < 2:
        raise ValueError(f"own: expected two seeds or more, got {seeds}; one seed has no interval over seeds")
    gaps = own - other
    draw = np.random.default_rng(seed)
    # How often each row and each seed is drawn; a resample's mean is then a product.
    row_counts = draw.multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    seed_counts = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    means = (row_counts @ gaps.T * seed_counts).sum(1)
    from_seeds = float(gaps.mean(1).var()) / seeds
    variance = float(means.var()) + from_seeds / (seeds - 1)
    from_seeds *= seeds / (seeds - 1)
    mean = float(gaps.mean())
    if variance < 1e-24:  # the same in every seed and row
        return Difference(mean, mean, mean, float(abs(mean) < 1e-12), seeds, rows)
    from_rows = max(variance - from_seeds, 0.0)
    freedom = variance**2 / (from_seeds**2 / (seeds - 1) + from_rows**2 / max(rows - 1, 1))
    half = float(stats.t.ppf(0.5 + level / 2, freedom)) * variance**0.5
    p = 2 * float(stats.t.sf(abs(mean) / variance**0.5, freedom))
    return Difference(mean, mean - half, mean + half, p, seeds, rows)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's adjusted p-values: below a level, a comparison stands among all of them at that level.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}

    Reference:
        Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted
