r"""What `diagnose` makes of its measurements: three questions to each ε, and the ε for which all answers are yes.

- Is it *sound*: does the precision in use carry it, direction and value?
- Is it *useful*: is the penalty large enough for a weight \(\lambda_s\) of ordinary size to make it felt?
- Is it *gentle*: do few predictions change? A share over n predictions is known up to an interval alone, so that an ε
  counts as too large when the whole interval lies above the limit, and not when one prediction of eight has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from smartreg._ascent.precision import REQUIRED_COSINE

ROUNDING_LIMIT = 0.1
"""The largest share of rounding in the penalty of a sound ε."""

FLIP_LIMIT = 0.1
"""The largest share of changed predictions of a gentle ε. A convention: what a task bears has to be tried."""

FELT = 0.1
"""The share of the task loss at which a regularizer is felt and does not take over; it defines `lambda_s`."""

LARGEST_WEIGHT = 100.0
"""The largest λ_s that is taken for ordinary; a penalty that needs more of it to be felt is not useful."""

_Z = 1.959964  # of a 95 % interval


def wilson(share: float, n: int) -> tuple[float, float]:
    r"""The 95 % interval of a share that was seen among n, by Wilson's score (as if the n were independent).

    \[ \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n} \]

    Unlike \(p \pm z\sqrt{p(1-p)/n}\) it has a width at p = 0, and stays in [0, 1].

    Examples:
        >>> [round(end, 3) for end in wilson(1 / 8, 8)]
        [0.022, 0.471]

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
    """
    if not n:
        return 0.0, 1.0
    centre = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1.0 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + _Z**2 / n)), min(1.0, (centre + half) / (1 + _Z**2 / n))


ENOUGH = math.ceil(_Z**2 * (1.0 - FLIP_LIMIT) / FLIP_LIMIT)
"""From so many predictions on, none changed shows (by `wilson`) that fewer than `FLIP_LIMIT` change."""


def is_sound(cosine: float, rounding: float) -> bool:
    """Whether the precision carries the direction and the value."""
    return cosine >= REQUIRED_COSINE and rounding <= ROUNDING_LIMIT


def is_useful(penalty: float, task_loss: float) -> bool:
    """Whether λ_s ≤ `LARGEST_WEIGHT` makes the penalty `FELT` of the task loss: from a thousandth of it on."""
    return penalty * LARGEST_WEIGHT >= FELT * task_loss


def gentle(
    intervals: Sequence[tuple[float, float]] | None, epsilons: Sequence[float], penalty: Sequence[float]
) -> tuple[bool, ...]:
    """For each ε, from small to large, whether it is not shown to change more than `FLIP_LIMIT` of the predictions.

    Where there is no prediction to change, the penalty must still grow at least linearly with ε (it is quadratic as
    long as the model is smooth at that scale).
    """
    if intervals is not None:
        return tuple(low <= FLIP_LIMIT for low, _ in intervals)
    slopes = [p / epsilon for p, epsilon in zip(penalty, epsilons, strict=True)]
    return tuple(slope >= before for slope, before in zip(slopes, [slopes[0], *slopes], strict=False))


def recommended_range(
    epsilons: Sequence[float], fit: Sequence[bool], gentle: Sequence[bool]
) -> tuple[float, float] | None:
    """The smallest and largest ε that are fit (sound and useful), up to the first such one that is not gentle.

    Examples:
        >>> recommended_range((0.01, 0.1, 0.3, 1.0), (False, True, True, True), (True, True, True, False))
        (0.1, 0.3)
    """
    chosen = []
    for epsilon, fits, soft in zip(epsilons, fit, gentle, strict=True):
        if not fits:
            continue
        if not soft:
            break
        chosen.append(epsilon)
    return (chosen[0], chosen[-1]) if chosen else None
