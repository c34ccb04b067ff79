"""Every table of the comparison, made of the committed records and of nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import InputError
from ..tasks import TASKS
from .arms import CAUSES
from .bootstrap import Difference, difference, holm
from .matched import REFERENCE, complete, cost, matrix, measures, paired
from .record import Record, read, read_joint, read_zero_shot
from .stages import SEARCH_SEEDS, STAGES, Stage, check_budget, on_dev, ranking
from .summary import markdown

FAULTLESS = "smart+mbpp"
"""What each fault is compared with."""
RIVALS = ("r-drop", "r-drop:5", "two-runs")
"""What costs as much as SMART, and is compared with it."""
LEVEL = 0.05
TESTED = 2
"""So many columns, the first ones, can win or lose, after the last epoch. All else is described."""
TITLE = """# Tables of the comparison

Made by `python examples/minbert_arms.py report` of the records in `examples/minbert/study/results/`, by
[the protocol](../study.md). NLL is the negative log-likelihood, ECE the expected calibration error; *scaled* is with
a temperature chosen on dev. The cost is CPU time of training over that of `t-vanilla`.
"""


class Claim(NamedTuple):
    """What can win or lose: an arm's difference from the reference in one measure of a task, after the last epoch."""

    task: str
    arm: str
    title: str


Claims = dict[Claim, Difference]


def make(results: Path) -> str:
    """All tables of all stages that have complete records, as Markdown."""
    parts, zero_shot, claims = [], read_zero_shot(results), {}
    for name, stage in STAGES.items():
        records = read(results / name)
        if not records:
            continue
        if stage.rungs:
            parts.append(search_table(name, stage, records))
        elif complete(stage, records):
            text, claims[name] = estimate_tables(name, stage, records, zero_shot)
            parts.append(text)
        else:
            parts.append(f"## {name}\n\nIn the making: {len(records)} runs, and fewer than two seeds with all arms.\n")
    if not parts:
        raise InputError(f"{results}: no records; make some with the command `run`")
    if (joint := read_joint(results)) is not None:
        parts.append(markdown(joint, "## all tasks together, by configuration"))
    return "\n".join([TITLE, *parts, *([across(claims)] if claims else [])])


def across(found: dict[str, Claims]) -> str:
    """What is left of the differences if not the stage's comparisons count but those of all stages together."""
    overall = holm({(stage, *claim): gap.p for stage, gaps in found.items() for claim, gap in gaps.items()})
    lines = [
        "## all stages together\n",
        f"Every difference whose p-value is below {LEVEL:g} after Holm's adjustment within its stage, and what the "
        f"adjustment\nfor all {len(overall)} comparisons of all stages makes of it. \\*: below {LEVEL:g} there too.\n",
        "| stage | arm | measure | difference | p | within the stage | over all |",
        "|---" * 7 + "|",
    ]
    for stage, gaps in found.items():
        within = holm({claim: gap.p for claim, gap in gaps.items()})
        for claim, gap in gaps.items():
            own, all_of_them = within[claim], overall[(stage, *claim)]
            if own < LEVEL:
                star = "\\*" if all_of_them < LEVEL else ""
                numbers = f"{gap.p:.2g} | {own:.2g} | {all_of_them:.2g}{star}"
                lines.append(f"| {stage} | {claim.arm} | {claim.title} | {_bracket(gap).strip(' ()')} | {numbers} |")
    return "\n".join(lines) + "\n"


def estimate_tables(
    name: str, stage: Stage, records: Sequence[Record], zero_shot: dict[str, float]
) -> tuple[str, Claims]:
    """What an estimate shows: differences from `t-vanilla` at the last and at the best epoch, cost, terms, probes.

    Returns:
        The tables, and of the differences those that can win or lose.
    """
    by_arm, seeds = paired(stage, records)
    first = by_arm[REFERENCE][0]
    text = [f"## {name}\n", _heading(stage, first, len(seeds), len(by_arm))]
    gaps = {(task, moment): _gaps(task, moment, by_arm) for task in stage.tasks for moment in ("last", "best")}
    claims = {
        Claim(task, arm, column.title): gap
        for task in stage.tasks
        for i, column in enumerate(measures(task)[:TESTED])
        for arm, found in gaps[task, "last"].items()
        for gap in [found[i]]
    }
    for task in stage.tasks:
        text.append(
            _table(
                task, "last", by_arm, gaps[task, "last"], zero_shot.get(task), holm({c: g.p for c, g in claims.items()})
            )
        )
        text.append(_table(task, "best", by_arm, gaps[task, "best"], zero_shot.get(task), {}))
        smart = [arm for arm in by_arm if arm.startswith("smart")]
        faulty = [arm for arm in by_arm if arm in CAUSES]
        pairs = [(smart, rival) for rival in RIVALS] + [(faulty, FAULTLESS)]
        text += [_beside(task, arms, other, by_arm) for arms, other in pairs if arms and other in by_arm]
        text.append(_terms(task, by_arm))
    if "probes" in first:
        text.append(_probes(by_arm))
    return "\n".join(text), claims


def _heading(stage: Stage, first: Record, seeds: int, arms: int) -> str:
    rows = "all that are left" if stage.rows is None else f"{stage.rows}"
    comparisons = TESTED * (arms - 1)
    return (
        f"Tasks {', '.join(stage.tasks)}; training rows a task: {rows}; seeds: {seeds}; code {first['code']}, "
        f"commit {first['commit'][:10]}.\nIn brackets the difference from {REFERENCE} and its 95 % interval. \\*: "
        f"its p-value, adjusted by Holm for {comparisons} comparisons\n"
        f"(each arm's two first columns, last epoch), is below {LEVEL:g}.\n"
    )


def _gaps(task: str, moment: str, by_arm: dict[str, list[Record]]) -> dict[str, list[Difference]]:
    """By arm the difference from the reference in each column."""
    return {
        arm: [
            difference(*(matrix(each, task, moment, column) for each in (runs, by_arm[REFERENCE])))
            for column in measures(task)
        ]
        for arm, runs in by_arm.items()
        if arm != REFERENCE
    }


def _table(
    task: str,
    moment: str,
    by_arm: dict[str, list[Record]],
    gaps: dict[str, list[Difference]],
    zero_shot: float | None,
    adjusted: Mapping[Claim, float],
) -> str:
    columns = measures(task)
    lines = [
        f"### {task}, {moment} epoch\n",
        f"| arm | {' | '.join(column.title for column in columns)} | cost |",
        "|---" * (len(columns) + 2) + "|",
    ]
    if zero_shot is not None:
        lines.append(f"| untrained | {zero_shot:.4f} |" + " |" * len(columns))
    for arm, runs in by_arm.items():
        cells = []
        for i, column in enumerate(columns):
            star = "\\*" if adjusted.get(Claim(task, arm, column.title), 1.0) < LEVEL else ""
            mean = f"{matrix(runs, task, moment, column).mean():.4f}"
            cells.append(mean + (_bracket(gaps[arm][i]) + star if arm in gaps else ""))
        lines.append(f"| {arm} | {' | '.join(cells)} | {cost(by_arm[arm], by_arm[REFERENCE]):.2f} |")
    return "\n".join(lines) + "\n"


def _beside(task: str, arms: Sequence[str], other: str, by_arm: dict[str, list[Record]]) -> str:
    """Differences of some arms from another than the reference; described, not tested."""
    columns = measures(task)[:3]
    lines = [
        f"### {task}, last epoch, beside {other}\n",
        f"| arm | {' | '.join(column.title for column in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for arm in arms:
        pairs = [[matrix(by_arm[each], task, "last", column) for each in (arm, other)] for column in columns]
        lines.append(f"| {arm} | {' | '.join(_bracket(difference(*pair)).strip(' ()') for pair in pairs)} |")
    return "\n".join(lines) + "\n"


def _bracket(gap: Difference) -> str:
    return f" ({gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}])"


def _terms(task: str, by_arm: dict[str, list[Record]]) -> str:
    """The loss of the last epoch by its terms, means over seeds: without them a weight says nothing of a strength."""
    lines = [
        f"### {task}, terms of the loss in the last epoch\n",
        "| arm | task loss | λ_s · smoothness | μ · proximal |",
        "|---" * 4 + "|",
    ]
    for arm, runs in by_arm.items():
        cells = [f"{np.mean([run['epochs'][-1]['losses'][task]['task_loss'] for run in runs]):.4f}"]
        for term, weight in (("smoothness", "lambda_s"), ("proximal", "mu")):
            values = [run["settings"][weight] * run["epochs"][-1]["losses"][task].get(term, 0.0) for run in runs]
            cells.append(f"{np.mean(values):.2g}" if any(values) else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _probes(by_arm: dict[str, list[Record]]) -> str:
    """Main metrics under perturbation, means over seeds."""
    first = by_arm[REFERENCE][0]["probes"]
    names = [(task, probe) for task, found in first.items() for probe in found]
    lines = [
        "### perturbed inputs, last epoch\n",
        f"| arm | {' | '.join(f'{task}: {probe}' for task, probe in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for arm, runs in by_arm.items():
        cells = []
        for task, probe in names:
            values = np.array([run["probes"][task][probe][TASKS[task].metric] for run in runs])[:, None]
            others = np.array([run["probes"][task][probe][TASKS[task].metric] for run in by_arm[REFERENCE]])[:, None]
            gap = "" if arm == REFERENCE else _bracket(difference(values, others))
            cells.append(f"{values.mean():.4f}{gap}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nThese intervals are over seeds; the rows are taken as they are.\n"


def search_table(name: str, stage: Stage, records: Sequence[Record]) -> str:
    """What a search has chosen, by dev, and that no arm had more trials than another."""
    check_budget(stage, records)
    level = len(stage.rungs) - 1
    lines = [
        f"## {name}\n",
        f"Trials an arm: {stage.rungs[0].trials}; chosen by dev after the last epoch. The NLL (of scores the squared "
        f"error) is that of all of them, on dev, with their first seed.\n",
        "| arm | trial | dev | NLL: least | median | largest | choice |",
        "|---" * 7 + "|",
    ]
    for arm in stage.arms:
        best = ranking(stage, records, arm, level)[0]
        runs = [r for r in records if r["arm"] == arm and r["trial"] == best]
        choice = ", ".join(f"{key} {_short(value)}" for key, value in runs[0]["choice"].items())
        first = [r for r in records if r["arm"] == arm and r["seed"] == SEARCH_SEEDS]
        losses = [_dev_loss(record) for record in first]
        spread = " | ".join(f"{number:.4f}" for number in (min(losses), np.median(losses), max(losses)))
        lines.append(f"| {arm} | {best} | {np.mean([on_dev(r) for r in runs]):.4f} | {spread} | {choice} |")
    return "\n".join(lines) + "\n"


def _dev_loss(record: Record) -> float:
    """NLL on dev after the last epoch, of scores the mean squared error, its mean over tasks; infinite if undefined."""
    found = [
        values["dev"].get("nll" if TASKS[name].kind != "score" else "mse") for name, values in record["last"].items()
    ]
    return float(np.mean([np.inf if value is None else value for value in found]))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
