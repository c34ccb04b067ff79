"""The runs of a study: which there are, which are done, and how one is made."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import InputError
from ..cli import build_parser
from ..files import read_json, writing
from ..settings import TABLE, Settings, flag

SCRIPT = Path(__file__).resolve().parents[2] / "minbert_multitask.py"
CELL = ("config", "option", "seed", "init_from", "output_dir", "resume", "evaluate", "split")
"""The flags that the study sets itself: with another value, a run would not be what the table calls it."""
REPORTED = {"dev", "train", "gap", "steps", "seconds", "tasks", "epochs"}


@dataclass(frozen=True)
class Run:
    """One cell of the study."""

    mode: str
    config: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.mode}-{self.config}-seed{self.seed}"


def plan(configs: Sequence[str], modes: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """All runs, seed by seed, and pretrain before finetune, which starts from it.

    Example:
        >>> [run.name for run in plan(["vanilla"], ["pretrain", "finetune"], [0, 1])][:3]
        ['pretrain-vanilla-seed0', 'finetune-vanilla-seed0', 'pretrain-vanilla-seed1']
    """
    ordered = [mode for mode in ("pretrain", "finetune") if mode in modes]
    return [Run(mode, config, seed) for seed in seeds for config in configs for mode in ordered]


def command(run: Run, folder: Path, modes: Sequence[str], flags: dict[str, list[str]]) -> list[str]:
    """The command line of a run.

    Args:
        run: which run.
        folder: the study's folder.
        modes: the study's modes; with both, finetune starts from the pretrain run of that configuration and seed.
        flags: what the study passes on, for "all" runs and for each mode.
    """
    target = folder / "runs" / run.name
    line = [sys.executable, str(SCRIPT), "--config", run.config, "--option", run.mode, "--seed", str(run.seed)]
    common = flags["all"]
    if run.mode == "finetune" and "pretrain" in modes:
        common = _without(common, "--encoder")  # the pretrain run brings its own
        line += ["--init-from", str(folder / "runs" / Run("pretrain", run.config, run.seed).name)]
    line += ["--output-dir", str(target), *common, *flags[run.mode]]
    # A run that was cut off goes on from its checkpoint; one that never saved starts anew.
    return [*line, "--resume"] if target.exists() else line


def passed_on(text: str, given_as: str) -> list[str]:
    """The words of flags for the runs.

    Raises:
        InputError: they are no flags of a run, or one of them says what a cell of the study is.
    """
    try:
        words = shlex.split(text)
        if {"-h", "--help"} & set(words):
            raise InputError("--help: run minbert_multitask.py --help instead")
        given = vars(build_parser().parse_args(words))
    except (ValueError, InputError) as error:
        raise InputError(f"{given_as}: {error}") from None
    taken = [name for name in given if name in CELL]
    if taken:
        raise InputError(f"{given_as}: {flag(taken[0])} is what the study sets for each run; leave it out")
    return words


def result(run: Run, folder: Path, line: list[str]) -> dict[str, Any] | None:
    """The metrics of a complete run, or None.

    Args:
        run: which run.
        folder: the study's folder.
        line: its command line.

    Raises:
        InputError: they are unreadable, or those of other settings than the command line's.
    """
    file = folder / "runs" / run.name / "metrics.json"
    if not file.exists():
        return None
    try:
        metrics = read_json(file)
        settings = Settings.from_dict(metrics["settings"])
        if not metrics.keys() >= REPORTED or not isinstance(metrics["epochs"], list):
            raise InputError("it lacks " + ", ".join(sorted(REPORTED - metrics.keys())))
    except (InputError, KeyError, TypeError) as error:
        text = str(error).removeprefix(f"{file}: ")
        raise InputError(f"{file}: no metrics of a run ({text}); remove it, and the run writes it anew") from None
    given = vars(build_parser().parse_args(line[2:]))
    for name in sorted(TABLE.keys() & given.keys()):
        same = getattr(settings, name) == given[name] or TABLE[name].free_on_resume
        if name == "init_from":  # the study may have moved since
            same = settings.init_from is not None and Path(settings.init_from).name == Path(given[name]).name
        if not same:
            raise InputError(
                f"{file}: {flag(name)} is {getattr(settings, name)!r} there, but {given[name]!r} is what the study has "
                f"for {run.name}; remove the folder, and the run is made again"
            )
    return metrics


def execute(line: list[str], log: Path) -> None:
    """Makes a run; its tables go to a log, its progress to the terminal.

    Raises:
        InputError: it failed; the message names the log.
    """
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", encoding="utf-8")
    with file:
        code = subprocess.run(line, stdout=file, check=False).returncode
    if code:
        raise InputError(f"{log.stem}: ended with exit code {code}; what it printed is above and in {log}")


def _without(line: list[str], flag: str) -> list[str]:
    """The line without a flag and its value, in either spelling."""
    kept: list[str] = []
    words = iter(line)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept
