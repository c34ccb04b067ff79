"""What a study leaves for its readers, made of its `results.json` alone: a Markdown table and three figures."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..report import COLOURS, save_figure
from ..tasks import TASKS
from .statistics import Cell

Summary = dict[str, dict[str, dict[str, Cell]]]
"""mode → configuration → task → cell."""
Content = dict[str, Any]
"""Of a study's `results.json`."""


def cells_of(content: Content) -> Summary:
    """The cells, as they were before they were written."""
    return {
        mode: {
            config: {task: Cell.from_dict(cell) for task, cell in cells.items()} for config, cells in configs.items()
        }
        for mode, configs in content["summary"].items()
    }


def markdown(content: Content, title: str = "# Dev metrics by configuration") -> str:
    """A table for each mode: mean ± standard deviation over seeds, and the difference from the reference.

    Args:
        content: of `results.json`.
        title: the heading; those below it are one level lower.
    """
    listed = ", ".join(f"{task} {count}" for task, count in content["dev_rows"].items())
    parts = [f"{title}\n\nSeeds: {len(content['seeds'])}. Dev rows: {listed}.\n"]
    level = title.split()[0] + "#"
    for mode, configs in cells_of(content).items():
        tasks = list(next(iter(configs.values())))
        heads = [f"{task} {TASKS[task].metric}" for task in tasks]
        lines = [
            f"{level} After {mode}\n",
            f"| configuration | {' | '.join(heads)} | mean |",
            "|---" * (len(tasks) + 2) + "|",
        ]
        for config, cells in configs.items():
            mean = sum(cell.mean for cell in cells.values()) / len(cells)
            values = " | ".join(_entry(cell) for cell in cells.values())
            lines.append(f"| {config} | {values} | {mean:.3f} |")
        parts.append("\n".join(lines) + "\n")
    drawn = "dev rows and seeds" if len(content["seeds"]) > 1 else "dev rows alone, since there is one seed"
    parts.append(
        f"In brackets: difference from {content['reference']} and its 95 % interval (paired bootstrap over {drawn}). "
        "An interval that holds 0 shows no difference.\n"
    )
    return "\n".join(parts)


def _entry(cell: Cell) -> str:
    text = f"{cell.mean:.3f}" + (f" ± {cell.std:.3f}" if cell.std is not None else "")
    if cell.difference is not None and cell.interval is not None:
        low, high = cell.interval
        text += f" ({cell.difference:+.3f} [{low:+.3f}, {high:+.3f}])"
    return text


def figures(content: Content, folder: Path, prefix: str = "") -> list[Path]:
    """The bars of each mode, and T-SMART's sentiment by epoch where it was trained; returns the files."""
    summary = cells_of(content)
    files = []
    for mode, configs in summary.items():
        files.append(folder / f"{prefix}{mode}.png")
        bars(configs, f"dev metrics after {mode}", files[-1])
    last = list(summary)[-1]
    if "sst" in summary[last].get("t-smart", {}):
        runs = [run for run in content["runs"] if (run["mode"], run["config"]) == (last, "t-smart")]
        files.append(folder / f"{prefix}t-smart-sentiment.png")
        accuracy_by_epoch([run["epochs"] for run in runs], f"t-smart, {last}: sentiment by epoch", files[-1])
    return files


def bars(configs: dict[str, dict[str, Cell]], title: str, file: Path) -> None:
    """Dev metric of each task by configuration, with standard deviations, and the mean over tasks."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    tasks = list(next(iter(configs.values())))
    width = 0.8 / len(tasks)
    for i, task in enumerate(tasks):
        cells = [cells[task] for cells in configs.values()]
        places = [k + (i - (len(tasks) - 1) / 2) * width for k in range(len(configs))]
        spread = None if any(cell.std is None for cell in cells) else [cell.std for cell in cells]
        label = f"{task} {TASKS[task].metric}"
        axes.bar(places, [cell.mean for cell in cells], width, yerr=spread, color=COLOURS[task], label=label, capsize=2)
    means = [sum(cell.mean for cell in cells.values()) / len(cells) for cells in configs.values()]
    axes.plot(range(len(configs)), means, "D", color="black", label="mean over tasks")
    for place, mean in enumerate(means):
        axes.annotate(f"{mean:.3f}", (place, mean), textcoords="offset points", xytext=(8, 4), fontsize=8)
    axes.set_xticks(range(len(configs)), list(configs))
    axes.set(ylabel="dev metric", title=title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(tasks) + 1)
    save_figure(figure, file)


def accuracy_by_epoch(histories: list[list[dict[str, Any]]], title: str, file: Path) -> None:
    """Sentiment accuracy on train and dev by epoch: a thin line a seed, and their mean."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [line["epoch"] for line in histories[0]]
    seeds = f"mean of {len(histories)} seeds" if len(histories) > 1 else "one seed"
    for part, style in (("train", "--"), ("dev", "-")):
        curves = [[line[part]["sst"]["accuracy"] for line in history] for history in histories]
        for curve in curves:
            axes.plot(epochs, curve, style, color=COLOURS["sst"], alpha=0.3, linewidth=1)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, mean, style, marker="o", color=COLOURS["sst"], label=f"{part}, {seeds}")
    axes.set_xticks(epochs)
    axes.set(xlabel="epoch", ylabel="sentiment accuracy", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, file)
