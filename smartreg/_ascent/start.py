"""Where the search starts: the balls around the embeddings of a batch, and the first perturbation in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball
from smartreg._ascent.settings import SmartSettings
from smartreg._warnings import warn
from smartreg.divergences import Divergence, is_builtin

Masks = Tensor | Sequence[Tensor | None] | None
Noise = Tensor | Sequence[Tensor] | Callable[[Tensor], Tensor] | None


def balls_around(embeddings: Sequence[Tensor], mask: Masks, settings: SmartSettings) -> list[Ball]:
    """The ball around each look-up.

    Raises:
        ValueError: There are not as many masks as look-ups, or one has the wrong shape.
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
    return [Ball.around(e, one, settings) for e, one in zip(embeddings, masks, strict=True)]


def starting_noise(balls: Sequence[Ball], noise: Noise, generator: torch.Generator | None) -> list[Tensor]:
    """ν of each look-up: drawn, or what the caller gave.

    Raises:
        TypeError: The given noise is no tensor.
        ValueError: It does not have the number or the shapes of the look-ups.
    """
    if noise is None:
        return [ball.noise(generator) for ball in balls]
    if callable(noise):
        given: list[Tensor] = [noise(ball.embeddings) for ball in balls]
    else:
        given = [noise] if isinstance(noise, Tensor) else list(noise)
    if len(given) != len(balls):
        raise ValueError(
            f"noise must be one tensor for each embedding look-up, in order: expected {len(balls)}, got {len(given)}"
        )
    start = []
    for ball, one in zip(balls, given, strict=True):
        if not isinstance(one, Tensor):
            raise TypeError(f"noise must be a tensor for each embedding look-up, got {type(one).__name__}")
        if one.shape != ball.embeddings.shape:
            raise ValueError(
                f"noise must have the shape of the embeddings, {tuple(ball.embeddings.shape)}, got {tuple(one.shape)}"
            )
        start.append(ball.hide_padding(one.detach().to(ball.embeddings.device, ball.norm_scale.dtype)))
    return start


def warn_if_nothing_to_follow(settings: SmartSettings, divergence: Divergence) -> bool:
    """Whether an ascent without given noise starts where the divergence is flat; if so, with a `SmartWarning`."""
    doomed = settings.steps > 0 and settings.epsilon > 0 and settings.noise_std == 0 and is_builtin(divergence)
    if doomed:
        warn(
            f"steps={settings.steps} with noise_std=0 has no gradient to follow: a divergence is flat at the clean "
            f"point. Set noise_std above 0, pass noise=, or set steps=0"
        )
    return doomed
