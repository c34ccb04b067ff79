"""The picture of the adversary study: share of the maximum against cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cells import CELLS
from .tables import share

# Told apart by marker, dash and lightness, so that the picture needs no colour.
STYLES = {
    "start towards uniform": ("tab:blue", "o", "-", "start towards uniform"),
    "gradient start": ("0.1", "D", "--", "gradient start, random u"),
    "steepest, σ = ε/10": ("0.4", "v", "-.", "steepest from noise"),
    "VAT's power iteration": ("0.4", "^", "-.", "VAT"),
    "Algorithm 1, σ = ε": ("0.55", "s", ":", "Algorithm 1"),
}
PANELS = 3


def draw(results: Mapping[str, Any], file: Path) -> None:
    """The first cells, one panel above the other, for a narrow page."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    present = [cell for cell in CELLS if cell.key in results["cells"]][:PANELS]
    figure, grid = pyplot.subplots(
        len(present),
        1,
        figsize=(5.0, 1.3 + 2.4 * len(present)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    entries: dict[str, Any] = {}
    for axes, cell in zip(grid[:, 0], present, strict=True):
        entries |= _panel(axes, results["cells"][cell.key])
        axes.set_title(f"{cell.task}, norm {cell.norm.replace('inf', '∞')}, ε = {cell.epsilon:g}", fontsize=12)
        axes.set(ylim=(-0.04, 1.04), ylabel="share of maximum")
    grid[-1, 0].set_xlabel("cost, in plain training steps")
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=2, fontsize=10, frameon=False)
    figure.savefig(file, dpi=144)
    pyplot.close(figure)


def _panel(axes: Any, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Draws a line for each rule; returns the lines by label."""
    drawn = {}
    for rule, (colour, marker, line, label) in STYLES.items():
        rows = [row for row in cell["rules"] if row["rule"] == rule]
        if rows:
            values = [share(row["reached"], cell["maximum"]) for row in rows]
            costs = [row["cost"] for row in rows]
            (drawn[label],) = axes.plot(costs, values, linestyle=line, marker=marker, color=colour)
    axes.grid(color="0.9")
    return drawn
