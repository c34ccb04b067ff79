"""Whether a module ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


@contextmanager
def noting_calls(module: nn.Module) -> Iterator[list[bool]]:
    """Yields a list that is not empty once the module, or any module in it, has run."""
    called: list[bool] = []

    def note(*_: Any) -> None:
        # Inside a graph there is nothing to note: what stands around the graph has run too.
        if not torch.compiler.is_compiling():
            called.append(True)

    handles = [inner.register_forward_pre_hook(note) for inner in module.modules()]
    # `module.compile()` puts the hooks inside the graph, so that the entry itself has to be watched.
    compiled = [(inner, inner._compiled_call_impl) for inner in module.modules() if inner._compiled_call_impl]
    for inner, call in compiled:
        inner._compiled_call_impl = partial(_noted, note, call)
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
        for inner, call in compiled:
            inner._compiled_call_impl = call


def _noted(note: Callable[[], None], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    note()
    return call(*args, **kwargs)
