"""The recorder and perturber: one hook on the input embedding that is inert unless a pass is under way."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smartreg._masks import not_dense


class Lookup(NamedTuple):
    """What was looked up, and in which module.

    Inputs on the CPU are copied and compared by value. On an accelerator that would wait for the device: the input
    itself is kept there, and another is the same if its address, strides and version are. Ids that `forward` computes
    anew in every pass never are, and so keep a look-up, and a gradient, of their own.
    """

    module: nn.Module
    inputs: tuple[tuple[Tensor, int], ...] | None

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...]) -> Lookup:
        """The look-up of positional tensors; of anything else nobody can say whether it is the same."""
        plain = bool(args) and all(isinstance(one, Tensor) for one in args)
        return cls(module, tuple(map(_kept, args)) if plain else None)

    def is_that_of(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether another look-up must have the same output."""
        if module is not self.module or self.inputs is None or len(args) != len(self.inputs):
            return False
        pairs = zip(args, self.inputs, strict=True)
        return all(isinstance(one, Tensor) and _is_same(one, kept) for one, kept in pairs)


def _kept(tensor: Tensor) -> tuple[Tensor, int]:
    on_cpu, versioned = tensor.device.type == "cpu", not tensor.is_inference()
    return tensor.detach().clone() if on_cpu else tensor.detach(), tensor._version if versioned else -1


def _is_same(tensor: Tensor, kept: tuple[Tensor, int]) -> bool:
    then, version = kept
    if tensor.shape != then.shape or tensor.dtype != then.dtype or tensor.device != then.device:
        return False
    if tensor.device.type == "cpu":
        return torch.equal(tensor, then)
    now = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr() == then.data_ptr() and tensor.stride() == then.stride() and now == version >= 0


class EmbeddingPass:
    """What one pass through the model does at each embedding look-up: record it, or add a perturbation to it.

    Args:
        perturbations: One for each look-up, in order, or None to record the embeddings by value.
        bases: Embeddings to perturb in place of the output of each look-up, which is then discarded.
        base_lookups: What each of them was a look-up of; another one keeps its own output.
        attached: Record the embeddings with their graph too, where they are not compiled; the model gets a copy.
    """

    def __init__(
        self,
        perturbations: Sequence[Tensor] | None = None,
        *,
        bases: Sequence[Tensor] | None = None,
        base_lookups: Sequence[Lookup] = (),
        attached: bool = False,
    ) -> None:
        self.perturbations = None if perturbations is None else list(perturbations)
        self.bases, self.base_lookups, self.attached = bases, base_lookups, attached
        self.embeddings: list[Tensor] = []
        self.lookups_of: list[Lookup] = []  # what each recorded look-up was
        self.graphs: list[Tensor] = []  # the same with their graph, if attached
        self.needs_gradient: list[bool] = []  # of each recorded look-up
        self.autocast_dtype: torch.dtype | None = None
        self.lookups = 0
        self.compiled_lookups = 0  # how many of them ran inside a graph of torch.compile

    def visit(self, output: Tensor, module: nn.Module, args: tuple[Any, ...]) -> Tensor:
        """Called with every look-up and its output; returns what the model gets to see."""
        index = self.lookups
        self.lookups += 1
        self.compiled_lookups += torch.compiler.is_compiling()
        if self.perturbations is None:
            # By value: some models add positions to the embeddings in place.
            self.needs_gradient.append(output.requires_grad)
            if not torch.compiler.is_compiling():
                self.lookups_of.append(Lookup.of(module, args))
            if self.attached and not torch.compiler.is_compiling():
                self.embeddings.append(output.detach())
                self.graphs.append(output)
                return output.clone()
            self.embeddings.append(output.detach().clone())
            return output
        if index >= len(self.perturbations):
            raise RuntimeError(
                f"forward must be repeatable: it looked the embedding up {len(self.perturbations)} times in the clean "
                f"pass and more often in a perturbed one"
            )
        stands_in = self.bases is not None and self.base_lookups[index].is_that_of(module, args)
        base = self.bases[index] if stands_in and self.bases is not None else output
        return (base + self.perturbations[index]).to(output.dtype)


# The pass under way at each hook, by the hook's number. It stands outside of the model: every tensor that torch.compile
# reaches through a module gets a static shape, and each new batch shape would be compiled anew.
_UNDER_WAY: dict[int, EmbeddingPass] = {}
_numbers = itertools.count()


class EmbeddingHook:
    """A forward hook that stays on the embedding, so that `torch.compile` traces it; inert while `active` is None.

    A copy or a pickle of the model carries a callable of the standard library in its place that does nothing: no live
    switch, and nothing that needs this package where it is loaded.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.owners = 0

    @property
    def active(self) -> EmbeddingPass | None:
        """The pass under way, if any."""
        return _UNDER_WAY.get(self.number)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            _refuse_in_backward()
        active = self.active
        if active is None:
            return None
        if not torch.compiler.is_compiling():
            _require_embeddings(module, output)
        device = output.device.type
        active.autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return active.visit(output, module, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class EmbeddingTap:
    """The hooks on the embedding modules of one model, held by one owner and shared with every other owner.

    Args:
        modules: The modules whose outputs are perturbed.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._hooks = [(module, _attached_hook(module)) for module in modules]
        for _, hook in self._hooks:
            hook.owners += 1
        self._release = weakref.finalize(self, _release, self._hooks)

    def remove(self) -> None:
        """Give the hooks up; the last owner takes them off the modules. A second call does nothing."""
        self._release()

    @property
    def removed(self) -> bool:
        return not self._release.alive

    @contextlib.contextmanager
    def open(self, embedding_pass: EmbeddingPass) -> Iterator[EmbeddingPass]:
        """Let every look-up in this block go through `embedding_pass`."""
        if any(hook.active is not None for _, hook in self._hooks):
            raise RuntimeError("forward must not call SmartLoss on the model that it was given")
        try:
            for _, hook in self._hooks:
                _UNDER_WAY[hook.number] = embedding_pass
            yield embedding_pass
        finally:
            self.close()

    def close(self) -> None:
        """Let look-ups go through nothing again."""
        for _, hook in self._hooks:
            _UNDER_WAY.pop(hook.number, None)


def _attached_hook(module: nn.Module) -> EmbeddingHook:
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, EmbeddingHook):
            return hook
        if isinstance(getattr(hook, "__self__", None), contextlib.nullcontext):
            del module._forward_hooks[key]  # what `__reduce__` left in a copy, which copies of copies would gather
    hook = EmbeddingHook()
    module.register_forward_hook(hook)
    return hook


def _release(hooks: list[tuple[nn.Module, EmbeddingHook]]) -> None:
    for module, hook in hooks:
        hook.owners -= 1
        if hook.owners == 0:
            for key in [key for key, value in module._forward_hooks.items() if value is hook]:
                del module._forward_hooks[key]


def _refuse_in_backward() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the embedding was recomputed inside a backward, where its perturbation is gone: leave the embedding out "
            "of the checkpointed part of the model, or call remove() on the SmartLoss"
        )


def _require_embeddings(module: nn.Module, output: object) -> None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"embedding must be a module that returns one floating-point tensor, got {found} from "
            f"{type(module).__name__}"
        )
    if kind := not_dense(output):
        raise TypeError(
            f"embedding must return a dense tensor, got a {kind} one from {type(module).__name__}: pad the batch, and "
            f"pass mask= for what is padding"
        )
    if output.ndim < 2:
        raise ValueError(
            f"embedding must return (batch, ..., feature), got shape {tuple(output.shape)} from {type(module).__name__}"
        )


def input_embeddings(model: nn.Module, embedding: nn.Module | str | None) -> tuple[nn.Module, ...]:
    """The modules whose outputs are perturbed.

    Args:
        model: The unwrapped model.
        embedding: A submodule, its dotted name, or None for `model.get_input_embeddings()` and every embedding module
            that holds the same weight: T5 and BART return one that is never called.

    Raises:
        TypeError: `embedding` is none of these, or stands in a scripted part of the model.
        ValueError: There is no such submodule, or the model does not tell its input embedding.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model must run in Python, where a hook can change what its embedding returns, got a scripted one: make "
            "SmartLoss from the module that was scripted, and script it after remove(), for inference"
        )
    found = _found(model, embedding)
    if any(isinstance(module, torch.jit.ScriptModule) for module in found):
        raise TypeError(
            f"embedding must run in Python, where a hook can change what it returns, got one inside of a scripted "
            f"{type(model).__name__}: leave the embedding out of the scripted part, or script after training and "
            f"after remove()"
        )
    return found


def _found(model: nn.Module, embedding: nn.Module | str | None) -> tuple[nn.Module, ...]:
    if isinstance(embedding, str):
        try:
            if not embedding:
                raise AttributeError  # the model itself, in torch's spelling
            return (model.get_submodule(embedding),)
        except AttributeError:
            raise ValueError(
                f"embedding must name a submodule of {type(model).__name__}, got {embedding!r}; {_candidates(model)}"
            ) from None
    if isinstance(embedding, nn.Module):
        if not any(module is embedding for module in model.modules() if module is not model):
            raise ValueError(
                f"embedding must be a submodule of {type(model).__name__}, got a {type(embedding).__name__} that is "
                f"none; {_candidates(model)}"
            )
        return (embedding,)
    if embedding is not None:
        raise TypeError(f"embedding must be a module, a dotted name or None, got {type(embedding).__name__}")
    told = _told(model)
    if told is None:
        raise ValueError(
            f"{type(model).__name__} does not tell its input embedding: pass embedding=, the module (or its dotted "
            f"name) whose output is perturbed; {_candidates(model)}"
        )
    return _sharing_weight(model, told)


def _told(model: nn.Module) -> nn.Module | None:
    ask = getattr(model, "get_input_embeddings", None)
    try:
        told = ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):  # the latter is how transformers says that a model has none
        return None
    return told if isinstance(told, nn.Module) else None


def _sharing_weight(model: nn.Module, told: nn.Module) -> tuple[nn.Module, ...]:
    """The embedding modules with the weight of `told`; a tied output projection is none."""
    weight = getattr(told, "weight", None)
    sharing = [
        module
        for module in model.modules()
        if module is told
        or (isinstance(weight, Tensor) and isinstance(module, nn.Embedding) and module.weight is weight)
    ]
    if all(module is not told for module in sharing):
        sharing.append(told)
    # A LoRA embedding holds the original one: perturb the outer look-up, not both.
    inner = {id(child) for module in sharing for child in module.modules() if child is not module}
    return tuple(module for module in sharing if id(module) not in inner)


def _candidates(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return f"its nn.Embedding modules are: {', '.join(names)}" if names else "it has no nn.Embedding module"
