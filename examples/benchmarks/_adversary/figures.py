"""The picture of the adversary study: share of the maximum against cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cells import CELLS
from .tables import share

# Told apart by marker, dash and lightness, so that the picture needs no colour.
STYLES = {
    "Algorithm 1, σ = ε": ("0.55", "s", ":", "Algorithm 1"),
    "VAT's power iteration": ("0.35", "^", "-.", "VAT"),
    "steepest, σ = ε/10": ("0.35", "v", "-.", "steepest from noise"),
    "gradient start, η = 2ε": ("0.15", "D", "--", "gradient start"),
    "start towards uniform, η = 2ε": ("tab:blue", "o", "-", "towards uniform"),
}
STARTS = {"gradient start, η = 2ε": "gradient start", "start towards uniform, η = 2ε": "start towards uniform"}
PANELS = 3


def draw(results: Mapping[str, Any], file: Path) -> None:
    """One panel above the other, for a narrow page."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    present = [cell for cell in CELLS if cell.key in results["cells"]][:PANELS]
    figure, grid = pyplot.subplots(len(present), 1, figsize=(5.0, 0.6 + 2.7 * len(present)), squeeze=False, sharex=True)
    for axes, cell in zip(grid[:, 0], present, strict=True):
        _panel(axes, results["cells"][cell.key])
        norm = cell.norm.replace("inf", "∞")
        axes.set_title(f"{cell.task}, norm {norm}, ε = {cell.epsilon:g}", fontsize=12)
        axes.set(ylim=(-0.04, 1.04), ylabel="share of the maximum")
    grid[-1, 0].set_xlabel("cost, in plain training steps")
    grid[0, 0].legend(fontsize=9, loc="upper left", framealpha=0.9)
    figure.tight_layout()
    figure.savefig(file, dpi=144)
    pyplot.close(figure)


def _panel(axes: Any, cell: Mapping[str, Any]) -> None:
    for rule, (colour, marker, line, label) in STYLES.items():
        rows = [row for row in cell["rules"] if row["rule"] in (rule, STARTS.get(rule)) and _belongs(row, rule)]
        if rows:
            rows.sort(key=lambda row: row["cost"])
            values = [share(row["reached"], cell["maximum"]) for row in rows]
            axes.plot([row["cost"] for row in rows], values, linestyle=line, marker=marker, color=colour, label=label)
    axes.grid(color="0.9")


def _belongs(row: Mapping[str, Any], rule: str) -> bool:
    """Without a step η has no say, so that the start alone is measured once, under the rule without η in its name."""
    return row["rule"] == rule or row["steps"] == 0
