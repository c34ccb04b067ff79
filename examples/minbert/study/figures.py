"""The figures of the comparison: each arm's gain over `t-vanilla` with its interval, by arm and by size of data.

Those of all tasks together are `summary.py`'s.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ..report import save_figure
from ..tasks import TASKS
from . import summary
from .arms import CAUSES
from .bootstrap import Difference, difference
from .matched import REFERENCE, complete, matrix, measures, paired
from .record import Record, read, read_joint
from .stages import SIZES, STAGES


def make(results: Path, folder: Path) -> list[Path]:
    """A figure for each task that has an estimate, one by size of data, those of all tasks together; returns the files.

    Arms with a fault have a table alone.
    """
    files = []
    sized: dict[str, dict[str, list[Gain]]] = {}
    for task in TASKS:
        stages = {
            name: read(results / name)
            for name, stage in STAGES.items()
            if stage.tasks == (task,) and stage.seeds and not CAUSES.keys() & set(stage.arms)
        }
        found = {name: records for name, records in stages.items() if complete(STAGES[name], records)}
        sized[task] = by_size(task, found)
        found = {name: records for name, records in found.items() if STAGES[name].arms != SIZES}
        if found:
            rows = STAGES[next(iter(found))].rows  # other sizes are another picture
            found = {name: records for name, records in found.items() if STAGES[name].rows == rows}
            files.append(folder / f"gain-{task}.png")
            gains(task, found, files[-1])
    sized = {task: found for task, found in sized.items() if any(len(points) > 1 for points in found.values())}
    if sized:
        files.append(folder / "gain-by-size.png")
        sizes(sized, files[-1])
    joint = read_joint(results)
    return files + (summary.figures(joint, folder, "joint-") if joint is not None else [])


class Gain(NamedTuple):
    """Of an arm over the reference: training rows, and the differences in the two measures that claims are made of."""

    rows: int
    gaps: tuple[Difference, Difference]


def by_size(task: str, stages: dict[str, list[Record]]) -> dict[str, list[Gain]]:
    """What the arms of `SIZES` gain, from the first stage of each known size with settings of no search, by size."""
    points: dict[str, list[Gain]] = {arm: [] for arm in SIZES if arm != REFERENCE}
    for name, records in stages.items():
        rows = STAGES[name].rows
        if rows is None or STAGES[name].settings_from is not None:
            continue
        by_arm, _ = paired(STAGES[name], records)
        for arm in points.keys() & by_arm.keys():
            if any(gain.rows == rows for gain in points[arm]):
                continue  # made again
            pairs = [[matrix(by_arm[each], task, "last", m) for each in (arm, REFERENCE)] for m in measures(task)[:2]]
            points[arm].append(Gain(rows, (difference(*pairs[0]), difference(*pairs[1]))))
    return {arm: sorted(found, key=lambda gain: gain.rows) for arm, found in points.items() if found}


def sizes(found: dict[str, dict[str, list[Gain]]], file: Path) -> None:
    """A column for each task, a panel for each measure: differences and their intervals over the training rows."""
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")  # as wide as a telephone's page
    panels = figure.subplots(2, len(found), sharex=True, squeeze=False)
    ticks = sorted({gain.rows for arms in found.values() for points in arms.values() for gain in points})
    for column, (task, arms) in enumerate(found.items()):
        for row, measure in enumerate(measures(task)[:2]):
            panel = panels[row][column]
            for number, (arm, points) in enumerate(arms.items()):
                places = [gain.rows * 1.08**number for gain in points]  # beside each other
                gaps = [gain.gaps[row] for gain in points]
                colour = ("#1b6ca8", "#d1495b")[number % 2]
                panel.vlines(places, [gap.low for gap in gaps], [gap.high for gap in gaps], color=colour)
                panel.plot(
                    places, [gap.mean for gap in gaps], "o-", color=colour, markersize=4, linewidth=0.8, label=arm
                )
            panel.axhline(0, color="black", linewidth=0.8)
            panel.set_xscale("log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.tick_params(labelsize=7)  # or the numbers of three columns run into each other
            panel.minorticks_off()
            panel.set_title(f"{task}: {measure.title}", fontsize=9)
            panel.grid(axis="y", alpha=0.3)
        panels[-1][column].set_xlabel("training rows", fontsize=8)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    for row in panels:
        row[0].set_ylabel(f"difference from {REFERENCE}", fontsize=8)
    save_figure(figure, file)


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
