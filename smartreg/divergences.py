"""Divergences between two raw model outputs: how far a prediction has moved.

Every function takes `(input, target, *, mask=None, reduction="mean")`, and gradients reach both arguments. A divergence
handed to the regularizers may be any callable of two tensors that returns a scalar.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from smartreg._divergences import formulas
from smartreg._divergences.blockwise import blockwise_symmetric_kl

Divergence = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["softmax", "bernoulli", "value"]

_REDUCTIONS = ("none", "sum", "mean")

# From this many logits on the hand-written gradient of symmetric_kl is faster than autograd's, however few the classes.
_BLOCKWISE_FROM = 2**12


def symmetric_kl(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Symmetric Kullback-Leibler divergence of two softmax outputs: the ℓ_s of SMART for classification.

    ℓ(a, b) = KL(p ‖ q) + KL(q ‖ p) = Σ_c (p_c − q_c)(log p_c − log q_c),  p = softmax(a), q = softmax(b)

    It is computed without subtracting nearly equal numbers: logits that differ by 1e-6 give a value that is as accurate
    as logits that differ by 1. A class with logit −inf in both arguments contributes 0; in one only, the value is inf.

    Args:
        input: Logits a, of shape (..., C) with C ≥ 2. Half precision is computed in float32, float64 stays float64.
        target: Logits b, of the same shape.
        mask: Broadcasts to (...). 0 or False leaves a position out, whatever stands there, NaN included.
        reduction: `"none"`, `"sum"`, or `"mean"`: the sum divided by the number of unmasked positions.

    Returns:
        A scalar, or a tensor (...) for `"none"`, in float32 or float64. Zero if no position is left.

    Raises:
        TypeError: An argument is not a tensor, or not of a floating dtype.
        ValueError: The shapes differ, C < 2, the mask does not broadcast to (...), or the reduction is unknown.

    Example:
        >>> import torch
        >>> from smartreg import symmetric_kl
        >>> a, b = torch.tensor([[0.5, 0.5], [0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
        >>> symmetric_kl(a, b, reduction="none")
        tensor([0.0000, 1.6636])

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197.
    """
    return _over_classes(formulas.symmetric_kl, "symmetric_kl", input, target, mask, reduction)


def kl(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Kullback-Leibler divergence of the input's distribution from the target's, the direction of `torch.nn.KLDivLoss`.

    ℓ(a, b) = KL(q ‖ p) = Σ_c q_c (log q_c − log p_c),  p = softmax(a) of the input, q = softmax(b) of the target

    Args, Returns, Raises: as `symmetric_kl`.

    Example:
        >>> import torch
        >>> from smartreg.divergences import kl
        >>> kl(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.2231)

    Reference:
        Kullback and Leibler, On Information and Sufficiency, 1951.
    """
    return _over_classes(formulas.kl, "kl", input, target, mask, reduction)


def jensen_shannon(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Jensen-Shannon divergence of two softmax outputs, symmetric and never above log 2.

    ℓ(a, b) = ½ KL(p ‖ m) + ½ KL(q ‖ m),  p = softmax(a), q = softmax(b), m = (p + q) / 2

    Args, Returns, Raises: as `symmetric_kl`, but finite where a class has logit −inf in one argument only.

    Example:
        >>> import torch
        >>> from smartreg.divergences import jensen_shannon
        >>> jensen_shannon(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.2, 0.8]).log())
        tensor(0.1927)

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991, doi 10.1109/18.61115.
    """
    return _over_classes(formulas.jensen_shannon, "jensen_shannon", input, target, mask, reduction)


def hellinger(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Squared Hellinger distance of two softmax outputs, symmetric and never above 1.

    ℓ(a, b) = ½ Σ_c (√p_c − √q_c)²,  p = softmax(a), q = softmax(b)

    The square, because the distance itself has no derivative where the outputs are equal.

    Args, Returns, Raises: as `symmetric_kl`, but finite where a class has logit −inf in one argument only.

    Example:
        >>> import torch
        >>> from smartreg.divergences import hellinger
        >>> hellinger(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.2, 0.8]).log())
        tensor(0.2000)

    Reference:
        Beran, Minimum Hellinger Distance Estimates for Parametric Models, 1977, doi 10.1214/aos/1176343842.
    """
    return _over_classes(formulas.hellinger, "hellinger", input, target, mask, reduction)


def binary_symmetric_kl(
    input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Symmetric Kullback-Leibler divergence of Bernoulli outputs: single-logit and multi-label heads.

    ℓ(a, b) = (σ(a) − σ(b)) (a − b) for each element, σ the logistic function

    Args:
        input: Logits a, of any shape; every element is a position.
        target: Logits b, of the same shape.
        mask: Broadcasts to that shape. 0 or False leaves an element out, whatever stands there, NaN included.
        reduction: `"none"`, `"sum"`, or `"mean"`: the sum divided by the number of unmasked elements.

    Returns:
        A scalar, or a tensor of the input's shape for `"none"`, in float32 or float64. Zero if no element is left.

    Raises:
        TypeError: An argument is not a tensor, or not of a floating dtype.
        ValueError: The shapes differ, the mask does not broadcast to them, or the reduction is unknown.

    Example:
        >>> import torch
        >>> from smartreg import binary_symmetric_kl
        >>> binary_symmetric_kl(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -2.0]), reduction="none")
        tensor([0.0000, 3.0464])

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197, with two classes.
    """
    return _over_elements(formulas.binary_symmetric_kl, "binary_symmetric_kl", input, target, mask, reduction)


def mse(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Squared error: the ℓ_s of SMART for regression.

    ℓ(a, b) = (a − b)² for each element

    Args, Returns, Raises: as `binary_symmetric_kl`, for values instead of logits.

    Example:
        >>> import torch
        >>> from smartreg import mse
        >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]), mask=torch.tensor([0, 1]))
        tensor(9.)

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197.
    """
    return _over_elements(lambda a, b: (a - b).square(), "mse", input, target, mask, reduction)


class Builtin(NamedTuple):
    """A divergence of this file and what it compares."""

    function: Callable[..., Tensor]
    kind: Kind


# The one place where a divergence is made known: its name, what `diagnose` counts as a prediction, what the ascent may
# assume of it (a gradient of 0 at equality) follow from its row.
REGISTRY = (
    Builtin(symmetric_kl, "softmax"),
    Builtin(binary_symmetric_kl, "bernoulli"),
    Builtin(mse, "value"),
    Builtin(kl, "softmax"),
    Builtin(jensen_shannon, "softmax"),
    Builtin(hellinger, "softmax"),
)

BUILTIN: dict[str, Callable[..., Tensor]] = {row.function.__name__: row.function for row in REGISTRY}


def resolve_divergence(divergence: str | Divergence) -> Divergence:
    """The function that `divergence` names, or `divergence` itself if it is callable.

    Args:
        divergence: A key of `BUILTIN`, or a callable (input, target) -> scalar tensor.

    Returns:
        A callable (input, target) -> tensor.

    Raises:
        ValueError: The name is unknown.
        TypeError: Neither a string nor callable.

    Example:
        >>> from smartreg.divergences import resolve_divergence
        >>> resolve_divergence("mse").__name__
        'mse'
    """
    if isinstance(divergence, str):
        if divergence not in BUILTIN:
            names = ", ".join(repr(name) for name in BUILTIN)
            raise ValueError(
                f"divergence must be one of {names}, or a callable (input, target) -> scalar tensor; got {divergence!r}"
            )
        return BUILTIN[divergence]
    if not callable(divergence):
        raise TypeError(
            f"divergence must be a name or a callable (input, target) -> scalar tensor; got {type(divergence).__name__}"
        )
    return divergence


def kind_of(divergence: Divergence) -> Kind | None:
    """What a divergence of this file compares, also behind `functools.partial`; None for one of the user's own.

    Example:
        >>> from functools import partial
        >>> from smartreg.divergences import kind_of, mse
        >>> kind_of(partial(mse, reduction="sum"))
        'value'
        >>> kind_of(lambda a, b: (a - b).abs().sum()) is None
        True
    """
    while isinstance(divergence, partial):
        divergence = divergence.func
    return next((row.kind for row in REGISTRY if row.function is divergence), None)


def name_of(divergence: Divergence) -> str:
    """What to call a divergence when it is printed.

    Example:
        >>> from smartreg.divergences import mse, name_of
        >>> name_of(mse)
        'mse'
    """
    return getattr(divergence, "__name__", None) or repr(divergence)


def is_builtin(divergence: Divergence) -> bool:
    """Whether `divergence` is one of this file's, also behind `functools.partial`: its gradient is 0 at equality.

    Example:
        >>> from functools import partial
        >>> from smartreg.divergences import is_builtin, mse
        >>> is_builtin(partial(mse, reduction="sum")), is_builtin(lambda a, b: (a - b).abs().sum())
        (True, False)
    """
    return kind_of(divergence) is not None


def _over_classes(
    formula: Divergence, name: str, input: Tensor, target: Tensor, mask: Tensor | None, reduction: str
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


def _over_elements(
    formula: Divergence, name: str, input: Tensor, target: Tensor, mask: Tensor | None, reduction: str
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
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of 0 and 1 or booleans, got {type(mask).__name__}")
    try:
        return mask.bool().expand(positions)
    except RuntimeError:
        raise ValueError(
            f"mask must broadcast to the shape of the positions, {tuple(positions)}, got {tuple(mask.shape)}"
        ) from None


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
