"""What a study leaves for its readers: a Markdown table and three figures."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..report import COLOURS, save_figure
from ..tasks import TASKS
from .statistics import Cell

Summary = dict[str, dict[str, dict[str, Cell]]]
"""mode → configuration → task → cell."""


def markdown(summary: Summary, reference: str, notes: str) -> str:
    """A table for each mode: mean ± standard deviation over seeds, and the difference from the reference.

    Args:
        summary: the cells.
        reference: the configuration that the others are compared with.
        notes: a line on how the numbers came about.
    """
    parts = [f"# Dev metrics by configuration\n\n{notes}\n"]
    for mode, configs in summary.items():
        tasks = list(next(iter(configs.values())))
        heads = [f"{task} {TASKS[task].metric}" for task in tasks]
        lines = [
            f"## After {mode}\n",
            f"| configuration | {' | '.join(heads)} | mean |",
            "|---" * (len(tasks) + 2) + "|",
        ]
        for config, cells in configs.items():
            mean = sum(cell.mean for cell in cells.values()) / len(cells)
            values = " | ".join(_entry(cell) for cell in cells.values())
            lines.append(f"| {config} | {values} | {mean:.3f} |")
        parts.append("\n".join(lines) + "\n")
    parts.append(
        f"In brackets: difference from {reference} and its 95 % interval (paired bootstrap over dev rows and seeds). "
        "An interval that holds 0 shows no difference.\n"
    )
    return "\n".join(parts)


def _entry(cell: Cell) -> str:
    text = f"{cell.mean:.3f}" + (f" ± {cell.std:.3f}" if cell.std is not None else "")
    if cell.difference is not None and cell.interval is not None:
        low, high = cell.interval
        text += f" ({cell.difference:+.3f} [{low:+.3f}, {high:+.3f}])"
    return text


def bars(configs: dict[str, dict[str, Cell]], title: str, file: Path) -> None:
    """Dev metric of each task by configuration, with standard deviations, and the mean over tasks."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    tasks = list(next(iter(configs.values())))
    width = 0.8 / len(tasks)
    for i, task in enumerate(tasks):
        cells = [cells[task] for cells in configs.values()]
        places = [k + (i - (len(tasks) - 1) / 2) * width for k in range(len(configs))]
        spread = [cell.std or 0.0 for cell in cells]
        label = f"{task} {TASKS[task].metric}"
        axes.bar(places, [cell.mean for cell in cells], width, yerr=spread, color=COLOURS[task], label=label, capsize=2)
    means = [sum(cell.mean for cell in cells.values()) / len(cells) for cells in configs.values()]
    axes.plot(range(len(configs)), means, "D", color="black", label="mean over tasks")
    for place, mean in enumerate(means):
        axes.annotate(f"{mean:.3f}", (place, mean), textcoords="offset points", xytext=(8, 4), fontsize=8)
    axes.set_xticks(range(len(configs)), list(configs))
    axes.set(ylabel="dev metric", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    save_figure(figure, file)


def accuracy_by_epoch(histories: list[list[dict[str, Any]]], title: str, file: Path) -> None:
    """Sentiment accuracy on train and dev by epoch: a thin line a seed, and their mean."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [line["epoch"] for line in histories[0]]
    for part, style in (("train", "--"), ("dev", "-")):
        curves = [[line[part]["sst"]["accuracy"] for line in history] for history in histories]
        for curve in curves:
            axes.plot(epochs, curve, style, color=COLOURS["sst"], alpha=0.3, linewidth=1)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, mean, style, marker="o", color=COLOURS["sst"], label=f"{part}, mean of {len(curves)} seeds")
    axes.set_xticks(epochs)
    axes.set(xlabel="epoch", ylabel="sentiment accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, file)
