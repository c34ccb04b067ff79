"""The function that the adversary maximises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from smartreg._loss_scale import LossScale, scaled
from smartreg._masks import Masks
from smartreg._outputs import divergence_of
from smartreg.divergences import Divergence

RunPass = Callable[[Sequence[Tensor]], AbstractContextManager[tuple[Tensor, ...]]]
"""Runs f with one perturbation for each look-up of the embedding; its graph may be differentiated inside the block."""

Graph = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The tensors to compare of a pass, and the embeddings that they come from, both with their graph."""


@dataclass(frozen=True)
class Objective:
    r"""\(\delta \mapsto \ell(f(x + \delta), f(x))\) of one batch, a function of the perturbation alone.

    Attributes:
        run: Runs f with perturbations.
        reference: f(x), the tensors to compare, detached.
        divergence: ℓ.
        loss_scale: What ℓ is multiplied by before it is differentiated in float16.
        dtypes: What the passes work in, as far as it shows; None stands for "no autocast".
        output_mask: Which positions ℓ compares.
    """

    run: RunPass
    reference: tuple[Tensor, ...]
    divergence: Divergence
    loss_scale: LossScale
    dtypes: tuple[torch.dtype | None, ...]
    output_mask: Masks = None

    def value(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """ℓ of outputs that a pass has given."""
        return divergence_of(self.divergence, outputs, self.reference, self.output_mask)

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
            gradients = self._differentiate(value, variables, adjust_scale=adjust_scale)
        return value.detach(), gradients

    def pullback(self, cotangents: Sequence[Tensor], variables: Sequence[Tensor]) -> list[Tensor] | None:
        r"""\(J^\top u\) for each look-up: the gradient of \(\sum_k \langle u_k, f_k(x + \delta) \rangle\) at δ = 0.

        Args:
            cotangents: u_k, of the shapes of the tensors to compare.
            variables: δ = 0 for each look-up.

        Returns:
            Gradients, not finite after an overflow in float16; None if the outputs depend on no look-up.
        """
        variables = [variable.detach().requires_grad_() for variable in variables]
        with torch.enable_grad(), self.run(variables) as perturbed:
            return self._differentiate(_inner_product(cotangents, perturbed), variables, adjust_scale=True)

    def pullback_through(self, cotangents: Sequence[Tensor], graph: Graph) -> list[Tensor] | None:
        """The same by one backward through a clean pass that is there already; its graph stays."""
        outputs, embeddings = graph
        return self._differentiate(_inner_product(cotangents, outputs), embeddings, adjust_scale=True, keep_graph=True)

    def _differentiate(
        self, value: Tensor, variables: Sequence[Tensor], *, adjust_scale: bool, keep_graph: bool = False
    ) -> list[Tensor] | None:
        scale = self.loss_scale.get(value.device, *self.dtypes)
        if not value.requires_grad:
            return None
        found = torch.autograd.grad(scaled(value, scale), variables, retain_graph=keep_graph, allow_unused=True)
        if all(gradient is None for gradient in found):
            return None
        gradients = [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)]
        if scale is None:
            return gradients
        if adjust_scale:
            self.loss_scale.update(scale, gradients)
        # In float32: what the scale lifted into the range of float16 would fall out of it again.
        wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
        return [gradient / scale.to(gradient.device) for gradient in wide]


def _inner_product(cotangents: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    products = [(u * f.to(u.dtype)).sum().to(outputs[0].device) for u, f in zip(cotangents, outputs, strict=True)]
    return torch.stack(products).sum()
