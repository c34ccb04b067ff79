"""Run a pass again under the random state, buffers and attributes that the clean pass started from."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.utils._python_dispatch import TorchDispatchMode

from smartreg._model.held import HeldState, replaced, restore
from smartreg._model.sources import has_generator, other_sources, torch_sources


class RandomState:
    """The state of every generator that a pass may draw from: torch's, Python's, numpy's, and those of the modules.

    Args:
        devices: The accelerators in use; each has a generator of its own.
        held: Generators that modules hold.
        shared: Whether `replayed` does anything: passes see the dropout masks of the first one.
        remember_draws: Passes inside `draws` copy the dropout masks of an earlier one, where all runs on the CPU.

    Attributes:
        draws: The block to run such passes in; without `remember_draws` it does nothing.
    """

    def __init__(
        self,
        devices: Iterable[torch.device],
        held: Iterable[Any] = (),
        *,
        shared: bool = True,
        remember_draws: bool = False,
    ) -> None:
        self.shared = shared
        self.devices = sorted({d for d in devices if has_generator(d)}, key=str)
        self._always = torch_sources(self.devices)
        self._others = other_sources(held)
        self._states = [source.read() for source in (*self._always, *self._others)]
        remembers = remember_draws and shared and not self.devices and RememberedDraws.available()
        self.draws: contextlib.AbstractContextManager[Any] = (
            RememberedDraws() if remembers else contextlib.nullcontext()
        )

    def keep_clean(self) -> None:
        """Call after the clean pass: of the generators that are not torch's, those that it left alone stay alone."""
        pairs = list(zip(self._others, self._states[len(self._always) :], strict=True))
        used = [(source, state) for source, state in pairs if not source.is_at(state)]
        self._others = [source for source, _ in used]
        self._states = [*self._states[: len(self._always)], *(state for _, state in used)]

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Start the block from this state, and leave the generators as they were before it."""
        if not self.shared:
            yield
            return
        sources = [*self._always, *self._others]
        before = [source.read() for source in sources]
        try:
            for source, state in zip(sources, self._states, strict=True):
                source.write(state)
            yield
        finally:
            for source, state in zip(sources, before, strict=True):
                source.write(state)

    @contextlib.contextmanager
    def sharing(self, shared: bool = True) -> Iterator[None]:
        """In this block passes see the dropout masks of the clean one, or not, whatever the setting says."""
        before, self.shared = self.shared, shared
        try:
            yield
        finally:
            self.shared = before


class ModuleState:
    """The buffers and plain attributes of a model, as the clean pass found and as it left them.

    Buffer objects are swapped, never written: a graph that saved one may still need it, and others (such as
    `DistributedDataParallel`) hold on to the objects. Every buffer is copied, since batch normalisation writes its
    statistics without counting it in the version of the tensor.

    Args:
        model: The unwrapped model, before the clean pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.held = HeldState(model)
        self._modules = list(model.modules())
        self._attributes = [dict(vars(module)) for module in self._modules]
        self._buffers = _copies([module._buffers for module in self._modules])
        self._note_left()

    def keep_clean(self) -> None:
        """Call after the clean pass: what stands now is what the call leaves behind."""
        self.held.keep_clean()
        self._note_left()

    def _note_left(self) -> None:
        self._left_attributes = [dict(vars(module)) for module in self._modules]
        self._left_buffers = [dict(module._buffers) for module in self._modules]

    @contextlib.contextmanager
    def replayed(self, *, keep_attributes: bool = False, now: bool = False) -> Iterator[None]:
        """Start the block from the state before the clean pass, and end it with the state after.

        Args:
            keep_attributes: Leave the attributes that the block assigns (they belong to the graph that lives on).
            now: Start from the state after the clean pass instead.
        """
        attributes_of = self._left_attributes if now else self._attributes
        fresh = self.held.fresh(now=now)
        with self.held.replayed(fresh, keep=keep_attributes, now=now):
            try:
                buffers = _copies(self._left_buffers if now else self._buffers)
                for module, attributes, own in zip(self._modules, attributes_of, buffers, strict=True):
                    restore(vars(module), _with(attributes, fresh))
                    restore(module._buffers, own)
                yield
            except BaseException:
                self.leave()
                raise
            self.leave(keep_attributes=keep_attributes)
            if keep_attributes and fresh:
                originals = self.held.originals(fresh)
                for module in self._modules:
                    restore(vars(module), _with(dict(vars(module)), originals))

    def leave(self, *, keep_attributes: bool = False) -> None:
        """Attributes and buffers as the clean pass left them."""
        for module, attributes, buffers in zip(self._modules, self._left_attributes, self._left_buffers, strict=True):
            if not keep_attributes:
                restore(vars(module), attributes)
            restore(module._buffers, buffers)


@contextlib.contextmanager
def undone(model: nn.Module, generators: Iterable[Any] = ()) -> Iterator[None]:
    """At the end of this block the model, and every generator of random numbers, is as before it.

    Args:
        model: The unwrapped model.
        generators: Others than those that it holds.
    """
    state = ModuleState(model)
    with RandomState(devices_of(model), [*state.held.generators, *generators]).replayed(), state.replayed():
        yield


def _with(attributes: dict[str, Any], instead: dict[int, Tensor]) -> dict[str, Any]:
    return {name: replaced(value, instead) for name, value in attributes.items()} if instead else attributes


class Stilled:
    """A model of which no module's backward hook fires, and whose parameters need no gradient if they are frozen.

    Nothing is set before `hold`, so that an interruption finds the block that releases already entered.

    Args:
        model: The unwrapped model.
        freeze: No parameter requires a gradient, so that no pass saves anything for one.
    """

    def __init__(self, model: nn.Module, *, freeze: bool) -> None:
        self._trainable = [p for p in model.parameters() if p.requires_grad and p.is_leaf] if freeze else []
        self._hooks = [(hooks, dict(hooks)) for hooks in backward_hooks(model)]

    def hold(self) -> None:
        """Begin."""
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        for hooks, _ in self._hooks:
            hooks.clear()

    def release(self) -> None:
        """Put everything back; a second time does nothing."""
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for hooks, kept in self._hooks:
            hooks.update(kept)


def backward_hooks(model: nn.Module) -> list[dict[int, Any]]:
    """The dicts that hold hooks on the backward of modules, those for all modules included, without the empty ones."""
    everywhere = (modules_of_torch._global_backward_pre_hooks, modules_of_torch._global_backward_hooks)
    own = [hooks for module in model.modules() for hooks in (module._backward_pre_hooks, module._backward_hooks)]
    return [hooks for hooks in (*everywhere, *own) if hooks]


def devices_of(model: nn.Module) -> set[torch.device]:
    """Every device that holds a parameter or a buffer."""
    return {t.device for t in model.parameters()} | {t.device for t in model.buffers()}


def _copies(buffers: Sequence[dict[str, Tensor | None]]) -> list[dict[str, Tensor | None]]:
    """Each buffer cloned once, so that modules which share one share its copy."""
    made: dict[Tensor | None, Tensor | None] = {None: None}
    for buffer in (buffer for named in buffers for buffer in named.values()):
        if buffer is not None and buffer not in made:
            made[buffer] = buffer.detach().clone()
    return [{name: made[buffer] for name, buffer in named.items()} for named in buffers]


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
