"""The figures of the comparison: each arm's gain over `t-vanilla`, with its interval, by size of data."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..report import save_figure
from ..tasks import TASKS
from .arms import CAUSES
from .bootstrap import difference
from .record import Record, read
from .stages import STAGES
from .tables import REFERENCE, complete, matrix, measures, paired


def make(results: Path, folder: Path) -> list[Path]:
    """A figure for each task that has an estimate; returns the files. Arms with a fault have a table alone."""
    files = []
    for task in TASKS:
        stages = {
            name: read(results / name)
            for name, stage in STAGES.items()
            if stage.tasks == (task,) and stage.seeds and not CAUSES.keys() & set(stage.arms)
        }
        found = {name: records for name, records in stages.items() if complete(STAGES[name], records)}
        if found:
            files.append(folder / f"gain-{task}.png")
            gains(task, found, files[-1])
    return files


def gains(task: str, stages: dict[str, list[Record]], file: Path) -> None:
    """A panel for accuracy or Pearson and one for NLL; a group of intervals for each stage.

    Filled where the interval is on one side of zero.
    """
    rows = sum(len(STAGES[name].arms) - 1 for name in stages)
    figure = Figure(figsize=(4.8, 1.8 + 0.44 * rows), layout="constrained")  # as wide as a telephone's page
    panels = figure.subplots(2, 1)
    for panel, measure in zip(panels, measures(task)[:2], strict=True):
        labels: list[str] = []
        for name, records in stages.items():
            by_arm, _ = paired(STAGES[name], records)
            other = matrix(by_arm[REFERENCE], task, "last", measure)
            for arm, runs in by_arm.items():
                if arm != REFERENCE:
                    gap = difference(matrix(runs, task, "last", measure), other)
                    better = gap.high < 0 if measure.less else gap.low > 0
                    worse = gap.low > 0 if measure.less else gap.high < 0
                    colour = "#2e8b57" if better else "#d1495b" if worse else "#777777"
                    panel.plot([gap.low, gap.high], [len(labels)] * 2, color=colour)
                    panel.plot(gap.mean, len(labels), "o", color=colour, mfc=colour if better or worse else "white")
                    labels.append(arm if len(stages) == 1 else f"{arm} ({name})")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(np.arange(len(labels)), labels)
        panel.set(title=measure.title, ylim=(len(labels) - 0.5, -0.5))
        panel.locator_params(axis="x", nbins=6)
        panel.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel(f"difference from {REFERENCE}")
    save_figure(figure, file)
