r"""The ascent rules: from a perturbation δ and the gradient g of ℓ there to the next perturbation.

A rule is a function of the ball, δ and g, all finite, zero at padding; `RULES` names it for the user. Shapes are those
of `Ball`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball, normalize, vector_norm
from smartreg._ascent.settings import Ascent


def projected(ball: Ball, delta: Tensor, gradient: Tensor) -> Tensor:
    r"""Algorithm 1: \(\Pi_\epsilon(\delta_i + \eta \, g_i / \|g_i\|_p)\)."""
    return ball.project(delta + ball.step_size * normalize(gradient, ball.settings.norm, ball.under_norm))


def steepest(ball: Ball, delta: Tensor, gradient: Tensor) -> Tensor:
    r"""\(\Pi_\epsilon(\delta_i + \eta s_i)\), \(s_i = \arg\max_{\|s\|_p \le 1} \langle g_i, s \rangle\)."""
    return ball.project(delta + ball.step_size * ball.steepest(gradient))


def normalized(ball: Ball, delta: Tensor, gradient: Tensor) -> Tensor:
    r"""What MT-DNN and smart-pytorch do: \(s_i / (\|s_i\|_p + \epsilon)\) with \(s_i = \delta_i + \eta g_i\)."""
    stepped = delta + ball.step_size * gradient
    size = vector_norm(stepped, ball.settings.norm, ball.under_norm) + ball.radius
    return stepped / size.clamp_min(torch.finfo(size.dtype).tiny)


RULES: dict[Ascent, Callable[[Ball, Tensor, Tensor], Tensor]] = {
    "projected": projected,
    "steepest": steepest,
    "normalized": normalized,
}


def step(ball: Ball, delta: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """One ascent step by the rule of the settings.

    Args:
        ball: The ball of the look-up.
        delta: δ, (batch, ..., feature).
        gradient: g, same shape; padding is dropped before any norm is taken.

    Returns:
        The new δ, where an example whose gradient is not finite, or zero, keeps its own (projected, if the rule
        projects), and a bool tensor (examples,) that marks these; one that is all padding is not marked.
    """
    usable, unusable = ball.usable(gradient)
    direction = torch.where(usable, ball.hide_padding(gradient.to(delta.dtype)), 0.0)
    moved = RULES[ball.settings.ascent](ball, delta, direction)
    if ball.settings.ascent == "normalized":
        moved = torch.where(usable, moved, delta)
    return moved, unusable
