"""What a checkpoint holds of a run besides its weights, and going on from it where a stopped run left off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import InputError, checkpoint, distributed, run_folder
from .batching import fingerprint

if TYPE_CHECKING:
    from .train import Trainer

REPORTED = {"epoch", "losses", "train", "dev", "gap"}
"""What a line of the history is read for."""
RESTORING = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What torch raises, here and there, when it is given a state that is not its own."""


def save(trainer: Trainer, folder: Path) -> None:
    """Writes a checkpoint of a run into its folder; every process must call it."""
    random_states = distributed.random_states(trainer.place)
    bregman = trainer.objective.bregman

    def write() -> None:
        state = {
            "step": trainer.step,
            "epoch": trainer.epoch,
            "position": trainer.position,
            "history": trainer.history,
            "before": trainer.before,
            "losses": trainer.ledger.settle(),
            "epoch_seconds": trainer.epoch_seconds,
            "seconds": trainer.seconds,
            "peak_memory": trainer.memory.peak,
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.schedule.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "teacher": bregman.state_dict() if bregman is not None else None,
            "random_states": random_states,
            "data": fingerprint(trainer.trained()),
            "dev_data": fingerprint(trainer.dev_sets),
            "threads": torch.get_num_threads(),
        }
        checkpoint.save(folder, trainer.step, trainer.model.state_dict(), state)

    distributed.first_decides(trainer.place, write)


def restore(trainer: Trainer, folder: Path) -> list[str]:
    """Goes on from a checkpoint, whose model weights have been loaded already.

    Args:
        trainer: a run that has not begun.
        folder: the checkpoint's.

    Returns:
        What the user should know.

    Raises:
        InputError: it is not the state of this run, or was made on other data or with another number of processes.
    """
    state = checkpoint.load_state(folder)
    try:
        _require_same_run(trainer, state)
        same_device = _put_back(trainer, state)
    except RESTORING as error:
        raise InputError(f"{folder}: not the state of this run ({type(error).__name__}: {error})") from None
    if trainer.place.first:
        run_folder.write_history(trainer.folder, trainer.history)  # a kill may have come before its last line
    notes = []
    if not same_device:
        notes.append(
            f"the run was not on {trainer.place.device.type} before: dropout and noise are drawn anew there, so the "
            f"weights will not be those of a run that was never stopped"
        )
    threads = state.get("threads", torch.get_num_threads())
    if threads != torch.get_num_threads():
        notes.append(
            f"the run had {threads} threads, here are {torch.get_num_threads()}: sums over threads round "
            f"differently, so the weights will not be bit for bit those of a run that was never stopped; "
            f"OMP_NUM_THREADS={threads} makes them so"
        )
    return notes


def _require_same_run(trainer: Trainer, state: dict[str, Any]) -> None:
    """Raises InputError for another number of processes, or other data."""
    given = f"--resume {trainer.folder}"
    if len(state["random_states"]) != trainer.place.world:
        raise InputError(
            f"{given}: the run had {len(state['random_states'])} processes, here are {trainer.place.world}; a run goes "
            f"on with the number that it began with"
        )
    if state["data"] != fingerprint(trainer.trained()):
        raise InputError(f"{given}: the training data is not what the run began with")
    dev = fingerprint(trainer.dev_sets)
    if state.get("dev_data", dev) != dev:
        raise InputError(f"{given}: the dev data is not what the run began with")


def _put_back(trainer: Trainer, state: dict[str, Any]) -> bool:
    """Puts everything back; returns whether the random state was of this kind of device."""
    counts = [state[name] for name in ("step", "epoch", "position")]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"step, epoch and position are {counts}")
    trainer.step, trainer.epoch, trainer.position = counts
    trainer.history, trainer.before = state["history"], state["before"]
    if not all(line.keys() >= REPORTED for line in trainer.history) or len(trainer.history) != trainer.epoch:
        raise ValueError("its history is not that of its epochs")
    trainer.ledger.restore(state["losses"])
    trainer.epoch_seconds = state["epoch_seconds"]
    trainer.seconds_before = state.get("seconds", 0.0)
    trainer.memory.peak = state["peak_memory"]
    trainer.optimizer.load_state_dict(state["optimizer"])
    for parameter, moments in trainer.optimizer.state.items():
        if not all(value.shape in (parameter.shape, ()) for value in moments.values()):
            raise ValueError("the optimizer's averages have other shapes than the weights")
    trainer.schedule.load_state_dict(state["schedule"])
    trainer.scaler.load_state_dict(state["scaler"])
    if trainer.objective.bregman is not None:
        trainer.objective.bregman.load_state_dict(state["teacher"])
    return distributed.set_random_state(trainer.place, state["random_states"][trainer.place.rank])
