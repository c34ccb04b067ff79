"""What a run prints: what it works with, and the closing table."""

from typing import Any

from rich.console import Console
from rich.table import Table

from .batching import TokenSet
from .data import Split
from .distributed import Place
from .settings import CONFIGS, Settings
from .tasks import TASKS

LEGEND = "Pearson of a constant answer counts as 0. nll: negative log-likelihood per example, lower is better."


def print_header(console: Console, settings: Settings, place: Place, encoder: str, folder: object) -> None:
    """One line each: configuration, device, folder."""
    console.print(f"[bold]{settings.config}[/] ({CONFIGS[settings.config]}), {settings.option}", highlight=False)
    encoder = "MiniLM-L6-H384, embedded" if encoder == "" else encoder
    where = f"{place.device.type}" + (f", {place.world} processes" if place.world > 1 else "")
    console.print(f"encoder {encoder}; {where}; seed {settings.seed}; results go to {folder}", highlight=False)


def print_data(console: Console, files: dict[str, list[Split]], sets: dict[str, TokenSet], max_length: int) -> None:
    """How many rows each task has, which rows could not be used, and how many sentences were cut."""
    for name, splits in files.items():
        counts = ", ".join(f"{len(split.examples)} {split.file.name}" for split in splits)
        console.print(f"  {name}: {counts}", highlight=False)
        for split in splits:
            for note in split.skipped:
                console.print(f"  [yellow]skipped[/] {note}", highlight=False, soft_wrap=True)
    cut = {name: data.truncated for name, data in sets.items() if data.truncated}
    for name, count in cut.items():
        console.print(f"  {name}: {count} training rows reach --max-length {max_length} and are cut", highlight=False)


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
