"""Time and memory along batch, length and ascent steps, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .cases.variants import ALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLLOWED = ("batch", "length", "steps")
# Told apart by their markers, in grey, and with the commonest colour blindness (a test measures that).
STYLES = dict(zip(ALL, (("#767676", "o"), ("#d55e00", "s"), ("#003f72", "^"), ("#56b4e9", "D")), strict=True))


def draw(grid: Sequence[Mapping[str, Any]]) -> Figure:
    """Multiples of the plain step: time with the quartiles over the rounds, peak memory as it is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in FOLLOWED if any(row["axis"] == axis for row in grid)]
    figure, panels = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 5.2), sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        for line, key in enumerate(("times", "times_bytes")):
            panel = panels[line][column]
            for name in ALL:
                rows = [row for row in grid if row["axis"] == axis and row["variant"] == name]
                _curve(panel, [row[axis] for row in rows], rows, key, name)
            panel.set_xlabel(axis if axis != "steps" else "ascent steps")
            panel.grid(alpha=0.3)
            if axis != "steps":
                panel.set_xscale("log", base=2)
            panel.set_xticks([row[axis] for row in grid if row["axis"] == axis and row["variant"] == ALL[0]])
            panel.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    # The panels of a row share their axis, and setting one end fixes the other where it is: only now is all drawn.
    for (first, *_), label in zip(panels, ("time", "peak memory"), strict=True):
        first.set_ylim(bottom=0)
        first.set_ylabel(f"{label}, × plain")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(ALL), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return figure


def _curve(panel: Any, places: list[int], rows: Sequence[Mapping[str, Any]], key: str, name: str) -> None:
    colour, marker = STYLES[name]
    heights = [row[key] for row in rows]
    quartiles = None
    if key == "times":
        quartiles = [[row[key] - row[f"{key}_low"] for row in rows], [row[f"{key}_high"] - row[key] for row in rows]]
    panel.errorbar(
        places, heights, yerr=quartiles, color=colour, marker=marker, markersize=5, linewidth=1.3, capsize=2, label=name
    )
