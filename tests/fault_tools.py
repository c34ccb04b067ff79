"""Runs of the example in which something goes wrong at a chosen moment.

Run as a script, this file is a process that has loaded the example and forks a run whenever it is told to (`Runs`):
a hundred runs then take minutes and not hours, and each is a process of its own that can be killed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """What goes wrong: a signal that the run sends itself, when it does something for the n-th time."""

    signal: str
    inside: str
    """ "training" counts optimizer steps; the others count what their function asks of the file system."""
    calls: int


class Ended(NamedTuple):
    """How a run ended: its exit code (negative for a signal), and what it wrote on stderr, without progress bars."""

    code: int
    errors: list[str]


class Runs:
    """Forks runs of the example. Use it as a context."""

    def __init__(self, scratch: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
        self.scratch = scratch
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def together(self, *runs: Sequence[object], fault: Fault | None = None, room: int | None = None) -> list[Ended]:
        """Runs that start at the same time, each with its arguments.

        Args:
            runs: the arguments of each.
            fault: what goes wrong in each.
            room: no file may become larger than so many bytes; writing on then fails as on a full disk.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"runs": [[str(word) for word in run] for run in runs], "fault": fault, "room": room}
        self.process.stdin.write(json.dumps({**request, "scratch": str(self.scratch)}) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        texts = [(self.scratch / f"stderr-{i}").read_text(errors="replace") for i in range(len(runs))]
        return [Ended(*pair) for pair in zip(codes, map(_messages, texts), strict=True)]

    def run(self, *arguments: object, fault: Fault | None = None, room: int | None = None) -> Ended:
        """One run."""
        return self.together(arguments, fault=fault, room=room)[0]


def assert_same_end(folder: Path, reference: Path, epochs: int = 2) -> None:
    """Asserts that two runs ended with the same weights and state, bit for bit, and the same metrics."""
    from safetensors.torch import load_file

    from minbert.checkpoint import latest

    ours, theirs = latest(folder), latest(reference)
    assert ours is not None
    assert theirs is not None
    assert ours.name == theirs.name
    for file in ("model.safetensors", "state.safetensors"):
        found, expected = load_file(ours / file), load_file(theirs / file)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].equal(value), (file, key)
    assert (
        json.loads((folder / "metrics.json").read_text())["dev"]
        == json.loads((reference / "metrics.json").read_text())["dev"]
    )
    timed = ("seconds", "step_seconds_median", "peak_memory_bytes")
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in timed} for line in path.read_text().splitlines()]
        for path in (folder / "metrics.jsonl", reference / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == epochs


def _messages(text: str) -> list[str]:
    lines = text.replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|.*\| \d+/\d+ \[", line)]


def install(fault: Fault) -> None:
    """Makes this process send itself the signal at the moment."""
    from minbert import checkpoint, report, run, run_folder, train

    count, depth = 0, 0

    def strike(before: Callable[[], None] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == fault.calls:
            before()
            os.kill(os.getpid(), getattr(signal, fault.signal))

    def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: around(original, *a, **k))

    if fault.inside == "training":

        def step(original: Callable[..., Any], *arguments: Any) -> Any:
            strike()
            return original(*arguments)

        wrap(train.Trainer, "_train_step", step)
        return

    def entered(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            return original(*arguments, **options)
        finally:
            depth -= 1

    def asked(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if depth:
            half = original is save_file and fault.signal == "SIGKILL"
            strike((lambda: _half_a_file(arguments[1])) if half else lambda: None)
        return original(*arguments, **options)

    save_file = checkpoint.save_file
    where = {"saving": (checkpoint, "save"), "preparing": (run_folder.Hold, "take"), "finishing": (run, "finish")}
    wrap(*where[fault.inside], entered)
    wrap(checkpoint, "save_file", asked)
    wrap(report, "training_curves", asked)
    for name in ("replace", "fsync"):
        wrap(os, name, asked)
    wrap(run_folder.fcntl, "flock", asked)


def _half_a_file(path: Path) -> None:
    path.write_bytes(b"x" * 1000)


def _child(arguments: list[str], errors: Path, fault: Fault | None, room: int | None) -> None:
    import resource

    from minbert import cli

    with errors.open("w") as file, Path(os.devnull).open("w") as nowhere:
        os.dup2(file.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    # As in a terminal: what a shell starts in the background ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    if fault is not None:
        install(fault)
    code = 1
    try:
        code = cli.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Forks what is asked for on stdin, a line a request, and answers with exit codes."""
    sys.path.insert(0, str(ROOT / "examples"))
    import torch._dynamo  # noqa: F401  # torch.optim asks for it, and it takes seconds

    import minbert.cli  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        fault = None if request["fault"] is None else Fault(*request["fault"])
        children = []
        for i, arguments in enumerate(request["runs"]):
            child = os.fork()
            if not child:
                with contextlib.suppress(OSError):
                    os.close(0)
                _child(arguments, Path(request["scratch"]) / f"stderr-{i}", fault, request["room"])
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
