"""From what a model returned to the tensors that a divergence compares, and from those to one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from smartreg._masks import Masks, as_booleans, as_sequence
from smartreg.divergences import Divergence, kind_of, name_of

OutputToLogits = Callable[[Any], Tensor | Sequence[Tensor]]
Forward = Callable[[nn.Module], Any]

_HINT = "pass output_to_logits, a function from the output of `forward` to the tensor (or tensors) to compare"


def token_mask(labels: Tensor, *, shift: bool = False, ignore_index: int = -100) -> Tensor:
    """Which positions of token logits have a label, for `output_mask=`.

    Args:
        labels: (batch, sequence), with `ignore_index` where there is nothing to predict, as the loss takes them.
        shift: For causal language models, whose logits at a position predict the label of the next one: the mask of
            logits that are not yet shifted, as the model returns them. The last position predicts nothing.
        ignore_index: The label of positions that do not count.

    Returns:
        Booleans of the shape of `labels`.

    Raises:
        TypeError: `labels` is no tensor of integers.
        ValueError: There is no sequence dimension to shift along.

    Examples:
        >>> import torch
        >>> from smartreg import token_mask
        >>> labels = torch.tensor([[-100, 5, 7, -100]])
        >>> token_mask(labels), token_mask(labels, shift=True)
        (tensor([[False,  True,  True, False]]), tensor([[ True,  True, False, False]]))
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError(
            f"labels must be a tensor of integers, got {getattr(labels, 'dtype', None) or type(labels).__name__}"
        )
    if labels.ndim < 2 and shift:
        raise ValueError(f"labels must be (batch, sequence) to be shifted, got shape {tuple(labels.shape)}")
    counts = labels != ignore_index
    if not shift:
        return counts
    return torch.cat([counts[..., 1:], torch.zeros_like(counts[..., :1])], dim=-1)


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

    Examples:
        >>> compared_tensors({"loss": None, "logits": torch.tensor([0.5, -0.5])})
        (tensor([ 0.5000, -0.5000]),)
    """
    tensors = _logits(output) if output_to_logits is None else _extracted(output, output_to_logits)
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"the tensor to compare must be floating-point, got {tensor.dtype}; {_HINT}")
    return tensors


def divergence_of(
    divergence: Divergence,
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...],
    output_mask: Masks = None,
) -> Tensor:
    """The sum of ℓ(first_k, second_k) over the compared tensors k.

    Args:
        divergence: A function ℓ of two tensors of one shape that returns a scalar.
        first: What is passed as ℓ's first argument (perturbed, or student), from `compared_tensors`.
        second: What is passed as its second argument (clean, or teacher), of the same number and shapes.
        output_mask: Which positions to compare; see `keep_of`. A divergence of this package gets it as its `mask`, one
            of the user's own gets the kept positions alone, as tensors (kept, ...).

    Returns:
        A scalar tensor in float32 at least, on the graphs of both.

    Raises:
        TypeError: The divergence returned something else than a floating-point tensor.
        ValueError: The divergence returned no scalar, the two passes differ in the number or shapes of tensors, or the
            mask does not fit.

    Examples:
        >>> absolute = lambda a, b: (a - b).abs().mean()
        >>> divergence_of(absolute, (torch.ones(2), torch.ones(3)), (torch.zeros(2), torch.zeros(3)))
        tensor(2.)
    """
    if len(first) != len(second):
        raise ValueError(
            f"two passes of one model must return the same number of tensors to compare, got {len(first)} and "
            f"{len(second)}; output_to_logits must not depend on the pass"
        )
    keeps = keep_of(output_mask, first)
    terms = [_scalar(divergence, a, b, keep) for a, b, keep in zip(first, second, keeps, strict=True)]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def keep_of(output_mask: Masks, compared: Sequence[Tensor]) -> list[Tensor | None]:
    """For each tensor to compare booleans of its leading shape, False where a position is left out; or None.

    Args:
        output_mask: A tensor for each of `compared` whose shape is the beginning of that tensor's, (batch, sequence)
            for token logits; 1 or True where it counts. None: all count.
        compared: The tensors to compare.

    Raises:
        TypeError: A mask is no tensor.
        ValueError: The number or a shape of the masks does not fit.
    """
    masks: Sequence[Tensor | None] = [None] * len(compared)
    if output_mask is not None:
        masks = as_sequence("output_mask", output_mask, of=(Tensor, NoneType))
    if len(masks) != len(compared):
        raise ValueError(
            f"output_mask must be one tensor for each tensor to compare, in order: expected {len(compared)}, "
            f"got {len(masks)}"
        )
    keeps: list[Tensor | None] = []
    for mask, tensor in zip(masks, compared, strict=True):
        if mask is None:
            keeps.append(None)
            continue
        expected = f"have the leading shape of the tensor to compare, {tuple(tensor.shape)} without the classes"
        keeps.append(as_booleans("output_mask", mask, partial(_leads, tensor.shape), expected).to(tensor.device))
    return keeps


def _leads(whole: torch.Size, shape: torch.Size) -> bool:
    return len(shape) > 0 and shape == whole[: len(shape)]


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


def _scalar(divergence: Divergence, first: Tensor, second: Tensor, keep: Tensor | None) -> Tensor:
    if first.shape != second.shape:
        # Broadcasting (8, 1) against (8,) would compare every example with every other.
        raise ValueError(
            f"two passes of one model must return tensors of one shape to compare, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if first.ndim < 2 and kind_of(divergence) == "softmax":
        raise ValueError(
            f"{_plain_name(divergence)} needs logits (batch, ..., classes), got {tuple(first.shape)}, whose softmax "
            f"would take the examples of the batch for classes. For one logit an example use binary_symmetric_kl, or "
            f"mse if it is a regression"
        )
    value = divergence(first, second) if keep is None else _masked(divergence, first, second, keep)
    if not isinstance(value, Tensor):
        raise TypeError(f"divergence must return a scalar tensor, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(
            f"divergence must return a scalar tensor, got shape {tuple(value.shape)}; reduce it, as with .mean()"
        )
    if not value.is_floating_point():
        raise TypeError(f"divergence must return a floating-point tensor, got {value.dtype}")
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _plain_name(divergence: Divergence) -> str:
    return _plain_name(divergence.func) if isinstance(divergence, partial) else name_of(divergence)


def _masked(divergence: Divergence, first: Tensor, second: Tensor, keep: Tensor) -> Tensor:
    kind = kind_of(divergence)
    if kind is None:
        first, second = first[keep], second[keep]  # (kept, ...)
        return divergence(first, second) if len(first) else (first.sum() + second.sum()).float()
    positions = first.shape[:-1] if kind == "softmax" else first.shape
    if keep.ndim > len(positions):
        raise ValueError(
            f"output_mask must leave out positions, not classes: expected at most {len(positions)} dimensions for "
            f"logits of shape {tuple(first.shape)}, got {tuple(keep.shape)}"
        )
    keep = keep.reshape(*keep.shape, *[1] * (len(positions) - keep.ndim))
    masked: Callable[..., Tensor] = divergence
    return masked(first, second, mask=keep)
