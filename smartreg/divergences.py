"""Divergences between two raw model outputs: how far a prediction has moved.

Every function takes `(input, target, *, mask=None, reduction="mean")`, and gradients reach both arguments. A divergence
handed to the regularizers may be any callable of two tensors that returns a scalar.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from smartreg._divergences import formulas
from smartreg._divergences.positions import over_classes, over_elements

Divergence = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["softmax", "bernoulli", "value"]


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

    Examples:
        >>> import torch
        >>> from smartreg import symmetric_kl
        >>> a, b = torch.tensor([[0.5, 0.5], [0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
        >>> symmetric_kl(a, b, reduction="none")
        tensor([0.0000, 1.6636])

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197.
    """
    return over_classes(formulas.symmetric_kl, "symmetric_kl", input, target, mask, reduction)


def kl(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Kullback-Leibler divergence of the target's distribution from the input's, the direction of `torch.nn.KLDivLoss`.

    ℓ(a, b) = KL(q ‖ p) = Σ_c q_c (log q_c − log p_c),  p = softmax(a) of the input, q = softmax(b) of the target

    Args, Returns, Raises: as `symmetric_kl`.

    Examples:
        >>> import torch
        >>> from smartreg.divergences import kl
        >>> kl(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.2231)

    Reference:
        Kullback and Leibler, On Information and Sufficiency, 1951.
    """
    return over_classes(formulas.kl, "kl", input, target, mask, reduction)


def jensen_shannon(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Jensen-Shannon divergence of two softmax outputs, symmetric and never above log 2.

    ℓ(a, b) = ½ KL(p ‖ m) + ½ KL(q ‖ m),  p = softmax(a), q = softmax(b), m = (p + q) / 2

    Args, Returns, Raises: as `symmetric_kl`, but finite where a class has logit −inf in one argument only.

    Examples:
        >>> import torch
        >>> from smartreg.divergences import jensen_shannon
        >>> jensen_shannon(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.2, 0.8]).log())
        tensor(0.1927)

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991, doi 10.1109/18.61115.
    """
    return over_classes(formulas.jensen_shannon, "jensen_shannon", input, target, mask, reduction)


def hellinger(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Squared Hellinger distance of two softmax outputs, symmetric and never above 1.

    ℓ(a, b) = ½ Σ_c (√p_c − √q_c)²,  p = softmax(a), q = softmax(b)

    The square, because the distance itself has no derivative where the outputs are equal.

    Args, Returns, Raises: as `symmetric_kl`, but finite where a class has logit −inf in one argument only.

    Examples:
        >>> import torch
        >>> from smartreg.divergences import hellinger
        >>> hellinger(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.2, 0.8]).log())
        tensor(0.2000)

    Reference:
        Beran, Minimum Hellinger Distance Estimates for Parametric Models, 1977, doi 10.1214/aos/1176343842.
    """
    return over_classes(formulas.hellinger, "hellinger", input, target, mask, reduction)


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

    Examples:
        >>> import torch
        >>> from smartreg import binary_symmetric_kl
        >>> binary_symmetric_kl(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -2.0]), reduction="none")
        tensor([0.0000, 3.0464])

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197, with two classes.
    """
    return over_elements(formulas.binary_symmetric_kl, "binary_symmetric_kl", input, target, mask, reduction)


def mse(input: Tensor, target: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Squared error: the ℓ_s of SMART for regression.

    ℓ(a, b) = (a − b)² for each element

    Args, Returns, Raises: as `binary_symmetric_kl`, for values instead of logits.

    Examples:
        >>> import torch
        >>> from smartreg import mse
        >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]), mask=torch.tensor([0, 1]))
        tensor(9.)

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197.
    """
    return over_elements(lambda a, b: (a - b).square(), "mse", input, target, mask, reduction)


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

    Examples:
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

    Examples:
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

    Examples:
        >>> from smartreg.divergences import mse, name_of
        >>> name_of(mse)
        'mse'
    """
    return getattr(divergence, "__name__", None) or repr(divergence)


def is_builtin(divergence: Divergence) -> bool:
    """Whether `divergence` is one of this file's, also behind `functools.partial`: its gradient is 0 at equality.

    Examples:
        >>> from functools import partial
        >>> from smartreg.divergences import is_builtin, mse
        >>> is_builtin(partial(mse, reduction="sum")), is_builtin(lambda a, b: (a - b).abs().sum())
        (True, False)
    """
    return kind_of(divergence) is not None
