"""Checkpoints: complete or not there, and known to be what was written.

A checkpoint is a folder with `model.safetensors`, `state.safetensors`, `state.json` and, written last, `manifest.json`
with the size and SHA-256 of the others; there is no pickle in it. It is written under another name, flushed to the
disk, and renamed at the end; a process killed at any moment leaves either the checkpoint before or the new one. The
one before is kept, for the case that the last one turns out to be damaged. Nothing else in `checkpoints/` is touched.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from . import InputError, OutputError, files
from .files import UNFINISHED

CONTENT = ("model.safetensors", "state.safetensors", "state.json")
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
KEPT = 2


def save(folder: Path, step: int, model: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the checkpoint of a step and then removes those before the last two.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        model: the model's state dict.
        state: everything else that a resumed run needs; tensors and plain values, nested.

    Raises:
        OutputError: it cannot be written; the checkpoints that were there still are.
    """
    final = folder / "checkpoints" / f"step-{step:08d}"
    unfinished = final.with_name(final.name + UNFINISHED)
    tensors: dict[str, Tensor] = {}
    plain = pack(state, tensors)
    tidy(folder, KEPT)  # what a killed process left may take the room that is needed
    try:
        with files.writing(final):
            unfinished.mkdir(parents=True, exist_ok=True)
            save_file({k: v.detach().cpu().contiguous() for k, v in model.items()}, unfinished / CONTENT[0])
            save_file(tensors, unfinished / CONTENT[1])
            (unfinished / CONTENT[2]).write_text(json.dumps(plain), encoding="utf-8")
            for name in CONTENT:
                files.flush(unfinished / name)
            files.write_json(unfinished / MANIFEST, {"files": {name: _look(unfinished / name) for name in CONTENT}})
            files.flush(unfinished)
            os.replace(unfinished, final)
            files.flush(final.parent)
    except OutputError:
        _remove(unfinished)
        raise
    tidy(folder, KEPT)


def found(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the last one first."""
    steps = {int(match[1]): path for path in _children(folder) if (match := NAME.fullmatch(path.name))}
    return [
        steps[step] for step in sorted(steps, reverse=True) if any((steps[step] / name).exists() for name in CONTENT)
    ]


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint of a run, or None."""
    return next(iter(found(folder)), None)


def tidy(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the last ones, and those that were never finished."""
    for path in found(folder)[keep:]:
        with suppress(OSError):  # under another name first: a kill must not leave half of a complete one
            os.replace(path, path.with_name(path.name + UNFINISHED))
    for path in _children(folder):
        if NAME.fullmatch(path.name.removesuffix(UNFINISHED)) and path.name.endswith(UNFINISHED):
            _remove(path)


def last_sound(folder: Path) -> Path | None:
    """The last checkpoint that is what was written, or None if there is none at all; those after it are set aside.

    Raises:
        InputError: all are damaged.
    """
    for path in found(folder):
        try:
            verify(path)
            return path
        except InputError as error:
            damage = error
        if path == found(folder)[-1]:
            raise InputError(f"{damage}; there is no checkpoint before it: start again in another folder") from None
        aside = path.with_name(f"{path.name}.damaged")
        with files.writing(aside):
            os.replace(path, aside)
        files.tell(f"note: {damage}; it is set aside as {aside.name}, the one before it is used")
    return None


def last_checkpoint(folder: Path, given_as: str) -> Path:
    """The last complete checkpoint of a run, whose folder was given as this flag.

    Raises:
        InputError: there is none, or it is damaged; an earlier one is not what the run's name stands for.
    """
    path = latest(folder)
    if path is None:
        raise InputError(f"{given_as} {folder}: the run has no checkpoint yet")
    verify(path)
    return path


def verify(checkpoint: Path) -> None:
    """Raises InputError unless all files are what was written; checkpoints of before have no manifest to tell by."""
    if not (checkpoint / MANIFEST).exists():
        for name in CONTENT:
            files.require_file(checkpoint / name)
        return
    listed = files.read_json(checkpoint / MANIFEST).get("files")
    for name in CONTENT:
        files.require_file(checkpoint / name)
        if not isinstance(listed, dict) or listed.get(name) != _look(checkpoint / name):
            raise InputError(f"{checkpoint / name}: is damaged: size or SHA-256 is not the one in {MANIFEST}")


def load_model(checkpoint: Path, expected: files.Shapes, *, others_too: bool = False) -> dict[str, Tensor]:
    """The model's state dict.

    Args:
        checkpoint: the folder.
        expected: the shapes of the model that it is for.
        others_too: whether there may be more tensors in it, which are left out.

    Raises:
        InputError: it is that of another model, or holds no numbers.
    """
    file = checkpoint / CONTENT[0]
    shapes = files.tensor_shapes(file)
    if others_too:
        shapes = {key: shape for key, shape in shapes.items() if key in expected}
    files.require_shapes(shapes, expected, file)
    weights = {key: value for key, value in files.read_tensors(file).items() if key in expected}
    files.require_finite(weights, file)
    return weights


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as state."""
    tensors = files.read_tensors(checkpoint / CONTENT[1])
    plain = files.read_json(checkpoint / CONTENT[2])
    with files.parsing(checkpoint / CONTENT[2], "state of a run"):
        return dict(unpack(plain, tensors))


def _look(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": files.sha256(file)}


def _children(folder: Path) -> list[Path]:
    place = folder / "checkpoints"
    return [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []


def _remove(checkpoint: Path) -> None:
    """Takes away what `save` made; a folder in which somebody put something else stays, with that in it."""
    with suppress(OSError):
        for name in (*CONTENT, MANIFEST, MANIFEST + UNFINISHED):
            (checkpoint / name).unlink(missing_ok=True)
        checkpoint.rmdir()


def pack(value: Any, tensors: dict[str, Tensor], path: str = "root") -> Any:
    """The JSON form of a nested value; its tensors are put into `tensors` under their path.

    `Optimizer.state_dict()` and its like nest tensors in dicts with integer keys and in tuples, neither of which JSON
    has. Floats survive exactly: JSON text carries Python's shortest exact form of each.

    Example:
        >>> import torch
        >>> tensors = {}
        >>> plain = pack({0: (1.5, torch.ones(2))}, tensors)
        >>> unpack(plain, tensors)
        {0: (1.5, tensor([1., 1.]))}
    """
    if isinstance(value, Tensor):
        # A copy on the CPU: safetensors refuses tensors that share memory.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"kind": "tensor", "value": path}
    if isinstance(value, dict):
        items = [[pack(k, tensors, path), pack(v, tensors, f"{path}.{k}")] for k, v in value.items()]
        return {"kind": "dict", "value": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {"kind": kind, "value": [pack(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: cannot be saved without pickle: {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(value, dict):
        return value
    kind, content = value["kind"], value["value"]
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    items = [unpack(v, tensors) for v in content]
    return items if kind == "list" else tuple(items)
