"""What the calls of this package return besides tensors: outputs with a penalty, numbers to log, a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from smartreg._ascent.verdict import ENOUGH, FELT, FLIP_LIMIT, LARGEST_WEIGHT, ROUNDING_LIMIT
from smartreg._picture import draw

_NAMES = ("penalty", "start_divergence", "ascent_gain", "max_perturbation", "bad_examples", "radius_used")


class SmartOutput(NamedTuple):
    """What a regularized forward pass returns.

    Attributes:
        outputs: What `forward` returned in the clean pass, unchanged.
        penalty: R_s(θ), a scalar in float32 at least, to be multiplied by λ_s and added to the task loss.
    """

    outputs: Any
    penalty: Tensor


@dataclass(frozen=True, repr=False)
class SmartStats:
    """Plain numbers of the last call; the device is synchronised when one is read, not before.

    Reads as attributes and as a mapping: `stats.penalty`, `stats["penalty"]`, `dict(stats)`.

    Examples:
        >>> import torch
        >>> stats = SmartStats(*map(torch.tensor, (0.5, 0.25, 0.125, 0, 1.0)))
        >>> dict(stats)["ascent_gain"]
        2.0
    """

    _penalty: Tensor
    _start_divergence: Tensor
    _max_perturbation: Tensor
    _bad_examples: Tensor
    _radius_used: Tensor

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={self[name]:.4g}" for name in self.keys())  # not a dict
        return f"{type(self).__name__}({numbers})"

    @property
    def penalty(self) -> float:
        """The penalty."""
        return float(self._penalty)

    @property
    def start_divergence(self) -> float:
        """The divergence at the starting point, before the first ascent step."""
        return float(self._start_divergence)

    @property
    def ascent_gain(self) -> float:
        """The penalty over the start divergence: what the ascent steps add, 1 without any. NaN if both are zero."""
        penalty, start = self.penalty, self.start_divergence
        return penalty / start if start else (float("nan") if penalty == 0 else float("inf"))

    @property
    def max_perturbation(self) -> float:
        """The largest absolute entry of the perturbation, in the units of the embeddings."""
        return float(self._max_perturbation)

    @property
    def bad_examples(self) -> int:
        """How many examples met an ascent gradient that was not finite, or zero, and kept their perturbation."""
        return int(self._bad_examples)

    @property
    def radius_used(self) -> float:
        """How much of the ball was used: the mean of ‖δ‖ / ε, over examples or tokens as `norm_over` says."""
        return float(self._radius_used)

    def __getitem__(self, name: str) -> float:
        if name not in _NAMES:
            raise KeyError(name)
        value: float = getattr(self, name)
        return value

    def keys(self) -> Iterator[str]:
        """The names of the numbers."""
        return iter(_NAMES)


@dataclass(frozen=True)
class Diagnosis:
    r"""One row for each ε, from small to large; see `diagnose` for how each is measured.

    Attributes:
        epsilons: ε, in the unit of `epsilon_scale`.
        penalty: R_s after the ascent.
        random_divergence: The same without ascent, for the projected noise: what `steps=0` gives with `start="noise"`.
        ascent_gain: Penalty over random divergence; NaN where both are 0.
        flips: Fraction of predictions that the perturbation changes; None where there is no class to predict.
        direction_cosine: Estimated cosine of the ascent direction with the exact one.
        rounding_share: Upper bound of the share of the penalty that is rounding.
        dropout_share: Share of the penalty that would come from dropout under `dropout="independent"`.
        epsilon_scale: `"rms"` or `"absolute"`.
        recommended: Smallest and largest ε to choose from, None if no swept ε qualifies.
        share_of_maximum: R_s over the largest divergence that a long ascent found in the same ball, at most 1: what the
            settings reach of the maximum that defines R_s, from above. None without `reference_steps`.
        lambda_s: The λ_s at which the regularizer weighs a tenth of the task loss, 0.1 L / R_s. None without a loss.
        predictions: How many predictions `flips` is a share of; None as there.
        flips_interval: The 95 % interval of each share, by Wilson's score, as if the predictions were independent.
        task_loss: The given task loss, or that of the uniform prediction, ln C; None where there is neither.
        sound: Whether the precision in use carries ε: its direction and its penalty.
        useful: Whether a λ_s of at most 100 makes the regularizer a tenth of `task_loss`; None without one.
        gentle: Whether ε is not shown to change more than a tenth of the predictions.
        default_epsilon: The default ε of `SmartLoss`; None where the unit is another.
        seconds: How long the diagnosis took.
    """

    epsilons: tuple[float, ...]
    penalty: tuple[float, ...]
    random_divergence: tuple[float, ...]
    ascent_gain: tuple[float, ...]
    flips: tuple[float, ...] | None
    direction_cosine: tuple[float, ...]
    rounding_share: tuple[float, ...]
    dropout_share: tuple[float, ...]
    epsilon_scale: str
    recommended: tuple[float, float] | None
    share_of_maximum: tuple[float, ...] | None = None
    lambda_s: tuple[float, ...] | None = None
    predictions: int | None = None
    flips_interval: tuple[tuple[float, float], ...] | None = None
    task_loss: float | None = None
    sound: tuple[bool, ...] = field(kw_only=True)
    useful: tuple[bool, ...] | None = None
    gentle: tuple[bool, ...] = field(kw_only=True)
    default_epsilon: float | None = None
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        """A table for a terminal, and what it says."""
        columns = {
            f"epsilon ({self._unit})": [f"{value:.3g}" for value in self.epsilons],
            "penalty": [f"{value:.3g}" for value in self.penalty],
            "random": [f"{value:.3g}" for value in self.random_divergence],
            "gain": [f"{value:.3g}" for value in self.ascent_gain],
            "of max": ["-" if value is None else f"{value:.0%}" for value in self._or_none(self.share_of_maximum)],
            "flips": ["-" if value is None else f"{value:.1%}" for value in self._or_none(self.flips)],
            "cosine": [f"{value:.3f}" for value in self.direction_cosine],
            "rounding": [f"{value:.2%}" for value in self.rounding_share],
            "dropout": [f"{value:.2%}" for value in self.dropout_share],
            "lambda_s": ["-" if value is None else f"{value:.2g}" for value in self._or_none(self.lambda_s)],
        }
        rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        if self.default_epsilon in self.epsilons:
            lines[1 + self.epsilons.index(self.default_epsilon)] += "  <- the default"
        return "\n".join([*lines, *self._summary()])

    @property
    def _unit(self) -> str:
        """The unit of ε in words."""
        return "x RMS" if self.epsilon_scale == "rms" else "abs."

    def _summary(self) -> Iterator[str]:
        yield (
            f"sound in this precision: {self._those(self.sound)} (cosine at least 0.9, rounding at most "
            f"{ROUNDING_LIMIT:.0%})"
        )
        if self.useful is not None:
            floor = f"{FELT / LARGEST_WEIGHT:.1%} of a loss of {self.task_loss:.3g}"
            yield (
                f"useful: {self._those(self.useful)} (penalty at least {floor}; below, not even a lambda_s of "
                f"{LARGEST_WEIGHT:.0f} makes it a tenth)"
            )
        if self.flips is None:
            yield f"the penalty grows at least as fast as epsilon: {self._those(self.gentle)}"
        else:
            yield (
                f"changes few predictions: {self._those(self.gentle)} (not shown to change more than {FLIP_LIMIT:.0%} "
                f"of {self.predictions})"
            )
            if self.predictions is not None and self.predictions < ENOUGH:
                yield (
                    f"too few predictions: of {self.predictions}, even none changed would not show that fewer than "
                    f"{FLIP_LIMIT:.0%} change; take {ENOUGH} or more"
                )
        if self.default_epsilon in self.epsilons and self.flips and self.flips_interval:
            row = self.epsilons.index(self.default_epsilon)
            low, high = self.flips_interval[row]
            yield (
                f"the default, {self.default_epsilon:g}: changes {self.flips[row]:.1%} of {self.predictions} "
                f"predictions (95 % interval {low:.1%} to {high:.1%})"
            )
        if self.recommended is None:
            yield "recommended: none of these; no epsilon is sound, useful and changes few predictions"
        else:
            low, high = self.recommended
            yield f"recommended: epsilon from {low:.3g} to {high:.3g} ({self._unit}); held-out data decides"

    def _those(self, holds: Sequence[bool]) -> str:
        """The ε for which something holds, in words."""
        chosen = [epsilon for epsilon, held in zip(self.epsilons, holds, strict=True) if held]
        if not chosen or len(chosen) == len(self.epsilons):
            return "all" if chosen else "none"
        low, high = self.epsilons.index(chosen[0]), self.epsilons.index(chosen[-1])
        if high - low + 1 > len(chosen):
            return ", ".join(f"{epsilon:.3g}" for epsilon in chosen)
        if high == len(self.epsilons) - 1:
            return f"from {chosen[0]:.3g} on"
        return f"up to {chosen[-1]:.3g}" if low == 0 else f"{chosen[0]:.3g} to {chosen[-1]:.3g}"

    def _or_none(self, values: tuple[float, ...] | None) -> Sequence[float | None]:
        return [None] * len(self.epsilons) if values is None else values

    def plot(self, axes: Sequence[Any] | None = None) -> Sequence[Any]:
        """Draw the penalty above, and the shares and changed predictions below.

        Args:
            axes: Two matplotlib `Axes`, for the upper and the lower panel; None makes a figure.

        Returns:
            The two axes.

        Raises:
            ImportError: Matplotlib is not installed.
            TypeError: `axes` is not a pair.
        """
        return draw(self, axes)
