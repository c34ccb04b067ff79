"""The function that the adversary maximises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from smartreg._loss_scale import LossScale, scaled
from smartreg._outputs import divergence_of
from smartreg.divergences import Divergence

RunPass = Callable[[Sequence[Tensor]], AbstractContextManager[tuple[Tensor, ...]]]
"""Runs f with one perturbation for each look-up of the embedding; its graph may be differentiated inside the block."""


@dataclass(frozen=True)
class Objective:
    r"""\(\delta \mapsto \ell(f(x + \delta), f(x))\) of one batch, a function of the perturbation alone.

    Attributes:
        run: Runs f with perturbations.
        reference: F(x), the tensors to compare, detached.
        divergence: ℓ.
        loss_scale: What ℓ is multiplied by before it is differentiated in float16.
        dtypes: What the passes work in, as far as it shows; None stands for "no autocast".
    """

    run: RunPass
    reference: tuple[Tensor, ...]
    divergence: Divergence
    loss_scale: LossScale
    dtypes: tuple[torch.dtype | None, ...]

    def value(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """ℓ of outputs that a pass has given."""
        return divergence_of(self.divergence, outputs, self.reference)

    def gradient(self, deltas: Sequence[Tensor], *, adjust_scale: bool = False) -> tuple[Tensor, list[Tensor] | None]:
        """ℓ at δ, detached, and its gradient with respect to the perturbation of each look-up.

        Args:
            deltas: δ, one tensor for each look-up.
            adjust_scale: Lower the loss scale for the next time if float16 overflowed.

        Returns:
            The value, and the gradients (zero for a look-up that ℓ does not depend on); None if it depends on none.
        """
        variables = [delta.detach().requires_grad_() for delta in deltas]
        with torch.enable_grad(), self.run(variables) as outputs:
            value = self.value(outputs)
            scale = self.loss_scale.get(value.device, *self.dtypes)
            found = gradients_or_none(scaled(value, scale), variables)
        if adjust_scale and found is not None:
            self.loss_scale.lower_on_overflow(scale, found)
        if found is not None and scale is not None:
            found = [gradient / scale.to(gradient.device) for gradient in found]
        return value.detach(), found


def gradients_or_none(value: Tensor, variables: Sequence[Tensor]) -> list[Tensor] | None:
    """Gradients of a scalar, zero for a variable that it does not depend on; None if it depends on none."""
    if not value.requires_grad:
        return None
    found = torch.autograd.grad(value, variables, allow_unused=True)
    if all(gradient is None for gradient in found):
        return None
    return [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)]
