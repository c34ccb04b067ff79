"""Dropout masks on the CPU, drawn once for every state of the generator: a replay copies those of the clean pass."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WORTHWHILE_ENTRIES = 2**17
"""Size of an embedded batch from which drawing takes longer than looking at every operation for a draw."""

_bernoulli = torch.ops.aten.bernoulli_.float


def worth_remembering(embeddings: Iterable[Tensor]) -> bool:
    """Whether remembering the draws of a pass over this batch saves time."""
    return sum(embedded.numel() for embedded in embeddings) >= WORTHWHILE_ENTRIES


class RememberedDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it without types
    """In this block a Bernoulli draw that was made before, from the same state of the CPU generator, is copied.

    On most processors torch draws these numbers one after the other, so that dropout takes a good part of a pass; and a
    replayed pass draws the very numbers of the clean one. A draw is found by the whole state of the generator, which is
    then set to what drawing would have left: whatever else a pass draws and however it branches, what it sees and what
    it leaves behind is as without this block.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self._draws: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # to the mask, and the state after

    @classmethod
    def available(cls) -> bool:
        """Not under a torch without this method, where such a block may switch `torch.compile` off."""
        return hasattr(TorchDispatchMode, "ignore_compile_internals")

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts run compiled, and draw for themselves."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, unless it is a draw that can be copied."""
        if func is not _bernoulli or kwargs or type(args[0]) is not Tensor or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        drawn, *probability = args
        state = torch.get_rng_state()
        content = ctypes.string_at(state.data_ptr(), state.nbytes)
        key = (content, drawn.dtype, drawn.shape, drawn.stride(), *probability)
        if key in self._draws:
            mask, after = self._draws[key]
            torch.set_rng_state(after)
            return drawn.copy_(mask)
        func(*args)
        self._draws[key] = drawn.to(torch.bool, copy=True), torch.get_rng_state()  # copied: the caller may write to it
        return drawn
