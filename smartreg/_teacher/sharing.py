"""Modules and parameters beside a model that share some of its storage."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from smartreg._teacher.parameters import Layout, differences, is_sharded, listed, pair
from smartreg._warnings import warn
from smartreg._wrappers import in_reach, innermost


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy in which frozen parameters are views and buffers are the model's own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.requires_grad and id(parameter) not in memo:
                memo[id(parameter)] = view_of(parameter)
        memo.update((id(buffer), buffer) for buffer in module._buffers.values() if buffer is not None)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(
            f"a {type(model).__name__} as it is now cannot be copied for a teacher ({error}). Make the teacher before "
            f"sharding or the first forward, and pass it as teacher="
        ) from error
    warn_of_functions(copied, model)
    return copied


def warn_of_functions(copied: nn.Module, model: nn.Module) -> None:
    """Warn if a forward that was replaced on an object holds modules of the model: a copy of it runs those.

    `deepcopy` makes a method that of the copy, and leaves a function with its closure as it is. Hooks are not judged:
    many only read what they hold, and one that runs it is found out when it does.
    """
    originals = {id(module) for module in model.modules() if any(p.requires_grad for p in module.parameters())}
    for name, module in copied.named_modules():
        held = [getattr(value, "__self__", value) for value in in_reach(vars(module).get("forward"))]
        found = next((value for value in held if id(value) in originals), None)
        if found is not None:
            warn(
                f"the teacher, a copy, holds modules of the model: the forward of {name or type(module).__name__} was "
                f"replaced on the object by a function with the model's own {type(found).__name__} in it, and where it "
                f"runs that the penalty compares the model with itself. Replace it on the class, or pass teacher= "
                f"made before"
            )
            return


def checked_teacher(model: nn.Module, module: nn.Module) -> nn.Module:
    """A teacher that the user made, if it fits the model.

    Raises:
        TypeError: It is no module.
        ValueError: Its parameters are not those of the model, or it would be the model in part.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"teacher must be a module or None, got {type(module).__name__}")
    if innermost(module) is model:
        raise ValueError("teacher must be another module than model, got the model itself: pass a copy of it or None")
    layouts = Layout(model), Layout(module)
    students = {id(part) for part in layouts[0].modules.values()}
    held = [name for name, part in layouts[1].modules.items() if id(part) in students]
    if held:
        # Its mode would be the teacher's, and its buffers too.
        raise ValueError(
            f"teacher must not hold modules of the model, got its {listed(held)}; pass a copy, whose frozen parameters "
            f"are then shared"
        )
    different = differences(*layouts)
    if different:
        raise ValueError(f"teacher must have the parameters of the model: {different}")
    aliased = [
        name for name, (student, own) in pair(*layouts).items() if student.requires_grad and moves_along(own, student)
    ]
    if aliased:
        raise ValueError(
            f"teacher must not share what the model trains, or it would follow at once: {listed(aliased)}; pass a copy"
        )
    return module


def view_of(parameter: nn.Parameter) -> nn.Parameter:
    """The storage of a frozen parameter in a parameter that nobody can thaw through the model."""
    return parameter if _has_own_class(parameter) else nn.Parameter(parameter.detach(), requires_grad=False)


def is_view(view: nn.Parameter, parameter: nn.Parameter) -> bool:
    """Whether the first is what `view_of` makes of the second."""
    if view is parameter or _has_own_class(parameter):
        return view is parameter and _has_own_class(parameter)
    ours, theirs = _local(view), _local(parameter)
    return (ours.data_ptr(), ours.dtype, ours.device) == (theirs.data_ptr(), theirs.dtype, theirs.device)


def moves_along(teacher: nn.Parameter, student: nn.Parameter) -> bool:
    """Whether a change of the second in place changes the first."""
    ours, theirs = _local(teacher), _local(student)
    return ours.numel() > 0 and ours.data_ptr() == theirs.data_ptr()


def can_share(student: nn.Parameter, own: nn.Parameter) -> bool:
    """Whether sharing a frozen parameter would leave the teacher's values as they are."""
    if own is student or is_view(own, student):
        return True
    if is_sharded(student) or is_sharded(own):
        return False  # shards that are equal in one process may differ in another, and all must decide alike
    alike = (own.dtype, own.device, type(own)) == (student.dtype, student.device, type(student))
    return alike and torch.equal(student, own)


def own_copy(parameter: nn.Parameter) -> nn.Parameter:
    """The values of a parameter in a frozen one with a storage of its own."""
    copied: nn.Parameter = copy.deepcopy(parameter)
    copied.requires_grad_(False)
    return copied


def reshard(model: nn.Module) -> None:
    """Gives the modules of FSDP2 their shards back.

    Between a forward and the end of its backward the outermost one holds whole weights instead, which are no place for
    an average: they are dropped. A backward that still needs them gathers them again.
    """
    for module in model.modules():
        kind: Any = type(module)  # sharding replaces the class of a module
        if hasattr(kind, "reshard") and hasattr(kind, "unshard"):
            kind.reshard(module)


def _has_own_class(parameter: nn.Parameter) -> bool:
    """Whether it is of a subclass of Parameter, such as quantized ones, whose state a view would lose."""
    return nn.Parameter in type(parameter).__mro__[1:]


def _local(parameter: nn.Parameter) -> Tensor:
    """Of a DTensor the shard that this process holds."""
    tensor: Any = parameter
    local: Tensor = tensor.to_local() if is_sharded(parameter) else tensor.detach()
    return local
