"""The folder of a run: how it is claimed, by one process at a time, and what is in it.

.lock              held while a process works in the folder; also the mark by which a half-made folder is known
settings.json      the settings, resolved
encoder/           config.json and tokenizer.json: with the checkpoint, all that evaluation needs
checkpoints/       the last two complete checkpoints, `step-00000120` for instance; one when the run is complete
metrics.jsonl      a line an epoch
predictions/       CSV files in the course's submission format
figures/           training curves
metrics.json       written last: a run that has it is complete
"""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import InputError, checkpoint, files
from .batching import SentenceTokenizer
from .bert import BertConfig
from .settings import TABLE, Settings, flag

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # there the folder goes without a lock, and says so

LOCK = ".lock"
MADE_FIRST = ("encoder/config.json", "encoder/tokenizer.json", "settings.json")
"""What `Hold.take` writes, in this order."""


class Hold:
    """The hold of a process on the folder of its run.

    A run that exists is locked at once; a new one gets its folder when all that it needs has been read. Under
    `torchrun` the first process alone opens and takes.

    Args:
        folder: the folder, or None for a new one under `runs/`.
        resume: whether a run that is in it goes on.
    """

    def __init__(self, folder: Path | None, resume: bool) -> None:
        self.folder, self.resume, self.taken = folder, resume, False
        self._held = ExitStack()

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def open(self) -> str:
        """The checkpoint to go on from, or "" to begin at the beginning."""
        if self.folder is None:
            return ""
        if not self.resume or not (self.folder / "settings.json").exists():
            refuse_occupied(self.folder)
            return ""
        self._held.enter_context(locked(self.folder))
        self.taken = True
        return str(checkpoint.last_sound(self.folder) or "")

    def take(self, settings: Settings, config: BertConfig, tokenizer: SentenceTokenizer) -> Path:
        """The run's folder, which is claimed, locked and filled if it is a new one; `settings.json` comes last."""
        if self.folder is None:
            self.folder = new_folder(settings)
        if not self.taken:
            with files.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            refuse_occupied(self.folder)  # before the lock's file marks it as ours
            self._held.enter_context(locked(self.folder))
            refuse_occupied(self.folder)  # another run may have been faster
            files.write_json(self.folder / "encoder" / "config.json", config.to_dict())
            files.write_text(self.folder / "encoder" / "tokenizer.json", tokenizer.to_json())
            files.write_json(self.folder / "settings.json", settings.to_dict())
        return self.folder


def new_folder(settings: Settings) -> Path:
    """Makes a folder under `runs/` that is named after configuration, option and the time.

    To make a folder is one step of the file system: of two runs that want the same name, one gets it.
    """
    name = f"{settings.config}-{settings.option}-{time.strftime('%Y%m%d-%H%M%S')}"
    runs = Path("runs")
    with files.writing(runs):
        runs.mkdir(exist_ok=True)
    for count in itertools.count(1):
        folder = runs / (name if count == 1 else f"{name}-{count}")
        with suppress(FileExistsError), files.writing(folder, but=FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def refuse_occupied(folder: Path) -> None:
    """Raises InputError unless the folder is empty, not there, or was left half-made by a run that was killed."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir {folder}: is a file; name a folder")
    # Another run may begin there at this moment: listed once, and asked for settings last, it is no stranger's folder.
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    half_made = LOCK in names and _half_made(folder)
    if (folder / "settings.json").exists():
        raise InputError(f"--output-dir {folder}: holds another run; go on with --resume, or name another folder")
    if names and not half_made:
        raise InputError(f"--output-dir {folder}: is not empty; name another folder")


def _half_made(folder: Path) -> bool:
    """Whether all that is in the folder was made by a run that was killed before `settings.json`."""
    own = {LOCK, "encoder", *MADE_FIRST, *(name + files.UNFINISHED for name in MADE_FIRST)}
    return all(path.relative_to(folder).as_posix() in own for path in folder.rglob("*"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, for as long as this one lives at most.

    The operating system gives the lock back when its holder dies, however it dies; the file itself stays.

    Raises:
        InputError: another process holds it.
    """
    with files.writing(folder / LOCK):
        file = (folder / LOCK).open("a")
    with file:
        try:
            if fcntl is None:
                raise OSError("this system has no fcntl")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--output-dir {folder}: another process is at work in it; wait for it, or name another folder"
            ) from None
        except OSError as error:  # some network file systems
            files.tell(f"note: {folder} cannot be locked ({error}); let no two runs share it")
        yield


def saved_settings(folder: Path, given_as: str) -> Settings:
    """The settings of a run, whose folder was given as this flag.

    Raises:
        InputError: the folder is no run.
    """
    file = folder / "settings.json"
    if not folder.is_dir():
        raise InputError(f"{given_as} {folder}: no such folder")
    if not file.exists():
        raise InputError(f"{given_as} {folder}: is not a run: no settings.json in it")
    values = files.read_json(file)
    try:
        return Settings.from_dict(values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def settings_to_resume(folder: Path, given: dict[str, Any], resolved: Settings) -> Settings:
    """The settings to go on with: the run's own, save for what may change; the flags given must not contradict it."""
    if not (folder / "settings.json").exists():
        refuse_occupied(folder)
        return resolved
    saved = saved_settings(folder, "--output-dir")
    free = {name: value for name, value in given.items() if TABLE[name].free_on_resume}
    for name, value in given.items():
        if name not in free and getattr(saved, name) != value:
            raise InputError(
                f"--resume {folder}: {flag(name)} is {getattr(saved, name)!r} in the run, {value!r} here; "
                f"a run goes on with the settings that it began with"
            )
    return replace(saved, **free)


def complete(folder: Path) -> bool:
    """Whether the run has its `metrics.json`; one that is empty or cut off does not count, and is written anew."""
    try:
        return {"dev", "epochs", "steps"} <= files.read_json(folder / "metrics.json").keys()
    except InputError:
        return False


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes `metrics.jsonl` anew: a resumed run must not keep the lines of epochs that it repeats."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in history)
    files.write_text(folder / "metrics.jsonl", text)
