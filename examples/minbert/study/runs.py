"""The runs of a study: which there are, which are done, and how one is made."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "minbert_multitask.py"


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
    line += ["--output-dir", str(target), *flags["all"], *flags[run.mode]]
    if run.mode == "finetune" and "pretrain" in modes:
        line = _without(line, "--encoder")  # the pretrain run brings its own
        line += ["--init-from", str(folder / "runs" / Run("pretrain", run.config, run.seed).name)]
    # A run that was cut off goes on from its checkpoint; one that never saved starts anew.
    return [*line, "--resume"] if target.exists() else line


def result(run: Run, folder: Path) -> dict[str, Any] | None:
    """The metrics of a complete run, or None."""
    file = folder / "runs" / run.name / "metrics.json"
    try:
        metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{file}: unreadable ({error}); remove the folder to have the run made again") from None
    return metrics


def execute(line: list[str], log: Path) -> None:
    """Makes a run; its tables go to a log, its progress to the terminal.

    Raises:
        InputError: it failed; the message names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(line, stdout=file, check=False).returncode
    if code:
        raise InputError(f"{log.stem}: ended with exit code {code}; what it printed is above and in {log}")


def _without(line: list[str], flag: str) -> list[str]:
    if flag not in line:
        return line
    at = line.index(flag)
    return line[:at] + line[at + 2 :]
