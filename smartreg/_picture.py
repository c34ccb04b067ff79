"""The picture of a diagnosis: two panels above each other, that share ε. Matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smartreg._ascent.verdict import FELT, FLIP_LIMIT, LARGEST_WEIGHT

# Told apart by marker, dash and lightness, so that the picture needs no colour. The colours are Okabe and Ito's, which
# people with a colour vision deficiency can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.45"


def draw(found: Any, axes: Sequence[Any] | None) -> Sequence[Any]:
    """Draw a `Diagnosis` (whose file imports this one, so that the type stays away).

    Args:
        found: The diagnosis.
        axes: The upper and the lower panel, None for a new figure.

    Returns:
        The two panels.
    """
    upper, lower = _new_panels() if axes is None else _pair(axes)
    _penalties(upper, found)
    _shares(lower, found)
    for panel in (upper, lower):
        if found.recommended is not None:
            low, high = found.recommended
            panel.axvspan(low, high, color=GREEN, alpha=0.12, linewidth=0, label="recommended")
        if found.default_epsilon is not None:
            panel.axvline(found.default_epsilon, color="0.2", linewidth=1, linestyle=(0, (1, 2)), label="the default")
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    # Above the panels, where no curve can be.
    above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False, "fontsize": "small"}
    upper.legend(ncols=2, **above)
    lower.legend(*_without_repeats(lower, upper), **above)
    return upper, lower


def _penalties(panel: Any, found: Any) -> None:
    panel.loglog(found.epsilons, found.penalty, "o-", color=BLUE, label="penalty")
    panel.loglog(found.epsilons, found.random_divergence, "s--", color=GREY, label="random noise")
    if found.task_loss is not None:
        floor = FELT / LARGEST_WEIGHT * found.task_loss
        panel.axhline(floor, color=BLUE, linewidth=1, linestyle="-.", label="useful from here on")
    panel.set_ylabel("divergence")


def _shares(panel: Any, found: Any) -> None:
    if found.flips is not None:
        if found.flips_interval is not None:
            low, high = zip(*found.flips_interval, strict=True)
            panel.fill_between(found.epsilons, low, high, color=ORANGE, alpha=0.2, linewidth=0)
        panel.semilogx(found.epsilons, found.flips, "s-", color=ORANGE, label="changed predictions, 95 % interval")
        panel.axhline(FLIP_LIMIT, color=ORANGE, linewidth=1, linestyle="-.")
    panel.semilogx(found.epsilons, found.rounding_share, "^--", color="0.2", label="rounding in the penalty (at most)")
    panel.semilogx(found.epsilons, found.dropout_share, "v:", color=GREY, label="other dropout masks would add")
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("share")
    panel.set_xlabel("ε / RMS of the embeddings" if found.epsilon_scale == "rms" else "ε")


def _without_repeats(panel: Any, other: Any) -> tuple[list[Any], list[str]]:
    known = other.get_legend_handles_labels()[1]
    pairs = zip(*panel.get_legend_handles_labels(), strict=True)
    kept = [(handle, label) for handle, label in pairs if label not in known]
    return [handle for handle, _ in kept], [label for _, label in kept]


def _new_panels() -> tuple[Any, Any]:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib, which is not installed: pip install matplotlib, or print the result, which is a "
            "table"
        ) from error
    figure: Any = pyplot.figure(figsize=(5.0, 6.4))
    figure.set_layout_engine("constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    return upper, lower


def _pair(axes: Sequence[Any]) -> tuple[Any, Any]:
    try:
        upper, lower = axes
    except (TypeError, ValueError):
        raise TypeError(f"axes must be two matplotlib Axes, upper and lower, got {axes!r}") from None
    return upper, lower
