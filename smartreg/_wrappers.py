"""What wraps a model (DDP, `torch.compile`) or a function: what is inside, and whether it ran."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from types import FunctionType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Method = TypeVar("Method", bound=Callable[..., Any])


def innermost(model: nn.Module) -> nn.Module:
    """The user's own module: what stands inside `DistributedDataParallel`, `DataParallel` and `torch.compile`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> innermost(torch.compile(model, backend="eager")) is model
        True
    """
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def without_ddp(model: nn.Module) -> nn.Module:
    """What the passes after the clean one run through: the model without `DistributedDataParallel`, still compiled.

    Raises:
        RuntimeError: The order of the wrappers is one under which gradients or random masks would be silently wrong.
    """
    if isinstance(model, DataParallel):
        raise RuntimeError(
            "SmartLoss needs one module a process, got torch.nn.DataParallel, whose replicas live for one forward; "
            "use DistributedDataParallel"
        )
    if "opacus" in sys.modules and any(_takes_gradients_of_examples(module) for module in model.modules()):
        raise RuntimeError(
            f"SmartLoss cannot run inside of Opacus, got {type(model).__name__}: the gradient of each example would "
            f"have to come from one pass, and a call makes several. Train without PrivacyEngine, or without SmartLoss"
        )
    if _is_optimized(model) and isinstance(model.get_submodule("_orig_mod"), DistributedDataParallel):
        raise RuntimeError(
            "SmartLoss cannot take DistributedDataParallel off inside torch.compile: got "
            "torch.compile(DistributedDataParallel(model)), expected DistributedDataParallel(torch.compile(model))"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, from wrappers in an order that `without_ddp` accepts."""
    return innermost(without_ddp(model))


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model runs through `torch.compile`."""
    return any(_is_optimized(m) or m._compiled_call_impl is not None for m in model.modules())


def _takes_gradients_of_examples(module: nn.Module) -> bool:
    # Told by where its class comes from, so that Opacus need not be imported.
    places = ("opacus.grad_sample", "opacus.distributed")
    return any(cls.__module__.startswith(places) for cls in type(module).__mro__)


def _is_optimized(module: nn.Module) -> bool:
    # torch._dynamo takes longer to import than torch itself, and while nobody has imported it nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def outside_graphs(method: Method) -> Method:
    """Splits a compiled training step at this method: hooks and replayed passes are not for a graph."""

    @wraps(method)
    def split(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*arguments, **options)  # type: ignore[no-untyped-call]  # torch: no types
        return method(*arguments, **options)

    return cast(Method, split)


def code_of(function: Any) -> object:
    """The code that a function runs, which a lambda in a loop shares with the one of the step before.

    Examples:
        >>> first, second = [lambda: 1 for _ in range(2)]
        >>> first is second, code_of(first) is code_of(second)
        (False, True)
    """
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)  # of a bound method, which is another object every time too
    if hasattr(function, "__code__") or isinstance(function, nn.Module):
        return getattr(function, "__code__", function)
    # An object with `__call__` may be made anew for every batch, hold it, and have no hash.
    return getattr(type(function).__call__, "__code__", type(function))


def in_reach(hook: Any) -> Iterator[Any]:
    """What a function holds and names: arguments of a partial, its object's attributes, closure, defaults, globals."""
    while isinstance(hook, partial):
        yield from (*hook.args, *hook.keywords.values())
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    owner = getattr(hook, "__self__", None if isinstance(hook, FunctionType) else hook)
    if hasattr(owner, "__dict__") and not isinstance(owner, (nn.Module, ModuleType)) and not _of_a_framework(owner):
        yield vars(owner)
    if isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # nothing in it yet
                yield cell.cell_contents
        yield from function.__defaults__ or ()
        yield from (function.__globals__.get(name) for name in function.__code__.co_names)


def _of_a_framework(owner: object) -> bool:
    """Those keep state between passes on purpose, and know how often they ran."""
    return type(owner).__module__.split(".")[0] in ("accelerate", "deepspeed", "peft", "smartreg", "torch")


@contextmanager
def noting_calls(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yields a list of those of the modules that have run, in the order of their calls."""
    called: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        # Inside a graph there is nothing to note: what stands around the graph has run too.
        if not torch.compiler.is_compiling():
            called.append(module)

    watched = list(modules)
    handles = [module.register_forward_pre_hook(note) for module in watched]
    # `module.compile()` puts the hooks inside the graph, so that the entry itself has to be watched.
    compiled = [(module, module._compiled_call_impl) for module in watched if module._compiled_call_impl]
    for module, call in compiled:
        module._compiled_call_impl = partial(_noted, partial(note, module), call)
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
        for module, call in compiled:
            module._compiled_call_impl = call


def _noted(note: Callable[[], None], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    note()
    return call(*args, **kwargs)
