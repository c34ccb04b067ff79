"""The results in four forms: on the screen, as JSON, as Markdown and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from .cases.variants import ALL
from .claims import claims
from .tables import TABLES

COLOURS = dict(zip(ALL, ("#666666", "#d95f02", "#1b9e77", "#7570b3"), strict=True))
FOLLOWED = ("batch", "length", "steps")
CLAIMS = ("claim", "bound", "measured", "holds")


def show(console: Console, results: Mapping[str, Any]) -> None:
    """Print every table that has rows."""
    for title, _, headings, cells in _readable(results):
        table = RichTable(*headings, title=title, title_justify="left")
        for row in cells:
            table.add_row(*row)
        console.print(table)


def write(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write `cost.json`, `cost.md` and, where cost was followed along an axis, `cost.png`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "cost.json", folder / "cost.md"]
    paths[0].write_text(json.dumps({**results, "claims": claims(results)}, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(_markdown(results), encoding="utf-8")
    if any(row["axis"] in FOLLOWED for row in results.get("grid", [])):
        paths.append(folder / "cost.png")
        _plot(results["grid"], paths[-1])
    return paths


def _readable(results: Mapping[str, Any]) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Title, note, headings and cells of every table that has rows."""
    checked = [
        [row["claim"], row["bound"], row["measured"], "yes" if row["holds"] else "no"] for row in claims(results)
    ]
    readable = [("Summary", "", list(CLAIMS), checked)]
    for table in TABLES:
        cells = table.cells(results.get(table.section, []))
        readable.append((table.title, table.note, [heading for heading, _ in table.columns], cells))
    machine = [[name, str(value)] for name, value in {**results["machine"], **results["settings"]}.items()]
    readable.append(("Machine and settings", "", ["", ""], machine))
    conditions = results.get("conditions", {})
    names = list(next(iter(conditions.values()), {}))
    measured = [[place, *(str(row[name]) for name in names)] for place, row in conditions.items()]
    readable.append(("When each section was measured", "", ["section", *names], measured))
    return [table for table in readable if table[-1]]


def _markdown(results: Mapping[str, Any]) -> str:
    parts = []
    for title, note, headings, cells in _readable(results):
        parts.append(f"### {title}\n")
        if note:
            parts.append(f"{note}\n")
        lines = [headings, ["---"] * len(headings), *cells]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(parts)


def _plot(grid: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time and memory, as multiples of the plain step, along batch, length and steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in FOLLOWED if any(row["axis"] == axis for row in grid)]
    figure, panels = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 5.2), sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        for line, (key, label) in enumerate((("times", "time"), ("times_bytes", "peak memory"))):
            panel = panels[line][column]
            for name in ALL:
                rows = [row for row in grid if row["axis"] == axis and row["variant"] == name]
                panel.plot([r[axis] for r in rows], [r[key] for r in rows], "o-", color=COLOURS[name], label=name)
            panel.set_xlabel(axis if axis != "steps" else "ascent steps")
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(f"{label}, × plain")
            if axis != "steps":
                panel.set_xscale("log", base=2)
            panel.set_xticks([row[axis] for row in grid if row["axis"] == axis and row["variant"] == ALL[0]])
            panel.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(ALL), frameon=False, fontsize=8
    )
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=110)
    plt.close(figure)
