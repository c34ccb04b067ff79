"""The results in four forms: on the screen, as JSON, as Markdown and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from .claims import claims
from .figure import FOLLOWED, draw
from .tables import TABLES

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
        draw(results["grid"]).savefig(paths[-1], dpi=110)
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
