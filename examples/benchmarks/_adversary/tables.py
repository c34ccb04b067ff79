"""Tables of the adversary study, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cells import CELLS, Cell

Cells = Mapping[str, Mapping[str, Any]]
COLUMNS = {
    ("Algorithm 1, σ = ε", 1): "Algorithm 1",
    ("Algorithm 1, σ = ε/10", 1): "σ = ε/10",
    ("steepest, σ = ε/10", 1): "steepest, σ = ε/10",
    ("gradient start", 0): "gradient start",
    ("gradient start", 1): "gradient start",
    ("start towards uniform", 0): "towards uniform",
    ("start towards uniform", 1): "towards uniform",
    ("start towards uniform, η = 2ε", 1): "the same, η = 2ε",
}


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
    parts += [_compared(cells), _packages(cells), _converged(cells)]
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
    """One row for each cell, one column for each of the rules that a user would choose from."""
    head = ["cell", "maximum", *(f"{label} ({steps})" for (_, steps), label in COLUMNS.items())]
    lines = ["### Every cell: the share that each rule (with so many steps) reaches", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for cell in CELLS:
        if cell.key in cells:
            best, found = cells[cell.key]["maximum"], shares(cells[cell.key])
            numbers = [f"{found[column]:.3f}" if column in found else "" for column in COLUMNS]
            lines.append("| " + " | ".join([title(cell), f"{sum(best) / len(best):.3g}", *numbers]) + " |")
    return "\n".join(lines) + "\n"


def _packages(cells: Cells) -> str:
    """The earlier packages' rules, at the length that the ball of norm 2 allows."""
    rows = []
    for cell in CELLS:
        found = shares(cells[cell.key]) if cell.key in cells else {}
        if ("MT-DNN's rule", 1) in found:
            columns = ("MT-DNN's rule", "smart-pytorch", "VAT's power iteration")
            numbers = [f"{found[name, 1]:.4f}" if (name, 1) in found else "" for name in columns]
            rows.append("| " + " | ".join([title(cell), *numbers]) + " |")
    head = ["### The packages' rules, brought to the same length, and VAT's, with one step", ""]
    head += ["| cell | MT-DNN's rule | smart-pytorch | VAT |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows]) + "\n" if rows else ""


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
