"""From two outputs to one number: the checks, the masks and the reductions that all divergences share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smartreg._divergences import formulas
from smartreg._divergences.blockwise import blockwise_symmetric_kl
from smartreg._masks import as_booleans, not_dense

Formula = Callable[[Tensor, Tensor], Tensor]

_REDUCTIONS = ("none", "sum", "mean")

# From this many logits on the hand-written gradient of symmetric_kl is faster than autograd's, however few the classes.
_BLOCKWISE_FROM = 2**12


def over_classes(
    formula: Formula, name: str, input: Tensor, target: Tensor, mask: Tensor | None, reduction: str
) -> Tensor:
    """Check, apply a formula that turns logits (..., C) into divergences (...), and reduce."""
    _check(name, input, target, reduction)
    if input.ndim == 0 or input.shape[-1] < 2:
        raise ValueError(
            f"{name} needs logits of shape (..., C) with C >= 2, got {tuple(input.shape)}: the softmax of a single "
            "logit is always 1. For a head with one logit use binary_symmetric_kl, or mse if it is a regression"
        )
    keep = _keep(mask, input.shape[:-1])
    # torch.compile fuses the plain formula by itself.
    if formula is formulas.symmetric_kl and input.numel() >= _BLOCKWISE_FROM and not torch.compiler.is_compiling():
        return _reduce(blockwise_symmetric_kl(input, target, keep), keep, reduction)
    input, target = _leave_out(input, target, None if keep is None else keep.unsqueeze(-1))
    return _reduce(formula(input, target), keep, reduction)


def over_elements(
    formula: Formula, name: str, input: Tensor, target: Tensor, mask: Tensor | None, reduction: str
) -> Tensor:
    """Check, apply a formula for single elements, and reduce."""
    _check(name, input, target, reduction)
    keep = _keep(mask, input.shape)
    input, target = _leave_out(input, target, keep)
    return _reduce(formula(input, target), keep, reduction)


def _check(name: str, input: Any, target: Any, reduction: Any) -> None:
    for argument, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} of {name} must be a tensor, got {type(value).__name__}")
        if kind := not_dense(value):
            raise TypeError(f"{argument} of {name} must be a dense tensor, got a {kind} one; pad or densify it")
        if not value.is_floating_point():
            raise TypeError(
                f"{argument} of {name} must be raw model outputs of a floating dtype, got {value.dtype}; "
                "class labels and predictions are not logits"
            )
    if input.shape != target.shape:
        raise ValueError(
            f"input and target of {name} must have one shape, got {tuple(input.shape)} and {tuple(target.shape)}; "
            "they are not broadcast (squeeze or expand one of them)"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")


def _keep(mask: Any, positions: torch.Size) -> Tensor | None:
    """The mask as booleans of the per-position shape."""
    if mask is None:
        return None
    expected = f"broadcast to the shape of the positions, {tuple(positions)}"
    return as_booleans("mask", mask, lambda shape: _broadcasts(shape, positions), expected).expand(positions)


def _broadcasts(shape: torch.Size, positions: torch.Size) -> bool:
    aligned = zip(reversed(shape), reversed(positions), strict=False)
    return len(shape) <= len(positions) and all(size in (1, wanted) for size, wanted in aligned)


def _leave_out(input: Tensor, target: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the computation, with equal numbers where `keep` is False.

    Replaced before anything is computed, not multiplied away after: NaN times 0 is NaN, in the gradient too.
    """
    dtype = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
    input, target = input.to(dtype), target.to(dtype)
    if keep is None:
        return input, target
    return torch.where(keep, input, 0.0), torch.where(keep, target, 0.0)


def _reduce(values: Tensor, keep: Tensor | None, reduction: str) -> Tensor:
    """Values are 0 where `keep` is False; no position at all has mean 0."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    count = max(values.numel(), 1) if keep is None else keep.sum().clamp(min=1)
    return values.sum() / count
