"""From what a model returned to the tensors that a divergence compares, and from those to one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OutputToLogits = Callable[[Any], Tensor | Sequence[Tensor]]

_HINT = "pass output_to_logits, a function from the output of `forward` to the tensor (or tensors) to compare"


def check_output_to_logits(output_to_logits: object) -> None:
    """Raises a `TypeError` unless the argument is None or can be called."""
    if output_to_logits is not None and not callable(output_to_logits):
        raise TypeError(
            f"output_to_logits must be None or a function of the output, got {type(output_to_logits).__name__}"
        )


def compared_tensors(output: object, output_to_logits: OutputToLogits | None = None) -> tuple[Tensor, ...]:
    """The tensors to compare in the output of a model.

    Args:
        output: What `forward` returned. Without `output_to_logits` it is a tensor, an object with `.logits`,
            or a mapping with `"logits"`.
        output_to_logits: A function of the output that returns a tensor or a sequence of tensors, such as
            `lambda out: (out.start_logits, out.end_logits)`; the divergences of a sequence are summed.

    Returns:
        One or more floating-point tensors of any shape.

    Raises:
        TypeError: No tensor can be taken from the output, or it is not of a floating-point dtype.
        ValueError: `output_to_logits` returned an empty sequence.

    Example:
        >>> compared_tensors({"loss": None, "logits": torch.tensor([0.5, -0.5])})
        (tensor([ 0.5000, -0.5000]),)
    """
    tensors = _logits(output) if output_to_logits is None else _extracted(output, output_to_logits)
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"the tensor to compare must be floating-point, got {tensor.dtype}; {_HINT}")
    return tensors


def divergence_of(
    divergence: Callable[[Tensor, Tensor], Tensor], first: tuple[Tensor, ...], second: tuple[Tensor, ...]
) -> Tensor:
    """The sum of ℓ(first_k, second_k) over the compared tensors k.

    Args:
        divergence: A function ℓ of two tensors of one shape that returns a scalar.
        first: What is passed as ℓ's first argument (perturbed, or student), from `compared_tensors`.
        second: What is passed as its second argument (clean, or teacher), of the same number and shapes.

    Returns:
        A scalar tensor, on the graphs of both.

    Raises:
        TypeError: The divergence returned something else than a floating-point tensor.
        ValueError: The divergence returned no scalar, or the two passes differ in the number or shapes of tensors.

    Example:
        >>> absolute = lambda a, b: (a - b).abs().mean()
        >>> divergence_of(absolute, (torch.ones(2), torch.ones(3)), (torch.zeros(2), torch.zeros(3)))
        tensor(2.)
    """
    if len(first) != len(second):
        raise ValueError(
            f"two passes of one model must return the same number of tensors to compare, got {len(first)} and "
            f"{len(second)}; output_to_logits must not depend on the pass"
        )
    terms = [_scalar(divergence, a, b) for a, b in zip(first, second, strict=True)]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _logits(output: object) -> tuple[Tensor, ...]:
    if isinstance(output, Tensor):
        return (output,)
    if hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, Mapping) and "logits" in output:
        logits = output["logits"]
    else:
        raise TypeError(
            f"forward must return a tensor, an object with .logits or a mapping with 'logits', "
            f"got {type(output).__name__}; {_HINT}"
        )
    if logits is None:
        raise TypeError(
            f"the logits of the returned {type(output).__name__} are None, as fused cross-entropy kernels leave them: "
            f"switch those kernels off, or {_HINT}"
        )
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the logits of the returned {type(output).__name__} must be a tensor, got {type(logits).__name__}; {_HINT}"
        )
    return (logits,)


def _extracted(output: object, output_to_logits: OutputToLogits) -> tuple[Tensor, ...]:
    value = output_to_logits(output)
    if isinstance(value, Tensor):
        return (value,)
    if not isinstance(value, Sequence):
        raise TypeError(f"output_to_logits must return a tensor or a sequence of tensors, got {type(value).__name__}")
    for item in value:
        if not isinstance(item, Tensor):
            raise TypeError(f"output_to_logits must return tensors, got a sequence with a {type(item).__name__}")
    if not value:
        raise ValueError("output_to_logits must return at least one tensor, got an empty sequence")
    return tuple(value)


def _scalar(divergence: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    if first.shape != second.shape:
        # Broadcasting (8, 1) against (8,) would compare every example with every other.
        raise ValueError(
            f"two passes of one model must return tensors of one shape to compare, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    value = divergence(first, second)
    if not isinstance(value, Tensor):
        raise TypeError(f"divergence must return a scalar tensor, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(
            f"divergence must return a scalar tensor, got shape {tuple(value.shape)}; reduce it, as with .mean()"
        )
    if not value.is_floating_point():
        raise TypeError(f"divergence must return a floating-point tensor, got {value.dtype}")
    return value
