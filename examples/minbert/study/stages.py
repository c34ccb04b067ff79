"""The stages of the comparison, and which run comes next: a function of the records that are there.

A stage is one size of data on one set of tasks; arms are compared inside a stage only. There are two kinds. A search
tries settings of each arm by successive halving, looks at dev alone, and has seeds of its own. An estimate measures
one setting an arm, the default or what a search has chosen, on the rows held out.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .. import InputError
from ..tasks import TASKS
from .arms import ARMS, CAUSES, Choice, choice_of
from .record import Record
from .trial import Trial

SEARCH_SEEDS = 1000
"""The seeds of searches begin here: no estimate has them."""


class Rung(NamedTuple):
    """How many trials of an arm get so far, and how many seeds each has by then."""

    trials: int
    seeds: int


HALVING = (Rung(12, 1), Rung(4, 3))
SHORT = (Rung(8, 1), Rung(2, 3))


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        tasks: trained on together.
        rows: training rows a task; None for all that are not held out.
        arms: compared in it.
        seeds: of an estimate; 0 for a search.
        first_seed: of an estimate that is made again, with seeds of its own.
        rungs: of a search.
        settings_from: the search whose choices are estimated; None estimates the defaults.
        probed: whether spoilt texts, moved embeddings and CFIMDB are measured too.
        held_out: rows held out; None for the study's own number.
    """

    tasks: tuple[str, ...]
    rows: int | None
    arms: tuple[str, ...]
    seeds: int = 0
    first_seed: int = 0
    rungs: tuple[Rung, ...] = ()
    settings_from: str | None = None
    probed: bool = False
    held_out: int | None = None


FIRST = ("t-vanilla", "longer", "r-drop", "mbpp", "smart", "smart:3", "smart:30", "smart+mbpp")
# Added when two seeds of the others were known, whose answers had become less sure: is it more than that?
FIRST += ("label-smoothing", "entropy", "smart-printed")
SEARCHED = (
    *("plain", "t-vanilla", "label-smoothing", "entropy", "ema", "neftune", "l2-sp", "sam", "r-drop", "mbpp"),
    *("random-smoothing", "smart-printed", "smart-packages", "smart", "smart+mbpp"),
)
# What is judged beside the arms searched: their settings are those of the arm that they vary.
JUDGED = {"longer": "t-vanilla"}
FEW = ("plain", "t-vanilla", "ema", "r-drop", "smart", "smart+mbpp")

# One seed of a trial had shown that the default weight is as large as the task loss where outputs are scores.
FIRST_PAIRS = ("t-vanilla", "smart", "smart:0.1", "smart:0.03", "r-drop")
WEAKER = ("t-vanilla", "smart:0.1", "smart:0.03", "smart-small-ball")
# The methods that had not run, when a search of all was out of reach.
OTHERS = ("t-vanilla", "plain", "ema", "neftune", "l2-sp", "sam", "random-smoothing", "r-drop:5")
SIZES = ("t-vanilla", "smart:0.03", "r-drop:5")
TUNED = ("t-vanilla", "smart:0.03", "r-drop")
# Two plain runs cost as much as one with SMART. Pairs first: there SMART had gained.
TWO = {"para": ("t-vanilla", "two-runs", "smart:0.03"), "sst": ("t-vanilla", "two-runs", "smart:0.03", "r-drop:5")}
# At 1,024 sentences R-Drop had gained accuracy and the default weight none: would a larger one?
LARGER = ("t-vanilla", "smart:0.1", "smart", "r-drop:5")

STAGES: dict[str, Stage] = {"first": Stage(("sst",), 256, FIRST, seeds=8)}
STAGES |= {f"first-{_task}": Stage((_task,), 256, FIRST_PAIRS, seeds=8) for _task in ("sts", "para")}
STAGES["weaker-sst"] = Stage(("sst",), 256, WEAKER, seeds=8)
STAGES["others-sst"] = Stage(("sst",), 256, OTHERS, seeds=5)
for _size in (64, 1024):
    STAGES |= {f"size-{_task}-{_size}": Stage((_task,), _size, SIZES, seeds=5) for _task in ("sst", "para")}
STAGES["weights-sst-1024"] = Stage(("sst",), 1024, LARGER, seeds=5)
# Its one gain in accuracy did not stand among the comparisons of all stages: does it come again?
STAGES["again-para-1024"] = Stage(("para",), 1024, ("t-vanilla", "smart:0.03"), seeds=5, first_seed=5)
STAGES["weaker-sts"] = Stage(("sts",), 256, ("t-vanilla", "smart:0.01"), seeds=8)
STAGES |= {f"size-sts-{_size}": Stage(("sts",), _size, SIZES, seeds=5) for _size in (64, 1024)}
STAGES |= {f"two-{_task}-1024": Stage((_task,), 1024, _arms, seeds=5) for _task, _arms in TWO.items()}
STAGES["short-search-sst"] = Stage(("sst",), 256, TUNED, rungs=SHORT)
STAGES["tuned-sst"] = Stage(("sst",), 256, TUNED, seeds=8, settings_from="short-search-sst", probed=True)
for _task, _arms in (("sst", SEARCHED), ("para", FEW), ("sts", FEW)):
    _search = f"search-{_task}-256"
    STAGES[_search] = Stage((_task,), 256, _arms, rungs=HALVING)
    STAGES[f"{_task}-256"] = Stage((_task,), 256, (*_arms, "longer"), 8, settings_from=_search, probed=_task == "sst")
    STAGES[f"{_task}-64"] = Stage((_task,), 64, FEW, 5, settings_from=_search)
    STAGES[f"{_task}-1024"] = Stage((_task,), 1024, FEW, 5, settings_from=_search)
STAGES["sst-all"] = Stage(("sst",), None, ("t-vanilla", "smart+mbpp"), 2, settings_from="search-sst-256")
STAGES["causes"] = Stage(("sst",), 256, ("t-vanilla", "smart+mbpp", *CAUSES), 5)
STAGES["causes-tenth"] = Stage(("sst",), 26, ("t-vanilla", "smart+mbpp"), 5)


def upcoming(stage: Stage, records: Sequence[Record], searched: Sequence[Record] = ()) -> list[Trial]:
    """The runs that can be made now, those of one seed together; none if the stage is complete.

    Args:
        stage: the stage.
        records: what it has so far.
        searched: the records of the search that it takes settings from.
    """
    done = {record["name"] for record in records}
    if not stage.rungs:
        wanted = [
            Trial(
                arm, number, choice, seed, stage.tasks, stage.rows, judged=True, probed=stage.probed,
                held_out=stage.held_out,
            )
            for seed in range(stage.first_seed, stage.first_seed + stage.seeds)
            for arm in stage.arms
            for number, choice in [estimated(stage, arm, searched)]
        ]  # fmt: skip
        return [trial for trial in wanted if trial.name not in done]
    for level in range(len(stage.rungs)):
        wanted = rung(stage, records, level)
        missing = [trial for trial in wanted if trial.name not in done]
        if missing:
            return missing
    return []


def rung(stage: Stage, records: Sequence[Record], level: int) -> list[Trial]:
    """All runs of a rung of a search, for every arm equally many; the rung before must be complete."""
    size = stage.rungs[level]
    wanted = []
    for seed in range(SEARCH_SEEDS, SEARCH_SEEDS + size.seeds):
        for arm in stage.arms:
            numbers = range(size.trials) if level == 0 else ranking(stage, records, arm, level - 1)[: size.trials]
            wanted += [
                Trial(arm, number, choice_of(arm, number), seed, stage.tasks, stage.rows, held_out=stage.held_out)
                for number in numbers
            ]
    return wanted


def ranking(stage: Stage, records: Sequence[Record], arm: str, level: int) -> list[int]:
    """The trials of an arm that reached a rung, best first: by mean main metric on dev after the last epoch."""
    runs = defaultdict(list)
    for record in records:
        if record["arm"] == arm:
            runs[record["trial"]].append(record)
    seeds = stage.rungs[level].seeds
    scores = {
        number: sum(on_dev(record) for record in found[:seeds]) / seeds
        for number, found in runs.items()
        if len(found) >= seeds
    }
    return sorted(scores, key=lambda number: (-scores[number], number))


def on_dev(record: Record) -> float:
    """The main metric on dev after the last epoch, its mean over tasks; an undefined one counts as 0."""
    return sum(values["dev"][TASKS[name].metric] or 0.0 for name, values in record["last"].items()) / len(
        record["last"]
    )


def estimated(stage: Stage, arm: str, searched: Sequence[Record]) -> tuple[int, Choice]:
    """The trial number and the choice that an arm is estimated with."""
    if stage.settings_from is None:
        return 0, choice_of(arm, 0)
    search, like = STAGES[stage.settings_from], JUDGED.get(arm, arm)
    if upcoming(search, searched):
        raise InputError(f"{stage.settings_from}: is not complete, and this stage takes its settings from it")
    number = ranking(search, searched, like, len(search.rungs) - 1)[0]
    return number, ARMS[arm].choice | choice_of(like, number)


def check_budget(stage: Stage, records: Sequence[Record]) -> None:
    """Raises InputError unless every arm of a search has had as many trials and runs as the others."""
    counts = {arm: sorted(r["trial"] for r in records if r["arm"] == arm) for arm in stage.arms}
    sizes = {arm: (len(set(trials)), len(trials)) for arm, trials in counts.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{arm} {trials} in {runs} runs" for arm, (trials, runs) in sizes.items())
        raise InputError(f"the arms have had unequal numbers of trials: {listed}")
