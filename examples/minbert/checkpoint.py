"""Checkpoints that are either complete or not there.

A checkpoint is a folder `checkpoints/step-00000120` with `model.safetensors`, `state.safetensors` and `state.json`. It
is written under another name, flushed to the disk, and renamed at the end; a process killed at any moment leaves
either the checkpoint before or the new one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InputError
from .packing import pack, unpack

UNFINISHED = ".unfinished"


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


def random_state(device: torch.device) -> Tensor:
    """This process's random state as bytes: the CPU's, and on CUDA the device's after it."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Puts back what `random_state` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state[size:].clone())


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
