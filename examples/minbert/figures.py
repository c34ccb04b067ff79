"""Plots, drawn without a display."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .tasks import TASKS

COLOURS = {"sst": "#1b6ca8", "para": "#d1495b", "sts": "#2e8b57", "cfimdb": "#8d6a9f"}


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=120)


def training_curves(history: list[dict[str, Any]], title: str, file: Path) -> None:
    """Main metric on train and dev, and the training loss, by epoch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, loss = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    for name in history[0]["dev"]:
        metric = TASKS[name].metric
        for part, style in (("train", "--"), ("dev", "-")):
            values = [_or_nan(line[part][name][metric]) for line in history]
            label = f"{name} {metric}, {part}"
            quality.plot(epochs, values, style, marker="o", markersize=3, color=COLOURS[name], label=label)
    for name in history[0]["losses"]:
        values = [_or_nan(line["losses"].get(name, {}).get("loss")) for line in history]
        loss.plot(epochs, values, marker="o", markersize=3, color=COLOURS[name], label=name)
    quality.set(xlabel="epoch", ylabel="accuracy, Pearson", title="train (dashed) and dev", ylim=(None, 1.02))
    loss.set(xlabel="epoch", ylabel="training loss with its regularizers", title="loss", yscale="log")
    for axes in (quality, loss):
        axes.set_xticks(epochs if len(epochs) <= 12 else epochs[:: max(1, len(epochs) // 10)])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    save(figure, file)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
