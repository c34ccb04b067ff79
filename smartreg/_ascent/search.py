"""Algorithm 1's inner loop: from a start to the perturbation that moves the output most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball
from smartreg._ascent.objective import Objective


@dataclass(frozen=True)
class Found:
    """Where the search ended.

    Attributes:
        perturbations: δ of each look-up, detached.
        start_divergence: ℓ at the start; None if no step was taken.
        bad_examples: How many examples lacked a usable gradient in any step.
    """

    perturbations: list[Tensor]
    start_divergence: Tensor | None
    bad_examples: Tensor

    def largest(self) -> Tensor:
        """The largest absolute entry of any perturbation."""
        sizes = [p.abs().amax() if p.numel() else p.new_zeros(()) for p in self.perturbations]
        return torch.stack([size.to(sizes[0].device) for size in sizes]).amax()


def search(objective: Objective, balls: Sequence[Ball], start: Sequence[Tensor]) -> Found:
    r"""Follow \(\nabla_\delta \, \ell(f(x + \delta), f(x))\) for `steps` steps, each of which ends in the ball.

    Args:
        objective: δ ↦ ℓ(f(x + δ), f(x)).
        balls: The ball of each look-up.
        start: The first δ of each look-up; it need not lie in the ball.

    Raises:
        RuntimeError: The output depends on no perturbation.
    """
    settings = balls[0].settings
    steps = settings.steps if settings.epsilon > 0 or settings.ascent == "normalized" else 0
    perturbations = [delta.detach() for delta in start]
    start_divergence: Tensor | None = None
    bad = [torch.zeros(len(delta), dtype=torch.bool, device=delta.device) for delta in perturbations]
    for _ in range(steps):
        value, gradients = objective.gradient(perturbations, adjust_scale=True)
        if gradients is None:
            raise RuntimeError(
                "the output does not depend on the embeddings, so no perturbation can reach it: check that forward "
                "uses the module that it is given, does not detach, and that embedding names the right module"
            )
        start_divergence = value if start_divergence is None else start_divergence
        for index, (ball, gradient) in enumerate(zip(balls, gradients, strict=True)):
            perturbations[index], unusable = ball.step(perturbations[index], gradient)
            bad[index] = bad[index] | unusable
    if steps == 0:
        perturbations = [ball.project(delta) for ball, delta in zip(balls, perturbations, strict=True)]
    return Found(perturbations, start_divergence, _count(bad))


def _count(bad: Sequence[Tensor]) -> Tensor:
    """Examples marked in any look-up; look-ups of one batch size hold the same examples."""
    if len({len(marks) for marks in bad}) > 1:
        return torch.stack([marks.sum().to(bad[0].device) for marks in bad]).sum()
    return torch.stack([marks.to(bad[0].device) for marks in bad]).any(dim=0).sum()
