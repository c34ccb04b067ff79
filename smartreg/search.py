"""Algorithm 1's inner loop: from a random start to the perturbation that moves the output most."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from smartreg.divergences import Divergence, is_builtin
from smartreg.errors import SmartWarning
from smartreg.loss_scale import LossScale, scaled
from smartreg.output import divergence_of
from smartreg.perturbation import Neighbourhood
from smartreg.settings import SmartSettings

Masks = Tensor | Sequence[Tensor | None] | None
Noise = Tensor | Sequence[Tensor] | Callable[[Tensor], Tensor] | None

# Runs the model with these perturbations; the block inside is where its graph may be differentiated.
RunPass = Callable[[Sequence[Tensor]], AbstractContextManager[tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Found:
    """Where the search ended.

    Attributes:
        perturbations: δ of each look-up, detached.
        start_divergence: ℓ at the random start; None if no step was taken.
        bad_examples: how many examples lacked a usable gradient in any step.
    """

    perturbations: list[Tensor]
    start_divergence: Tensor | None
    bad_examples: Tensor

    def largest(self) -> Tensor:
        """The largest absolute entry of any perturbation."""
        sizes = [p.abs().amax() if p.numel() else p.new_zeros(()) for p in self.perturbations]
        return torch.stack([size.to(sizes[0].device) for size in sizes]).amax()


def search(
    neighbourhoods: Sequence[Neighbourhood],
    start: Sequence[Tensor],
    run: RunPass,
    reference: Sequence[Tensor],
    divergence: Divergence,
    loss_scale: LossScale,
    dtypes: Sequence[torch.dtype | None],
) -> Found:
    r"""Follow \(\nabla_\delta \, \ell(f(x + \delta), f(x))\) for `steps` projected steps.

    Args:
        neighbourhoods: the ball of each look-up.
        start: ν, one tensor for each look-up.
        run: runs the model with perturbations.
        reference: the clean output, detached.
        divergence: ℓ.
        loss_scale: what ℓ is multiplied by before it is differentiated in float16.
        dtypes: what the passes work in.

    Raises:
        RuntimeError: the output depends on no perturbation.
    """
    settings = neighbourhoods[0].settings
    steps = settings.steps if settings.epsilon > 0 or settings.ascent == "normalized" else 0
    perturbations = [delta.detach() for delta in start]
    start_divergence: Tensor | None = None
    bad = [torch.zeros(len(delta), dtype=torch.bool, device=delta.device) for delta in perturbations]
    for _ in range(steps):
        variables = [delta.requires_grad_() for delta in perturbations]
        with torch.enable_grad(), run(variables) as output:
            value = divergence_of(divergence, output, tuple(reference))
            scale = loss_scale.get(value.device, *dtypes)
            gradients = differentiate(scaled(value, scale), variables)
        if start_divergence is None:
            start_divergence = value.detach()
        loss_scale.lower_on_overflow(scale, gradients)
        for index, (ball, gradient) in enumerate(zip(neighbourhoods, gradients, strict=True)):
            gradient = gradient if scale is None else gradient / scale.to(gradient.device)
            perturbations[index], unusable = ball.ascend(variables[index].detach(), gradient)
            bad[index] = bad[index] | unusable
    if steps == 0:
        perturbations = [ball.settle(delta) for ball, delta in zip(neighbourhoods, perturbations, strict=True)]
    return Found(perturbations, start_divergence, _count(bad))


def differentiate(value: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar with respect to the perturbations; zero for a look-up that it does not depend on."""
    gradients = torch.autograd.grad(value, variables, allow_unused=True) if value.requires_grad else [None]
    if all(gradient is None for gradient in gradients):
        raise RuntimeError(
            "the output does not depend on the embeddings, so no perturbation can reach it: check that forward uses "
            "the module that it is given, does not detach, and that embedding names the right module"
        )
    return [torch.zeros_like(v) if g is None else g for v, g in zip(variables, gradients, strict=True)]


def surround(embeddings: Sequence[Tensor], mask: Masks, settings: SmartSettings) -> list[Neighbourhood]:
    """The ball around each look-up.

    Raises:
        ValueError: there are not as many masks as look-ups, or one has the wrong shape.
    """
    masks: list[Tensor | None] = [None] * len(embeddings)
    if mask is not None:
        masks = [mask] if isinstance(mask, Tensor) else list(mask)
    if len(masks) != len(embeddings):
        raise ValueError(
            f"mask must be one tensor for each embedding look-up, in order: expected {len(embeddings)}, "
            f"got {len(masks)}"
        )
    for embedded, one in zip(embeddings, masks, strict=True):
        if one is not None and one.shape != embedded.shape[:-1]:
            raise ValueError(
                f"mask must have the shape of the embeddings without the feature dimension, "
                f"{tuple(embedded.shape[:-1])}, got {tuple(one.shape)}"
            )
    return [Neighbourhood.around(e, one, settings) for e, one in zip(embeddings, masks, strict=True)]


def starting_noise(
    neighbourhoods: Sequence[Neighbourhood], noise: Noise, generator: torch.Generator | None
) -> list[Tensor]:
    """ν of each look-up: drawn, or what the caller gave.

    Raises:
        TypeError: the given noise is no tensor.
        ValueError: it does not have the number or the shapes of the look-ups.
    """
    if noise is None:
        return [ball.start(generator) for ball in neighbourhoods]
    if callable(noise):
        given: list[Tensor] = [noise(ball.embeddings) for ball in neighbourhoods]
    else:
        given = [noise] if isinstance(noise, Tensor) else list(noise)
    if len(given) != len(neighbourhoods):
        raise ValueError(
            f"noise must be one tensor for each embedding look-up, in order: expected {len(neighbourhoods)}, "
            f"got {len(given)}"
        )
    start = []
    for ball, one in zip(neighbourhoods, given, strict=True):
        if not isinstance(one, Tensor):
            raise TypeError(f"noise must be a tensor for each embedding look-up, got {type(one).__name__}")
        if one.shape != ball.embeddings.shape:
            raise ValueError(
                f"noise must have the shape of the embeddings, {tuple(ball.embeddings.shape)}, got {tuple(one.shape)}"
            )
        start.append(ball.hide_padding(one.detach().to(ball.embeddings.device, ball.norm_scale.dtype)))
    return start


def warn_if_nothing_to_follow(settings: SmartSettings, divergence: Divergence, *, stacklevel: int) -> bool:
    """Whether an ascent without given noise starts where the divergence is flat; if so, with a `SmartWarning`."""
    doomed = settings.steps > 0 and settings.epsilon > 0 and settings.noise_std == 0 and is_builtin(divergence)
    if doomed:
        warnings.warn(
            f"steps={settings.steps} with noise_std=0 has no gradient to follow: a divergence is flat at the clean "
            f"point. Set noise_std above 0, pass noise=, or set steps=0",
            SmartWarning,
            stacklevel=stacklevel,
        )
    return doomed


def _count(bad: Sequence[Tensor]) -> Tensor:
    """Examples marked in any look-up; look-ups of one batch size hold the same examples."""
    if len({len(marks) for marks in bad}) > 1:
        return torch.stack([marks.sum().to(bad[0].device) for marks in bad]).sum()
    return torch.stack([marks.to(bad[0].device) for marks in bad]).any(dim=0).sum()
