"""`Diagnosis`: what each size of perturbation does to a model, as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROUNDING_LIMIT = 0.1
"""The largest share of rounding in the penalty that a recommended ε may have."""

FLIP_LIMIT = 0.1
"""The largest fraction of changed predictions that a recommended ε may cause."""


@dataclass(frozen=True)
class Diagnosis:
    r"""One row for each ε, from small to large; see `diagnose` for how each is measured.

    Attributes:
        epsilons: ε, in the unit of `epsilon_scale`.
        penalty: R_s after the ascent.
        random_divergence: the same without ascent, for the projected noise: what `steps=0` gives.
        ascent_gain: penalty over random divergence; NaN where both are 0.
        flips: fraction of predictions that the perturbation changes; None where there is no class to predict.
        direction_cosine: estimated cosine of the ascent direction with the exact one.
        rounding_share: upper bound of the share of the penalty that is rounding.
        dropout_share: share of the penalty that would come from dropout under `dropout="independent"`.
        epsilon_scale: `"rms"` or `"absolute"`.
        recommended: smallest and largest ε to choose from, None if no swept ε qualifies.
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

    def __str__(self) -> str:
        """A table for a terminal."""
        unit = "x RMS" if self.epsilon_scale == "rms" else "abs."
        head = (f"epsilon ({unit})", "penalty", "random", "gain", "flips", "cosine", "rounding", "dropout")
        lines = ["  ".join(f"{name:>{max(9, len(name))}}" for name in head)]
        for row, epsilon in enumerate(self.epsilons):
            cells = (
                f"{epsilon:.3g}",
                f"{self.penalty[row]:.3g}",
                f"{self.random_divergence[row]:.3g}",
                f"{self.ascent_gain[row]:.3g}",
                "-" if self.flips is None else f"{self.flips[row]:.1%}",
                f"{self.direction_cosine[row]:.3f}",
                f"{self.rounding_share[row]:.2%}",
                f"{self.dropout_share[row]:.2%}",
            )
            lines.append("  ".join(f"{cell:>{max(9, len(name))}}" for cell, name in zip(cells, head, strict=True)))
        if self.recommended is None:
            lines.append("recommended: none of these; the perturbation is rounded away or changes too many predictions")
        else:
            low, high = self.recommended
            lines.append(f"recommended: epsilon from {low:.3g} to {high:.3g} ({unit})")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw penalty and random divergence, and on a second axis the shares and the flips.

        Args:
            ax: a matplotlib `Axes`; None makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
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


def recommended_range(
    epsilons: tuple[float, ...],
    direction_cosine: tuple[float, ...],
    rounding_share: tuple[float, ...],
    flips: tuple[float, ...] | None,
    penalty: tuple[float, ...],
    required_cosine: float,
) -> tuple[float, float] | None:
    """The swept ε to choose from.

    From below: the direction has the required cosine, and rounding is at most `ROUNDING_LIMIT` of the penalty. From
    above: no more than `FLIP_LIMIT` of the predictions change; where there are none to change, the penalty still grows
    at least linearly with ε (it is quadratic as long as the model is smooth at that scale).

    Example:
        >>> recommended_range((0.01, 0.1, 1.0), (0.2, 0.99, 1.0), (0.9, 0.02, 0.0), (0.0, 0.05, 0.5), (1, 2, 3), 0.9)
        (0.1, 0.1)
    """
    chosen = []
    for row, epsilon in enumerate(epsilons):
        if direction_cosine[row] < required_cosine or rounding_share[row] > ROUNDING_LIMIT:
            continue
        if flips is not None:
            gentle = flips[row] <= FLIP_LIMIT
        else:
            gentle = row == 0 or penalty[row] / epsilon >= penalty[row - 1] / epsilons[row - 1]
        if not gentle:
            break
        chosen.append(epsilon)
    return (chosen[0], chosen[-1]) if chosen else None
