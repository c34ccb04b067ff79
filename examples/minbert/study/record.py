"""What a run leaves: one small JSON file, with a number for each held-out row and not a word of its text."""

import ast
import base64
import hashlib
import json
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import smartreg

from .. import InputError
from ..files import read_json
from ..settings import Settings

RESULTS = Path(__file__).parent / "results"
ZERO_SHOT = "zero-shot.json"
JOINT = "joint.json"
"""The `results.json` of a study of `minbert_study.py`: the five configurations, on all tasks together."""
PACKAGE, EXAMPLE = Path(smartreg.__file__).parent, Path(__file__).resolve().parents[1]
NUMBERS_FOLLOW_FROM = (
    *("batching", "bert", "data", "evaluate", "extras", "model", "objective", "optimizer", "pretrained", "settings"),
    *("tasks", "train", "study/measure", "study/methods", "study/perturbed", "study/split", "study/together"),
    "study/trial",
)
"""The files of the example that decide a run's numbers, besides all of the library's. The table of arms is not among
them: what it made of an arm stands in the record."""
SAME = ("code", "torch", "device", "data")
"""What the runs of a stage have in common, or a difference of arms would be one of these."""

HAS = {"name", "arm", "trial", "seed", "choice", "settings", "epochs", "last", "commit", *SAME}

Record = dict[str, Any]
Array = NDArray[np.float64]


def packed(values: Array) -> dict[str, Any]:
    """Numbers in a byte each, between their least and their largest, and their exact mean.

    Example:
        >>> unpacked(packed(np.array([0.0, 1.0, 1.0])))
        array([0., 1., 1.])
    """
    low, high = float(values.min()), float(values.max())
    codes = np.rint((values - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
    text = base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()
    return {"low": low, "high": high, "mean": float(values.mean()), "codes": text}


def unpacked(packed: dict[str, Any]) -> Array:
    """The numbers, to 1/255 of their range, shifted so that their mean is exact."""
    codes = np.frombuffer(zlib.decompress(base64.b64decode(packed["codes"])), np.uint8)
    values = packed["low"] + codes * ((packed["high"] - packed["low"]) / 255)
    return np.asarray(values + (packed["mean"] - values.mean()), dtype=np.float64)


def comparable(settings: Settings) -> dict[str, Any]:
    """The settings without what a machine has of its own."""
    return {key: value for key, value in settings.to_dict().items() if key not in ("data_dir", "device", "encoder")}


def code_version() -> str:
    """A hash of the code that a run's numbers follow from: comments, docstrings and layout do not enter."""
    digest = hashlib.sha256()
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py")}
    files |= {f"example/{name}": EXAMPLE / f"{name}.py" for name in NUMBERS_FOLLOW_FROM}
    for name, file in sorted(files.items()):
        digest.update(f"{name}\n{_skeleton(file)}\n".encode())
    return digest.hexdigest()[:16]


def _skeleton(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef
        ):  # an expression that is a constant does nothing
            node.body = [each for each in node.body if not _constant(each)]
    return ast.dump(tree)


def _constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def commit() -> str:
    """The commit that is checked out, with "+" if files differ from it; "none" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=EXAMPLE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(PACKAGE), str(EXAMPLE))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def read(folder: Path) -> list[Record]:
    """The records of a stage, by name.

    Raises:
        InputError: one is unreadable, or they were not made by the same code on the same data.
    """
    records: list[Record] = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: unreadable ({error}); remove it to have the run made again") from None
        if not isinstance(record, dict) or not record.keys() >= HAS:
            raise InputError(f"{file}: is not the record of a run; remove it to have the run made again")
        records.append(record)
    refuse_mixed(records, str(folder))
    return records


def read_zero_shot(results: Path) -> dict[str, float]:
    """The main metrics before any training, by task; empty if they were not measured."""
    file = results / ZERO_SHOT
    found: dict[str, float] = read_json(file) if file.exists() else {}
    return found


def read_joint(results: Path) -> dict[str, Any] | None:
    """What the study of all tasks together has left; None if it was not made."""
    file = results / JOINT
    return read_json(file) if file.exists() else None


def refuse_additions(records: Iterable[Record], device: str, where: str) -> None:
    """Raises InputError where a run made now could not be compared with the records that are there."""
    now = {"code": code_version(), "torch": torch.__version__, "device": device}
    for record in records:
        for name, own in now.items():
            if record[name] != own:
                again = (
                    f", or check out commit {record['commit'][:10]}, by which it was begun" if name == "code" else ""
                )
                raise InputError(
                    f"{where}: {record['name']} has {name} {record[name]!r}, a run made here would have {own!r}, "
                    f"and runs are compared with runs of the same only: give --results another folder to make the "
                    f"stage anew{again}"
                )


def refuse_mixed(records: Iterable[Record], where: str) -> None:
    """Raises InputError unless all records agree on `SAME`, and those of one arm and trial on their settings.

    The data are the same if each seed's are: seeds draw rows of their own.
    """
    seen: dict[tuple[Any, ...], Record] = {}
    for record in records:
        for name in SAME:
            first = seen.setdefault((name, record["seed"] if name == "data" else None), record)
            if first[name] != record[name]:
                raise InputError(
                    f"{where}: {first['name']} has {name} {first[name]!r}, {record['name']} has {record[name]!r}; "
                    "runs are compared with runs of the same only: remove the one kind, or make another stage"
                )
        first = seen.setdefault(("settings", record["arm"], record["trial"]), record)
        if {**first["settings"], "seed": 0} != {**record["settings"], "seed": 0} or first["choice"] != record["choice"]:
            raise InputError(f"{where}: {first['name']} and {record['name']} were made with different settings")
