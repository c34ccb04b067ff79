"""Divergences of single positions, written so that differences far below the rounding of a logit survive.

With p = softmax(a), q = softmax(b) and the log ratio u_c = log(p_c / q_c) everything follows from

    p_c - q_c = (p_c + q_c) tanh(u_c / 2),

a product of accurate factors where the subtraction on the left cancels. All sums over classes below have terms that are
not negative, so no rounding can make a divergence negative, and every formula is even or odd in u, so that exchanging
the arguments of a symmetric divergence changes nothing.

Shapes: logits are (..., classes), results are (...); `a` and `b` have one floating dtype, float32 or wider.
"""

import math

import torch
from torch import Tensor


def log_ratio(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distributions p = softmax(a), q = softmax(b) and u = log(p / q), with relative accuracy for a close to b.

    A class that is -inf in both is in neither distribution: p = q = 0, and it gets a finite u. In one only: u = ±inf.
    """
    # A finite logit that no softmax can tell from -inf: -inf - (-inf) is NaN, here and in the gradient. Its quarter of
    # the range keeps differences with other logits finite.
    floor = torch.finfo(a.dtype).min / 4
    absent = (a == -math.inf) & (b == -math.inf)
    a, b = a.masked_fill(absent, floor), b.masked_fill(absent, floor)
    p, q = a.softmax(-1), b.softmax(-1)
    # Relative to the largest logits, so that a high level of the logits costs no digits: constants for autograd, since
    # adding and subtracting them cancels.
    with torch.no_grad():
        top_a, top_b = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
    normaliser_a, normaliser_b = (a - top_a).logsumexp(-1, keepdim=True), (b - top_b).logsumexp(-1, keepdim=True)
    u = (a - b) - (top_a - top_b) - (normaliser_a - normaliser_b)
    # The normalisers carry a rounding error of their own size (1e-6 for 10 in float32), one number a position, however
    # small a - b is. Where u is small, sum(p - q), which is 0, comes out as just this error. A constant for autograd:
    # as a function of the logits it is 0 everywhere.
    with torch.no_grad():
        error = ((p + q) * (0.5 * u).tanh()).sum(-1, keepdim=True)
    return p, q, u - error


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) = sum_c (p_c - q_c) u_c."""
    p, q, u = log_ratio(a, b)
    terms = (p + q) * u * (0.5 * u).tanh()
    # Infinite is exact where one distribution lacks a class of the other, however improbable: not 0 * inf.
    return torch.where(u.isinf(), u.abs(), terms).sum(-1)


def symmetric_kl_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `symmetric_kl` for a, p - q + p (u - E_p[u]), and for b, q - p - q (u - E_q[u]).

    Made of differentiable operations, so that these are the start of any higher derivative.
    """
    p, q, u = log_ratio(a, b)
    difference = (p + q) * (0.5 * u).tanh()
    grad_a = difference + p * (u - (p * u).sum(-1, keepdim=True))
    grad_b = -difference - q * (u - (q * u).sum(-1, keepdim=True))
    return grad_a, grad_b


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(q || p) = sum_c q_c (exp(u_c) - 1 - u_c); the added sum of p_c - q_c is 0 and makes every term positive."""
    p, q, u = log_ratio(a, b)
    small = u.abs() < 0.5
    near = q * _exp_minus_linear(torch.where(small, u, 0.0))
    # q_c = 0 contributes p_c: 0 * inf must not arise, neither here nor in the gradient.
    far = p - q - q * torch.where((q == 0) & (u > 0), 0.0, u)
    return torch.where(small, near, far).sum(-1)


def _exp_minus_linear(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| <= 1/2 by its Taylor series, x^2/2! + x^3/3! + ... to the precision of float64."""
    series = torch.full_like(x, 1.0 / math.factorial(16))
    for k in range(15, 1, -1):
        series = series * x + 1.0 / math.factorial(k)
    return x * x * series


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2.

    = 1/2 sum_c m_c (u_c t_c + log(1 - t_c^2)) with t = tanh(u / 2), as p = m (1 + t) and q = m (1 - t).
    """
    p, q, u = log_ratio(a, b)
    size = u.abs()
    near = size < 1
    small = torch.where(near, u, 0.0)
    t = (0.5 * small).tanh()
    bracket_near = small * t + torch.log1p(-t * t)
    # The same bracket for large |u|, where 1 - t^2 vanishes: it tends to log 4, and has got there at 100.
    large = torch.where(near, 1.0, size).clamp(max=100.0)
    bracket_far = 2.0 * (math.log(2.0) - torch.log1p((-large).exp()) - large * (-large).sigmoid())
    return 0.25 * ((p + q) * torch.where(near, bracket_near, bracket_far)).sum(-1)


def hellinger(a: Tensor, b: Tensor) -> Tensor:
    """1/2 sum_c (sqrt(p_c) - sqrt(q_c))^2 = 1/2 sum_c (p_c + q_c) tanh(u_c / 2) tanh(u_c / 4)."""
    p, q, u = log_ratio(a, b)
    return 0.5 * ((p + q) * (0.5 * u).tanh() * (0.25 * u).tanh()).sum(-1)


def binary_symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """(s(a) - s(b)) (a - b), s the logistic function, for each element; a shape of logits gives that shape.

    s(a) - s(b) = (s(a) s(-b) + s(b) s(-a)) tanh((a - b) / 2), again without a subtraction of probabilities.
    """
    # Equal infinite logits are equal, certain predictions. Nothing else is replaced: 0 stands in for both.
    certain = a.isinf() & (a == b)
    a, b = a.masked_fill(certain, 0.0), b.masked_fill(certain, 0.0)
    d = a - b
    disagreement = a.sigmoid() * (-b).sigmoid() + b.sigmoid() * (-a).sigmoid()
    return torch.where(d.isinf(), d.abs(), disagreement * d * (0.5 * d).tanh())
