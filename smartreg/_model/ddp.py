"""Which passes run through `DistributedDataParallel`, and that each of them does what it should."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smartreg._model.embedding import EmbeddingPass


def bring_buffers(model: nn.Module) -> None:
    """Under DDP, what its next forward would do first: every process takes over the buffers of the first one."""
    if not isinstance(model, DistributedDataParallel):
        return
    if model._check_sync_bufs_pre_fwd():  # type: ignore[no-untyped-call]  # torch: no types
        model._sync_buffers()  # type: ignore[no-untyped-call]  # torch: no types


@contextlib.contextmanager
def through_wrapper(model: nn.Module, record: EmbeddingPass) -> Iterator[None]:
    """Under DDP every look-up of the clean pass happens inside the wrapper, or gradients are not synchronised."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    marks: list[int] = []
    handles = []
    try:
        handles.append(model.register_forward_pre_hook(lambda *_: marks.append(record.lookups)))
        handles.append(model.register_forward_hook(lambda *_: marks.append(record.lookups)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    inside = sum(marks[1::2]) - sum(marks[::2])
    if inside != record.lookups:
        raise RuntimeError(
            f"under DistributedDataParallel forward must call the module that it is given, as m(...): "
            f"{record.lookups - inside} of {record.lookups} embedding look-ups went around the wrapper, whose "
            f"gradients would not be synchronised"
        )


@contextlib.contextmanager
def around_wrapper(model: nn.Module) -> Iterator[None]:
    """A perturbed pass that ran through DDP would disturb its bookkeeping."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    handle = model.register_forward_pre_hook(_refuse_wrapper)
    try:
        yield
    finally:
        handle.remove()


def _refuse_wrapper(*_: Any) -> None:
    raise RuntimeError(
        "forward must run the module that it is given, got a call of the DistributedDataParallel wrapper in a pass "
        "that goes around it: write lambda m: m(...)"
    )
