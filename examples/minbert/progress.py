"""What is watched while a run trains: the parts of the loss, the memory, and whether it is asked to stop."""

import math
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch

from . import Diverged
from .distributed import Place, joined
from .objective import Losses

MEANS = ("loss", "task_loss", "smoothness", "proximal", "start_divergence")
"""Of the rows of a batch; the largest perturbation and the number of bad examples are none."""


def diverged(what: str) -> Diverged:
    """The error that says what is no number any more, and what to do."""
    return Diverged(
        f"the run has diverged: {what}; begin again with a smaller --lr and --head-lr, with --max-grad-norm above 0, "
        f"or without --amp; checkpoints in its folder are from before"
    )


class Ledger:
    """Sums loss parts. Tensors are kept as they are and read late, so that a GPU is not made to wait at every step.

    Of several processes each notes its own rows, and all have the sums over all rows: they read at the same moments,
    and a loss that is no number in one of them ends the run in all.

    Args:
        place: among the processes.
        patience: so many losses in a row that are no numbers mean that the run has diverged.
    """

    def __init__(self, place: Place, patience: int = 1) -> None:
        self.place, self.patience, self._in_a_row = place, patience, 0
        self._pending: list[tuple[str, float, Losses, int]] = []
        self._sums: dict[str, dict[str, float]] = {}

    def add(self, task: str, losses: Losses, weight: float, step: int) -> None:
        """Notes a (micro-)batch; weights of a step sum to 1, over all processes.

        Raises:
            Diverged: on a CPU at once, on a GPU when the losses are read.
        """
        detached = Losses(
            losses.total.detach(),
            losses.task.detach(),
            None if losses.smoothness is None else losses.smoothness.detach(),
            None if losses.proximal is None else losses.proximal.detach(),
            losses.stats,
        )
        self._pending.append((task, weight, detached, step))
        if len(self._pending) >= 256 or losses.total.device.type == "cpu":
            self.settle()

    def settle(self) -> dict[str, dict[str, float]]:
        """Reads what is pending; the sums are what a checkpoint keeps.

        Raises:
            Diverged: losses were no numbers.
        """
        if not self._pending:
            return self._sums
        read = [(_weighted(losses, weight), _largest(losses)) for _, weight, losses, _ in self._pending]
        rows = torch.tensor([list(means.values()) for means, _ in read], dtype=torch.float64)
        largest = torch.tensor([largest for _, largest in read], dtype=torch.float64)
        rows, largest = joined(self.place, rows, largest)
        for (task, _, losses, step), (means, _), row, most in zip(self._pending, read, rows, largest, strict=True):
            values = dict(zip(means, row.tolist(), strict=True))
            self._watch(task, values["loss"] / values["steps"], step)
            sums = self._sums.setdefault(task, {})
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            if losses.stats is not None:
                sums["max_perturbation"] = max(sums.get("max_perturbation", 0.0), float(most))
        self._pending.clear()
        return self._sums

    def _watch(self, task: str, loss: float, step: int) -> None:
        self._in_a_row = 0 if math.isfinite(loss) else self._in_a_row + 1
        if self._in_a_row >= self.patience:
            raise diverged(f"at step {step} the loss of {task} is {loss}")

    def restore(self, sums: dict[str, dict[str, float]]) -> None:
        """Goes on from a checkpoint's sums."""
        self._pending.clear()
        self._sums = {task: dict(values) for task, values in sums.items()}

    def line(self) -> dict[str, dict[str, Any]]:
        """Means by task, and the ascent gain: mean smoothness over the mean divergence at the starting points."""
        result: dict[str, dict[str, Any]] = {}
        for task, sums in sorted(self.settle().items()):
            means: dict[str, Any] = {}
            for name in MEANS:
                if name in sums:
                    means[name] = sums[name] / sums["steps"]
            means |= {name: sums[name] for name in ("max_perturbation", "bad_examples") if name in sums}
            if means.get("start_divergence"):
                means["ascent_gain"] = means["smoothness"] / means["start_divergence"]
            result[task] = {k: v if math.isfinite(v) else None for k, v in means.items()}
        return result

    def clear(self) -> None:
        """Starts the next epoch."""
        self._pending.clear()
        self._sums = {}


def _weighted(losses: Losses, weight: float) -> dict[str, float]:
    """What is summed over batches and processes: each part by the weight of its rows, which stands under "steps"."""
    parts = {"steps": 1.0, "loss": losses.total, "task_loss": losses.task}
    parts |= {"smoothness": losses.smoothness} if losses.smoothness is not None else {}
    parts |= {"proximal": losses.proximal} if losses.proximal is not None else {}
    parts |= {"start_divergence": losses.stats.start_divergence} if losses.stats is not None else {}
    values = {name: weight * float(part) for name, part in parts.items()}
    if losses.stats is not None:  # a row of weight 0 stands in for none, and another process has it too
        values["bad_examples"] = float(losses.stats.bad_examples if weight else 0)
    return values


def _largest(losses: Losses) -> float:
    return float(losses.stats.max_perturbation) if losses.stats is not None else 0.0


def hidden(place: Place) -> bool | None:
    """`disable=` of a progress bar: other processes draw none, nor does the first where stderr is no terminal (None).

    In a file a bar would be hundreds of lines in one. tqdm's own variable counts too, which it sets aside for `None`.
    """
    return True if not place.first or os.environ.get("TQDM_DISABLE") == "1" or sys.stderr is None else None


def last_loss(losses: Losses) -> str:
    """The loss for a progress bar."""
    return f"{float(torch.as_tensor(losses.total).detach()):.3f}"


class Memory:
    """The peak: what CUDA allocated, or elsewhere the process's resident set, looked at after every step.

    (The operating system's own peak would count what came before the run, such as a test suite in the same process.)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()
        self.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def note(self) -> None:
        """Looks at the memory now."""
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device)
        else:
            now = self.process.memory_info().rss
        self.peak = max(self.peak, now)


class StopRequest:
    """While entered, SIGTERM sets `requested` instead of ending the process; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; elsewhere (a notebook's worker) SIGTERM keeps its usual meaning.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
