"""What a mask is: a tensor of booleans, or of numbers that are 0 or 1. Anything else is refused, not interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Masks = Tensor | Sequence[Tensor | None] | None
"""A mask for each tensor; a single one without a list; None for a tensor that has none."""
# Where integers have been looked at on an accelerator: the name of the argument, its device and dtype.
_looked_at: set[tuple[str, torch.device, torch.dtype]] = set()


def as_booleans(name: str, mask: object, fits: Callable[[torch.Size], bool], expected: str) -> Tensor:
    """The mask as booleans, True where something counts.

    That every number is 0 or 1 is checked on the CPU always. On an accelerator the answer takes a wait for the device:
    floating-point masks, which may be additive, are checked there always, integers the first time that an argument of
    this name has that dtype. Inside `torch.compile` and `torch.func` transforms there is no number to look at.

    Args:
        name: The argument, for messages.
        mask: What the user gave.
        fits: Whether a mask may have this shape.
        expected: The shape that it must have, in words that follow "must".

    Raises:
        TypeError: It is no tensor of booleans or real numbers, or has no values of its own.
        ValueError: It has another shape, or a number that is neither 0 nor 1.

    Examples:
        >>> as_booleans("mask", torch.tensor([1, 0]), lambda shape: len(shape) == 1, "be a vector")
        tensor([ True, False])
    """
    if not isinstance(mask, Tensor):
        remedy = "; pass torch.as_tensor(...)" if isinstance(mask, (list, tuple)) or hasattr(mask, "__array__") else ""
        raise TypeError(f"{name} must be a tensor of 0 and 1 or booleans, got {type(mask).__name__}{remedy}")
    if kind := not_dense(mask):
        raise TypeError(f"{name} must be a dense tensor of 0 and 1 or booleans, got a {kind} one; pass its to_dense()")
    if mask.is_meta or mask.is_complex():
        kind = "on the meta device, without values" if mask.is_meta else f"of {mask.dtype}"
        raise TypeError(f"{name} must be a tensor of 0 and 1 or booleans, got one {kind}")
    if not fits(mask.shape):
        raise ValueError(f"{name} must {expected}, got {tuple(mask.shape)}")
    if mask.dtype is torch.bool:
        return mask
    if _worth_a_look(name, mask):
        wrong = (mask != 0) & (mask != 1)
        if wrong.any():
            raise ValueError(
                f"{name} must hold 0 and 1 (or booleans) alone, got {mask[wrong][0].item():.4g}; an additive mask, 0 "
                f"for what counts and a large negative number elsewhere, is {name}=(additive == 0), and weights are "
                f"none"
            )
    return mask != 0


def not_dense(tensor: Tensor) -> str | None:
    """What a tensor is whose values do not lie one after the other, such as "nested"; None for a dense one."""
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")


def reading_waits(tensor: Tensor) -> bool:
    """Whether Python has to wait for a device before it knows a value."""
    return tensor.device.type != "cpu"


def _worth_a_look(name: str, mask: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    if not reading_waits(mask) or mask.is_floating_point():
        return True
    key = (name, mask.device, mask.dtype)
    seen = key in _looked_at
    _looked_at.add(key)
    return not seen


def as_sequence(name: str, given: object, *, of: type | tuple[type, ...] = object) -> list[Any]:
    """What the user gave for several things, one after the other; a tensor is for the only one.

    Args:
        name: The argument, for messages.
        given: What the user gave.
        of: What the items of a sequence may be.

    Raises:
        TypeError: It is neither a tensor nor a sequence of such items.

    Examples:
        >>> as_sequence("mask", [None, None])
        [None, None]
    """
    if isinstance(given, Tensor):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, str):
        hint = "; pass torch.as_tensor(...)" if hasattr(given, "__array__") else ""
        raise TypeError(f"{name} must be a tensor, or a sequence of tensors, got {type(given).__name__}{hint}")
    for item in given:
        if not isinstance(item, of):
            raise TypeError(
                f"{name} must be a tensor, or a sequence of tensors, got a {type(given).__name__} with a "
                f"{type(item).__name__}; pass torch.as_tensor(...)"
            )
    return list(given)
