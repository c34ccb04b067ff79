"""Algorithm 1's inner loop: from a start to the perturbation that moves the output most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball
from smartreg._ascent.objective import Objective
from smartreg._ascent.rules import step
from smartreg._ascent.start import INDEPENDENT, Start


@dataclass(frozen=True)
class Found:
    """Where the search ended.

    Attributes:
        perturbations: δ of each look-up, detached.
        start_divergence: ℓ at the start; None if no step was taken.
        bad_examples: How many examples lacked a usable gradient at the start or in any step.
        radius_used: The mean of ‖δ‖ / ε over examples (or tokens).
        balls: Where it was sought.
        all_bad: Whether every example that has anything to perturb lacked a usable gradient.
    """

    perturbations: list[Tensor]
    start_divergence: Tensor | None
    bad_examples: Tensor
    radius_used: Tensor
    balls: Sequence[Ball]
    all_bad: Tensor

    def share_real(self) -> float:
        """How many of all positions may be perturbed."""
        return sum(1.0 if ball.mask is None else float(ball.mask.float().mean()) for ball in self.balls) / len(
            self.balls
        )

    def largest(self) -> Tensor:
        """The largest absolute entry of any perturbation."""
        sizes = [p.abs().amax() if p.numel() else p.new_zeros(()) for p in self.perturbations]
        return torch.stack([size.to(sizes[0].device) for size in sizes]).amax()


def search(objective: Objective, balls: Sequence[Ball], start: Start) -> Found:
    r"""Follow \(\nabla_\delta \, \ell(f(x + \delta), f(x))\) for `steps` steps, each of which ends in the ball.

    Args:
        objective: δ ↦ ℓ(f(x + δ), f(x)).
        balls: The ball of each look-up.
        start: Where to begin; it need not lie in the ball.

    Raises:
        RuntimeError: The output depends on no perturbation.
    """
    settings = balls[0].settings
    steps = settings.steps if settings.moves else 0
    perturbations, bad = [delta.detach() for delta in start.perturbations], list(start.unusable)
    start_divergence: Tensor | None = None
    for _ in range(steps):
        value, gradients = objective.gradient(perturbations, adjust_scale=True)
        if gradients is None:
            raise RuntimeError(INDEPENDENT)
        start_divergence = value if start_divergence is None else start_divergence
        for index, (ball, gradient) in enumerate(zip(balls, gradients, strict=True)):
            perturbations[index], unusable = step(ball, perturbations[index], gradient)
            bad[index] = bad[index] | unusable
    if steps == 0:
        perturbations = [ball.project(delta) for ball, delta in zip(balls, perturbations, strict=True)]
    used = _radius_used(balls, perturbations)
    return Found(perturbations, start_divergence, _count(bad), used, balls, _all_bad(balls, bad))


def _radius_used(balls: Sequence[Ball], perturbations: Sequence[Tensor]) -> Tensor:
    parts = [ball.share_of_radius(delta) for ball, delta in zip(balls, perturbations, strict=True)]
    shares, counts = (torch.stack([part[k].to(parts[0][0].device) for part in parts]).sum() for k in (0, 1))
    return shares / counts.clamp_min(1)


def _all_bad(balls: Sequence[Ball], bad: Sequence[Tensor]) -> Tensor:
    """Whether no example is left that has anything to perturb and is not marked."""
    idle = [(marks | ball.empty()).all() for ball, marks in zip(balls, bad, strict=True)]
    return torch.stack([one.to(idle[0].device) for one in idle]).all()


def _count(bad: Sequence[Tensor]) -> Tensor:
    """Examples marked in any look-up; look-ups of one number of examples hold the same."""
    if len({len(marks) for marks in bad}) > 1:
        return torch.stack([marks.sum().to(bad[0].device) for marks in bad]).sum()
    return torch.stack([marks.to(bad[0].device) for marks in bad]).any(dim=0).sum()
