"""The folder of a run, and its checkpoints, which are either complete or not there.

settings.json      the settings, resolved
encoder/           config.json and tokenizer.json: with the checkpoint, all that evaluation needs
checkpoints/       the last complete checkpoint, `step-00000120` for instance
metrics.jsonl      a line an epoch
metrics.json       written last: a run that has it is complete
predictions/       CSV files in the course's submission format
figures/           training curves

A checkpoint is a folder with `model.safetensors`, `state.safetensors` and `state.json`; there is no pickle in it. It is
written under another name, flushed to the disk, and renamed at the end; a process killed at any moment leaves either
the checkpoint before or the new one.
"""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import InputError
from .batching import SentenceTokenizer
from .bert import BertConfig
from .settings import TABLE, Settings, flag

UNFINISHED = ".unfinished"


def default_name(settings: Settings) -> str:
    """A new folder under `runs/`: configuration, option and the time, so that no run meets another."""
    name = f"{settings.config}-{settings.option}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, count = Path("runs") / name, 1
    while folder.exists():
        count += 1
        folder = Path("runs") / f"{name}-{count}"
    return str(folder)


def refuse_occupied(folder: Path) -> None:
    """Raises InputError unless the folder is empty or not there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir {folder}: is a file; name a folder")
    if (folder / "settings.json").exists():
        raise InputError(f"--output-dir {folder}: holds another run; go on with --resume, or name another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output-dir {folder}: is not empty; name another folder")


def prepare(folder: Path, settings: Settings, config: BertConfig, tokenizer: SentenceTokenizer) -> None:
    """Makes a new run's folder; `settings.json` comes last, so that a half-made folder is no run."""
    (folder / "encoder").mkdir(parents=True, exist_ok=True)
    write_json(folder / "encoder" / "config.json", config.to_dict())
    tokenizer.save(folder / "encoder")
    write_json(folder / "settings.json", settings.to_dict())


def saved_settings(folder: Path, given_as: str) -> Settings:
    """The settings of a run, whose folder was given as this flag.

    Raises:
        InputError: the folder is no run.
    """
    file = folder / "settings.json"
    if not folder.is_dir():
        raise InputError(f"{given_as} {folder}: no such folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected an object")
        return Settings.from_dict(values)
    except FileNotFoundError:
        raise InputError(f"{given_as} {folder}: is not a run: no settings.json in it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: unreadable ({error})") from None


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
    return replace(saved, **{**free, "device": resolved.device})


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Writes `metrics.jsonl` anew: a resumed run must not keep the lines of epochs that it repeats."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in history))


def save(folder: Path, step: int, model: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the checkpoint of a step and then removes those before it.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        model: the model's state dict.
        state: everything else that a resumed run needs; tensors and plain values, nested.
    """
    final = folder / "checkpoints" / f"step-{step:08d}"
    unfinished = final.with_name(final.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    plain = pack(state, tensors)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.items()}, unfinished / "model.safetensors")
    save_file(tensors, unfinished / "state.safetensors")
    (unfinished / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    for file in unfinished.iterdir():
        _flush(file)
    if final.exists():  # saved at this very step already, at the end of an epoch for instance
        shutil.rmtree(unfinished)
        return
    os.replace(unfinished, final)
    _flush(final.parent)
    for old in final.parent.iterdir():
        if old != final:
            shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint of a run, or None."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if not path.name.endswith(UNFINISHED)]
    return max(found, default=None)


def last_checkpoint(folder: Path, given_as: str) -> Path:
    """The last complete checkpoint of a run, whose folder was given as this flag.

    Raises:
        InputError: there is none.
    """
    found = latest(folder)
    if found is None:
        raise InputError(f"{given_as} {folder}: the run has no checkpoint yet")
    return found


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """The model's state dict."""
    return _load(checkpoint / "model.safetensors")


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as state."""
    try:
        plain = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint / 'state.json'}: unreadable ({error})") from None
    state: dict[str, Any] = unpack(plain, _load(checkpoint / "state.safetensors"))
    return state


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


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one go."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one go; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _load(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None
    return tensors


def _flush(path: Path) -> None:
    """Makes sure that a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and needs no such flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
