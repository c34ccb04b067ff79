"""Run a pass again under the random state, buffers and attributes that the clean pass started from."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ABSENT = object()


class RandomState:
    """The state of the CPU generator and of one generator for each accelerator in use.

    Args:
        devices: Those in use.
        remember_draws: Passes inside `draws` copy the dropout masks of an earlier one, where all runs on the CPU.

    Attributes:
        draws: The block to run such passes in; without `remember_draws` it does nothing.
    """

    def __init__(self, devices: Iterable[torch.device], *, remember_draws: bool = False) -> None:
        self.devices = sorted({d for d in devices if _has_generator(d)}, key=str)
        self._states = self._read()
        remembers = remember_draws and not self.devices and RememberedDraws.available()
        self.draws: contextlib.AbstractContextManager[Any] = (
            RememberedDraws() if remembers else contextlib.nullcontext()
        )

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Start the block from this state, and leave the generators as they were before it."""
        before = self._read()
        self._write(self._states)
        try:
            yield
        finally:
            self._write(before)

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(_get_state(device) for device in self.devices)]

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            _set_state(device, state)


class ModuleState:
    """The buffers and plain attributes of a model, as the clean pass found and as it left them.

    Buffer objects are swapped, never written: a graph that saved one may still need it, and others (such as
    `DistributedDataParallel`) hold on to the objects. Every buffer is copied, since batch normalisation writes its
    statistics without counting it in the version of the tensor.

    Args:
        model: The unwrapped model, before the clean pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._attributes = [dict(vars(module)) for module in self._modules]
        self._buffers = _copies([module._buffers for module in self._modules])
        self.keep_clean()

    def keep_clean(self) -> None:
        """Call after the clean pass: what stands now is what the call leaves behind."""
        self._left_attributes = [dict(vars(module)) for module in self._modules]
        self._left_buffers = [dict(module._buffers) for module in self._modules]

    @contextlib.contextmanager
    def replayed(self, *, keep_attributes: bool = False) -> Iterator[None]:
        """Start the block from the state before the clean pass, and end it with the state after.

        Args:
            keep_attributes: Leave the attributes that the block assigns (they belong to the graph that lives on).
        """
        for module, attributes, buffers in zip(self._modules, self._attributes, _copies(self._buffers), strict=True):
            _restore(vars(module), attributes)
            _restore(module._buffers, buffers)
        try:
            yield
        finally:
            for module, attributes, buffers in zip(
                self._modules, self._left_attributes, self._left_buffers, strict=True
            ):
                if not keep_attributes:
                    _restore(vars(module), attributes)
                _restore(module._buffers, buffers)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient in this block, so that no pass saves anything for one."""
    trainable = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def devices_of(model: nn.Module) -> set[torch.device]:
    """Every device that holds a parameter or a buffer."""
    return {t.device for t in model.parameters()} | {t.device for t in model.buffers()}


def _restore(current: dict[str, Any], wanted: dict[str, Any]) -> None:
    present = dict(current)  # a scripted module answers with less than a dict
    for name in present.keys() - wanted.keys():
        del current[name]
    for name, value in wanted.items():
        if present.get(name, _ABSENT) is not value:
            current[name] = value


def _copies(buffers: Sequence[dict[str, Tensor | None]]) -> list[dict[str, Tensor | None]]:
    """Each buffer cloned once, so that modules which share one share its copy."""
    made: dict[Tensor | None, Tensor | None] = {None: None}
    for buffer in (buffer for named in buffers for buffer in named.values()):
        if buffer is not None and buffer not in made:
            made[buffer] = buffer.detach().clone()
    return [{name: made[buffer] for name, buffer in named.items()} for named in buffers]


def _has_generator(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta") and hasattr(torch.get_device_module(device), "get_rng_state")


def _get_state(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def _set_state(device: torch.device, state: Tensor) -> None:
    module = torch.get_device_module(device)
    if device.type == "mps":  # one generator, no device argument
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


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
