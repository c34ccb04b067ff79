"""β, how much of the average stays at an update: what it may be, the paper's, and one by the length of the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

from smartreg._checks import whole


def paper_beta(total_steps: int) -> Callable[[int], float]:
    r"""The paper's momentum: β = 0.99 for the first tenth of the updates, 0.999 after.

    Args:
        total_steps: The number of calls of `MomentumBregman.update()` in the whole run.

    Returns:
        A function of the 0-based index of the update, for `MomentumBregman(model, beta=...)`. It can be pickled.

    Raises:
        TypeError: `total_steps` is no int.
        ValueError: `total_steps` is less than 1.

    Examples:
        >>> beta = paper_beta(30)
        >>> [beta(update) for update in (0, 2, 3, 29)]
        [0.99, 0.99, 0.999, 0.999]

    Reference:
        Jiang et al. 2020, SMART, doi 10.18653/v1/2020.acl-main.197, implementation details.
    """
    return partial(_paper_beta, total_steps=whole("total_steps", total_steps, least=1))


def suggested_beta(total_steps: int, half_life: float = 0.1) -> float:
    r"""A momentum that fits the length of the run: the half-life of the average is a share of it.

    \[ \beta = 2^{-1/\max(1, hT)} \]

    where T is the number of updates. After hT of them what the average was weighs half of it. With β = 0.99 that
    takes 69 updates, so that in a run of 80 the teacher stays about where it began.

    Args:
        total_steps: T, the number of calls of `MomentumBregman.update()` in the whole run.
        half_life: h in (0, 1], as a share of the run.

    Raises:
        TypeError: `total_steps` is no int, or `half_life` no number.
        ValueError: `total_steps` is less than 1, or `half_life` not in (0, 1].

    Examples:
        >>> round(suggested_beta(80), 3), round(suggested_beta(690), 3)
        (0.917, 0.99)
    """
    steps = whole("total_steps", total_steps, least=1)
    if isinstance(half_life, bool) or not isinstance(half_life, Real):
        raise TypeError(f"half_life must be a number in (0, 1], got {half_life!r}")
    if not 0.0 < half_life <= 1.0:
        raise ValueError(f"half_life must be in (0, 1], a share of the run, got {half_life}")
    return float(0.5 ** (1 / max(1.0, float(half_life) * steps)))


def checked_beta(beta: Any) -> float:
    """β as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It is not in [0, 1).
    """
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise TypeError(f"beta must be a number in [0, 1), or a function that returns one, got {beta!r}")
    value = float(beta)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"beta must be in [0, 1), got {value}; with 1 the teacher would never move")
    return value


def _paper_beta(update: int, total_steps: int) -> float:
    return 0.99 if 10 * update < total_steps else 0.999
