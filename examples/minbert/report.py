"""What a run tells: at its start what it works with, at its end a table, `metrics.json` and a figure."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import checkpoint
from .batching import TokenSet
from .data import Split
from .distributed import Place
from .evaluate import write_predictions
from .files import one_line, replacing, to_nowhere, write_json
from .settings import CONFIGS, Settings
from .tasks import TASKS, baseline
from .train import Trainer
from .words import meaning

LEGEND = "Pearson of a constant answer counts as 0. nll: negative log-likelihood per example, lower is better."
COLOURS = {"sst": "#1b6ca8", "para": "#d1495b", "sts": "#2e8b57", "cfimdb": "#8d6a9f"}


class Outlet(Console):
    """Where a run tells what it does; if the reader goes away, as `head` does, it trains on without one."""

    def on_broken_pipe(self) -> None:
        """As the parent's, but the program goes on."""
        to_nowhere(self.file)
        self.quiet = True


def print_header(console: Console, settings: Settings, place: Place, encoder: str, folder: object) -> None:
    """One line each: configuration, device, folder."""
    console.print(f"[bold]{settings.config}[/] ({CONFIGS[settings.config]}), {settings.option}", highlight=False)
    encoder = "MiniLM-L6-H384, embedded" if encoder == "" else encoder
    where = f"{place.device.type}" + (f", {place.world} processes" if place.world > 1 else "")
    text = f"encoder {encoder}; {where}; seed {settings.seed}; results go to {folder}"
    console.print(text, highlight=False, markup=False)


def note(console: Console, text: str) -> None:
    """What the user should know before the run goes on."""
    console.print(f"[yellow]note[/] {escape(text)}", highlight=False)


def print_data(console: Console, files: dict[str, list[Split]], sets: dict[str, TokenSet], max_length: int) -> None:
    """How many rows each task has, which rows could not be used, and how many sentences were cut."""
    for name, splits in files.items():
        counts = ", ".join(f"{len(split.examples)} {split.file.name}" for split in splits)
        console.print(f"  {name}: {counts}", highlight=False, markup=False)
        for split in splits:
            for row in split.skipped:
                console.print(f"  [yellow]skipped[/] {escape(one_line(row))}", highlight=False, soft_wrap=True)
    cut = {name: data.truncated for name, data in sets.items() if data.truncated}
    for name, count in cut.items():
        console.print(
            f"  {name}: {count} training rows have more than --max-length {max_length} tokens and are cut",
            highlight=False,
        )


def finish(trainer: Trainer, sets: dict[str, dict[str, TokenSet]], console: Console) -> None:
    """Predictions, figure, `metrics.json`, and the closing table."""
    settings, place, folder = trainer.settings, trainer.place, trainer.folder
    for split in ("dev", "test"):
        write_predictions(trainer.model, sets[split], place, split, folder / "predictions")
    if not place.first:
        return
    history = trainer.history
    title = f"{settings.config}, {settings.option}, seed {settings.seed}"
    training_curves(history, title, folder / "figures" / "curves.png")
    metrics = {
        "config": settings.config,
        "option": settings.option,
        "seed": settings.seed,
        "tasks": list(settings.tasks),
        "train_tasks": list(settings.train_tasks),
        "steps": trainer.step,
        "dev": history[-1]["dev"],
        "train": history[-1]["train"],
        "gap": history[-1]["gap"],
        "baseline": {
            name: baseline(data.task, torch.tensor(sets["train"][name].labels), torch.tensor(data.labels))
            for name, data in sets["dev"].items()
        },
        "untrained": trainer.before,
        "epochs": history,
        "step_seconds_median": trainer.step_seconds_median,
        "peak_memory_bytes": trainer.memory.peak,
        "seconds": round(trainer.seconds, 1),
        "processes": place.world,
        "device": place.device.type,
        "torch": torch.__version__,
        "settings": settings.to_dict(),
    }
    checkpoint.tidy(folder, keep=1)
    write_json(folder / "metrics.json", metrics)
    console.print(closing_table(metrics, settings))
    for text in meaning(metrics, settings, place.world):
        say(console, text)
    console.print(
        f"{trainer.seconds:.0f} s, {trainer.step} steps, peak memory {trainer.memory.peak / 2**20:.0f} MiB; "
        f"metrics.json, predictions and figures/curves.png are in {folder}",
        highlight=False,
        markup=False,
    )


def say(console: Console, text: str) -> None:
    """One line, as it is: neither wrapped nor coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def closing_table(metrics: dict[str, Any], settings: Settings) -> Table:
    """Baseline, untrained and trained metrics side by side."""
    table = Table(title=f"dev, {settings.config} after epoch {len(metrics['epochs'])}", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("metric")
    for name in ("majority / mean", "untrained", "trained", "on train", "gap"):
        table.add_column(name, justify="right")
    last = metrics["epochs"][-1]
    for name in settings.tasks:
        task = TASKS[name]
        rows = [task.metric] + (["nll"] if task.kind != "score" else [])
        for row in rows:
            values = [metrics[key][name][row] for key in ("baseline", "untrained", "dev")]
            train = last["train"][name][row]
            gap = last["gap"][name] if row == task.metric else None
            star = "" if name in settings.train_tasks else "*"
            label = f"{name}{star} (n={metrics['dev'][name]['n']})" if row == task.metric else ""
            trained = f"[bold]{number(values[2])}[/]"
            table.add_row(label, row, number(values[0]), number(values[1]), trained, number(train), number(gap, ""))
    table.caption = LEGEND + ("" if set(settings.tasks) == set(settings.train_tasks) else " *: not trained on.")
    table.caption_justify = "left"
    return table


def number(value: float | None, missing: str = "undefined") -> str:
    """Three decimals, or a word where there is no number."""
    return missing if value is None else f"{value:.3f}"


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
    save_figure(figure, file)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def save_figure(figure: Figure, file: Path) -> None:
    """Writes a PNG."""
    FigureCanvasAgg(figure)
    with replacing(file) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
