"""Makes the runs of a stage on a few processes of one thread each, until none is left.

The records are the state: a run that has one is done, and one that a lost machine took is made again from its start.
Two calls at once for the same stage would make the same runs twice, to the same numbers.
"""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files import write_text, writing
from .record import Record, read, refuse_additions, refuse_mixed
from .stages import STAGES, Stage, check_budget, upcoming
from .trial import Trial, run

ALONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
"""The environment of a worker: one thread, and no bars of its own."""


def complete(
    name: str, results: Path, data: Path, *, workers: int, device: str = "cpu", encoder: str | None = None
) -> None:
    """Makes the runs of a stage that are missing.

    Args:
        name: of the stage.
        results: the folder of all records; a stage's are in a folder of its name.
        data: the data folder.
        workers: processes.
        device: where runs compute.
        encoder: as the example's `--encoder`.
    """
    stage = STAGES[name]
    folder = results / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    searched = read(results / stage.settings_from) if stage.settings_from is not None else []
    while trials := upcoming(stage, records := read(folder), searched):
        refuse_additions(records, device, str(folder))
        make(trials, folder, {"folder": data, "device": device, "encoder": encoder}, workers, name)
    if stage.rungs:
        check_budget(stage, read(folder))


def make(trials: Sequence[Trial], folder: Path, options: dict[str, Any], workers: int, note: str) -> None:
    """Makes these runs; each record is written as soon as it is there."""
    # A forked process would inherit torch's thread pool in whatever state it is.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=alone)
    with environment(ALONE), pool:  # read by the children when they start
        running: dict[Future[Record], Trial] = {pool.submit(run, trial, **options): trial for trial in trials}
        try:
            for future in tqdm(as_completed(running), total=len(running), desc=note, unit="run", disable=None):
                record = future.result()
                refuse_mixed([*read(folder), record], str(folder))  # it may be of other data than those before
                text = json.dumps(record, allow_nan=False)
                write_text(folder / f"{running[future].name}.json", text + "\n")
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            for worker in active_children():  # what they are at is lost, and may take minutes
                worker.kill()
            raise


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables of the environment for a while."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ |= values
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ |= before


def alone() -> None:
    """One thread, room for whoever else uses the machine, and no life beyond the parent's, however that ends."""
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(10)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def remaining(stage: Stage, records: Sequence[Record], searched: Sequence[Record] = ()) -> int:
    """How many runs of a stage are still to be made, the later rungs of a search counted by their sizes."""
    if not stage.rungs:
        return len(upcoming(stage, records, searched))
    before = [0, *(rung.seeds for rung in stage.rungs)]
    total = sum(rung.trials * (rung.seeds - seeds) for rung, seeds in zip(stage.rungs, before, strict=False))
    return total * len(stage.arms) - len(records)
