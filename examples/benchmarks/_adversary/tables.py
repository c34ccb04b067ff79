"""Tables of the adversary study, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cells import CELLS, Cell

Cells = Mapping[str, Mapping[str, Any]]
SHORT = 1  # steps in the tables that compare cells


def share(reached: Sequence[float], maximum: Sequence[float]) -> float:
    """The mean over examples of what was reached over the maximum; what a longer search found is never above it."""
    return sum(value / best for value, best in zip(reached, maximum, strict=True)) / len(maximum)


def share_of_means(reached: Sequence[float], maximum: Sequence[float]) -> float:
    """The penalty over the mean of the maxima, in which examples with a large divergence count for more."""
    return sum(reached) / sum(maximum)


def shares(cell: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """By rule and number of steps."""
    return {(row["rule"], row["steps"]): share(row["reached"], cell["maximum"]) for row in cell["rules"]}


def markdown(results: Mapping[str, Any]) -> str:
    """All tables."""
    cells: Cells = results["cells"]
    main = [cell for cell in CELLS if cell.main and cell.key in cells]
    parts = [_one_cell(cell, cells[cell.key]) for cell in main]
    parts += [_compared(cells), _converged(cells)]
    return "\n".join(part for part in parts if part)


def title(cell: Cell) -> str:
    stage = {"start": "a new head", "end": "fitted"}[cell.stage]
    norm = cell.norm.replace("inf", "∞")
    return f"{cell.task}, {stage}, {cell.mode} mode, norm {norm} over the {cell.over}, ε = {cell.epsilon:g}"


def _one_cell(cell: Cell, found: Mapping[str, Any]) -> str:
    name = title(cell)
    lines = [f"### {name[0].upper()}{name[1:]}", ""]
    lines += ["| rule | steps | cost | share | share of means |", "|---|---:|---:|---:|---:|"]
    for row in found["rules"]:
        ratio, means = (measure(row["reached"], found["maximum"]) for measure in (share, share_of_means))
        lines.append(f"| {row['rule']} | {row['steps']} | {row['cost']:.2f} | {ratio:.3f} | {means:.3f} |")
    return "\n".join(lines) + "\n"


def _compared(cells: Cells) -> str:
    """One row for each cell, one column for each rule with at most one step."""
    present = [cell for cell in CELLS if cell.key in cells]
    found = {cell: shares(cells[cell.key]) for cell in present}
    columns = _columns(found[cell] for cell in present if not cell.main)
    if not columns:
        return ""
    head = ["head", "stage", "mode", "norm", "over", "ε", "maximum", *(f"{rule}, {steps}" for rule, steps in columns)]
    lines = ["### Every cell, with at most one step", "", "| " + " | ".join(head) + " |"]
    lines.append("|---" * 6 + "|---:" * (len(head) - 6) + "|")
    for cell in present:
        best = cells[cell.key]["maximum"]
        place = [cell.task, cell.stage, cell.mode, cell.norm.replace("inf", "∞"), cell.over, f"{cell.epsilon:g}"]
        numbers = [f"{found[cell][column]:.3f}" if column in found[cell] else "" for column in columns]
        lines.append("| " + " | ".join([*place, f"{sum(best) / len(best):.3g}", *numbers]) + " |")
    return "\n".join(lines) + "\n"


def _columns(found: Any) -> list[tuple[str, int]]:
    return [column for column in dict.fromkeys(key for one in found for key in one) if column[1] <= SHORT]


def _converged(cells: Cells) -> str:
    """What twice the steps and restarts change."""
    rows = []
    for key, found in cells.items():
        if "check" in found:
            best, longer = found["maximum"], found["check"]["maximum"]
            change = sum(longer) / sum(best) - 1
            rows.append(f"| {key} | {sum(best) / len(best):.4g} | {sum(longer) / len(longer):.4g} | {change:+.2%} |")
    head = ["### The maximum by twice the steps from twice the starts", "", "| cell | maximum | longer | change |"]
    return "\n".join([*head, "|---|---:|---:|---:|", *rows]) + "\n" if rows else ""
