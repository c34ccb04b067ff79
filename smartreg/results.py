"""What the calls of this package return besides tensors: outputs with a penalty, numbers to log, a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

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
        """The divergence at the random starting point, before the first ascent step."""
        return float(self._start_divergence)

    @property
    def ascent_gain(self) -> float:
        """The penalty over the start divergence: what the ascent adds to random noise. NaN if both are zero."""
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
        random_divergence: The same without ascent, for the projected noise: what `steps=0` gives.
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

    def __str__(self) -> str:
        """A table for a terminal."""
        unit = "x RMS" if self.epsilon_scale == "rms" else "abs."
        columns = {
            f"epsilon ({unit})": [f"{value:.3g}" for value in self.epsilons],
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
        widths = {name: max(9, len(name)) for name in columns}
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths.values(), strict=True)) for row in rows]
        if self.recommended is None:
            lines.append("recommended: none of these; the perturbation is rounded away or changes too many predictions")
        else:
            low, high = self.recommended
            lines.append(f"recommended: epsilon from {low:.3g} to {high:.3g} ({unit})")
        return "\n".join(lines)

    def _or_none(self, values: tuple[float, ...] | None) -> Sequence[float | None]:
        return [None] * len(self.epsilons) if values is None else values

    def plot(self, ax: Any = None) -> Any:
        """Draw penalty and random divergence, and on a second axis the shares and the flips.

        Args:
            ax: A matplotlib `Axes`; None makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError(
                    "plot needs matplotlib, which is not installed: pip install matplotlib, or print the result, "
                    "which is a table"
                ) from error
            ax = pyplot.figure(figsize=(7.0, 4.2)).add_subplot()
        ax.loglog(self.epsilons, self.penalty, "o-", color="tab:blue", label="penalty")
        ax.loglog(self.epsilons, self.random_divergence, "o--", color="tab:cyan", label="random noise")
        ax.set_xlabel("epsilon / RMS of the embeddings" if self.epsilon_scale == "rms" else "epsilon")
        ax.set_ylabel("divergence")
        shares = ax.twinx()
        shares.set_ylim(-0.02, 1.02)
        shares.set_ylabel("share")
        shares.semilogx(self.epsilons, self.rounding_share, "^:", color="tab:red", label="rounding (at most)")
        shares.semilogx(self.epsilons, self.dropout_share, "v:", color="tab:gray", label="independent dropout")
        if self.flips is not None:
            shares.semilogx(self.epsilons, self.flips, "s:", color="tab:orange", label="changed predictions")
        if self.recommended is not None:
            ax.axvspan(*self.recommended, color="tab:green", alpha=0.12, label="recommended")
        (lines, labels), (others, names) = ax.get_legend_handles_labels(), shares.get_legend_handles_labels()
        ax.legend(lines + others, labels + names, fontsize="small", loc="center left")
        return ax
