"""Files: those of others are data, whatever is in them; those of the run are replaced in one go or not at all.

What cannot be read ends in an `InputError`, what cannot be written in an `OutputError`, each of one line. Reading is
bounded: a file that is no file (a pipe, a device), too large or nested too deeply is refused before it costs memory.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import InputError, OutputError

UNFINISHED = ".unfinished"
"""What the name of a file or folder ends with until it is whole."""
JSON_LIMIT = 16 << 20
"""Bytes of the largest JSON file that is read: Python's form of it takes twenty times as much."""
TEXT_LIMIT = 1 << 30
Shapes = dict[str, tuple[int, ...]]


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    require_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > limit:
        raise InputError(f"{path}: expected at most {limit >> 20} MiB, got more")
    return content


def require_file(path: Path) -> None:
    """Raises InputError unless the path is a regular file: a pipe would be waited for, a device read for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name that came out of another file
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: expected a file")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    content = read_bytes(path, JSON_LIMIT)
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def tell(text: str) -> None:
    """One line on stderr, in one piece, if anybody reads it; nothing ends because nobody does."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"{text}\n")  # print writes the end by itself, and another process may come between
            sys.stderr.flush()
    except BrokenPipeError:
        to_nowhere(sys.stderr)


def to_nowhere(stream: IO[str]) -> None:
    """Lets whatever is still written to a stream, and what it holds back, go nowhere: nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def parsing(path: Path, expected: str) -> Iterator[None]:
    """Whatever a parser of another project raises becomes one line: "not a readable …"."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A parser in Rust that panics raises PanicException: no subclass of Exception, and not to be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path}: not a readable {expected} ({first_line(error)})") from None


def tensor_shapes(path: Path) -> Shapes:
    """The shape of each tensor in a safetensors file, from its header alone."""
    require_file(path)
    with parsing(path, "safetensors file"), safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file."""
    require_file(path)
    with parsing(path, "safetensors file"), safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def require_shapes(found: Shapes, expected: Shapes, where: object) -> None:
    """Raises InputError unless both have the same tensors; it is asked before any memory is taken for them."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        first = f"missing {missing[0]}" if missing else f"unexpected {unknown[0]}"
        raise InputError(
            f"{where}: the weights are those of another model: "
            f"{len(missing)} missing, {len(unknown)} unexpected ({first})"
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise InputError(f"{where}: {key}: expected shape {shape}, got {found[key]}")


def require_finite(tensors: dict[str, Tensor], where: object) -> None:
    """Raises InputError where weights are no numbers: a model of them would only be heard of much later."""
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise InputError(f"{where}: {key}: expected floating-point weights, got {value.dtype}")
        if not bool(torch.isfinite(value.float()).all()):
            raise InputError(f"{where}: {key}: holds NaN or infinity; the weights are of a run that diverged")


def sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(path: Path, but: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """A full disk, a folder without permission and their like become one line that names the file."""
    try:
        yield
    except but:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"{path}: cannot be written ({reason})") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another name to write to; at the end it takes the place of `path`, or after an error nothing does."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            flush(unfinished)
            os.replace(unfinished, path)
            flush(path.parent)
    except OutputError:
        with suppress(OSError):
            unfinished.unlink()  # a disk that is full needs the room
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one go."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one go; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Makes sure that a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and needs no such flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def first_line(error: BaseException) -> str:
    """What an error of another project says, in brief."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(text: object, most: int = 2000) -> str:
    """A message as one line that any terminal can show, whatever the names and values in it hold."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[:most])
    return shown + "…" * (len(str(text)) > most)
