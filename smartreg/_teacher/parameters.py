"""The parameters of a model under names that no wrapper changes, so that two models can be paired."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Names of the one child of torch.compile, of FullyShardedDataParallel and of the activation checkpoint wrapper.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class Layout:
    """Every module and parameter of a model under its name without wrappers, and whether that is still true.

    A parameter held by several modules stands under each of its names: tied weights can be told by identity. Walking a
    model takes longer than moving a small teacher, so that a layout is kept and asked whether it `is_current`.

    Attributes:
        modules: From name to module; of a wrapper and what it wraps, the latter.
        parameters: From name to parameter.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
        >>> model[0] = torch.compile(model[0], backend="eager")
        >>> [name for name, _ in model.named_parameters()]
        ['0._orig_mod.weight', '0._orig_mod.bias']
        >>> layout = Layout(model)
        >>> list(layout.parameters)
        ['0.weight', '0.bias']
        >>> model[1] = torch.nn.Linear(2, 2)
        >>> layout.is_current()
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        # The dictionaries in which all modules, wrappers too, keep their parameters and their children.
        self._held: list[dict[str, Any]] = []
        self._walk(model, "", set())
        self.parameters: dict[str, nn.Parameter] = {
            f"{prefix}{name}": parameter
            for prefix, module in self.modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self._remember()

    def _walk(self, module: nn.Module, prefix: str, above: set[int]) -> None:
        if id(module) in above:  # a module that holds one of its own holders
            return
        self.modules[prefix] = module
        self._held += [module._parameters, module._modules]
        is_parallel = isinstance(module, (DistributedDataParallel, DataParallel))
        for name, child in module._modules.items():
            if child is not None:
                is_wrapped = name in _WRAPPED or (is_parallel and name == "module")
                self._walk(child, prefix if is_wrapped else f"{prefix}{name}.", above | {id(module)})

    def _remember(self) -> None:
        self._sizes = list(map(len, self._held))
        self._entries = list(chain.from_iterable(map(dict.values, self._held)))

    def is_current(self) -> bool:
        """Whether the model still has these very modules and parameters."""
        if list(map(len, self._held)) != self._sizes:
            return False
        # One loop in C: after an update of a large model nothing of this is in the cache.
        return all(map(is_, chain.from_iterable(map(dict.values, self._held)), self._entries))

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Puts `new` wherever the model has `old`."""
        for module in self.modules.values():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new
        self.parameters = {name: new if p is old else p for name, p in self.parameters.items()}
        self._remember()


class Pair(NamedTuple):
    """Two parameters of one name."""

    model: nn.Parameter
    teacher: nn.Parameter


def pair(model: Layout, teacher: Layout) -> dict[str, Pair]:
    """Each distinct parameter of the teacher with the model's of that name; tied weights stand under their first name.

    Both layouts must agree: see `differences`.
    """
    names = _names(teacher)
    return {first: Pair(model.parameters[first], teacher.parameters[first]) for first, *_ in names}


def differences(model: Layout, teacher: Layout) -> str:
    """What keeps two layouts from being paired, in words; empty if nothing does.

    Examples:
        >>> import torch
        >>> differences(Layout(torch.nn.Linear(2, 2, bias=False)), Layout(torch.nn.Linear(2, 3)))
        'only in the teacher: bias; of another shape: weight is (2, 2) in the model, (3, 2) in the teacher'
    """
    ours, theirs = model.parameters, teacher.parameters
    both = ours.keys() & theirs.keys()
    shapes = {name: (tuple(ours[name].shape), tuple(theirs[name].shape)) for name in both}
    # A teacher may hold two copies of what the model ties, but not the other way round: which would it follow?
    untied = [tied for tied in _names(teacher) if both.issuperset(tied) and len({id(ours[name]) for name in tied}) > 1]
    parts = {
        "only in the model": listed(ours.keys() - both),
        "only in the teacher": listed(theirs.keys() - both),
        "of another shape": listed(
            f"{name} is {mine} in the model, {other} in the teacher"
            for name, (mine, other) in shapes.items()
            if mine != other
        ),
        "sharded in one of the two alone": listed(
            name for name in both if is_sharded(ours[name]) != is_sharded(theirs[name])
        ),
        "tied in the teacher alone": listed(" = ".join(tied) for tied in untied),
    }
    return "; ".join(f"{what}: {names}" for what, names in parts.items() if names)


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which a process holds a part."""
    return hasattr(parameter, "to_local")


def listed(names: Iterable[str]) -> str:
    """Names in a stable order, for an error message."""
    return ", ".join(sorted(names))


def _names(layout: Layout) -> list[list[str]]:
    """The names of each distinct parameter."""
    found: dict[int, list[str]] = {}
    for name, parameter in layout.parameters.items():
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())
