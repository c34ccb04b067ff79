"""Where the search starts: the balls around the embeddings of a batch, and the first perturbation in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball, wide_dtype
from smartreg._ascent.settings import SmartSettings
from smartreg._ascent.settings import Start as StartName
from smartreg._masks import Masks, as_booleans, as_sequence
from smartreg._warnings import warn
from smartreg.divergences import Divergence, Kind, is_builtin

INDEPENDENT = (
    "the output does not depend on the embeddings, so no perturbation can reach it: check that forward uses the module "
    "that it is given, does not detach, and that embedding names the right module"
)

Noise = Tensor | Sequence[Tensor] | Callable[[Tensor], Tensor] | None


def balls_around(
    embeddings: Sequence[Tensor], mask: Masks, settings: SmartSettings, example_ids: Masks = None
) -> list[Ball]:
    """The ball around each look-up.

    Raises:
        TypeError: A mask or ids are of the wrong kind.
        ValueError: There are not as many of them as look-ups, or one has the wrong shape.
    """
    masks, ids = _for_each("mask", mask, embeddings), _for_each("example_ids", example_ids, embeddings)
    checked = [None if one is None else _of(embedded, one) for embedded, one in zip(embeddings, masks, strict=True)]
    return [
        Ball.around(embedded, visible, settings, numbers)
        for embedded, visible, numbers in zip(embeddings, checked, ids, strict=True)
    ]


def _for_each(name: str, given: Masks, embeddings: Sequence[Tensor]) -> list[Tensor | None]:
    if given is None:
        return [None] * len(embeddings)
    found: list[Tensor | None] = as_sequence(name, given, of=(Tensor, NoneType))
    if len(found) != len(embeddings):
        raise ValueError(
            f"{name} must be one tensor for each embedding look-up, in order: expected {len(embeddings)}, "
            f"got {len(found)}"
        )
    return found


def _of(embedded: Tensor, mask: Tensor) -> Tensor:
    wanted = embedded.shape[:-1]
    expected = f"have the shape of the embeddings without the feature dimension, {tuple(wanted)}"
    return as_booleans("mask", mask, lambda shape: shape == wanted, expected)


class Start(NamedTuple):
    """The first perturbation of each look-up, and bools, one for each example, that mark those without a gradient."""

    perturbations: list[Tensor]
    unusable: list[Tensor]


def noise_start(balls: Sequence[Ball], noise: Noise, generator: torch.Generator | None) -> Start:
    """ν of each look-up: drawn, or what the caller gave.

    Raises:
        TypeError: The given noise is no tensor.
        ValueError: It does not have the number or the shapes of the look-ups.
    """
    if noise is None:
        drawn = [ball.noise(generator) for ball in balls]
    else:
        given = _given(noise, [b.embeddings for b in balls], each="embedding look-up", shape_of="the embeddings")
        pairs = zip(balls, given, strict=True)
        drawn = [ball.hide_padding(one.to(ball.embeddings.device, ball.norm_scale.dtype)) for ball, one in pairs]
    return Start(drawn, [torch.zeros_like(ball.empty()) for ball in balls])


def zero_start(balls: Sequence[Ball]) -> Start:
    """No perturbation, and nothing drawn: all that there is in balls without extent."""
    zeros = [torch.zeros_like(ball.embeddings, dtype=ball.norm_scale.dtype) for ball in balls]
    return Start(zeros, [torch.zeros_like(ball.empty()) for ball in balls])


def gradient_start(balls: Sequence[Ball], gradients: Sequence[Tensor] | None) -> Start:
    r"""The start on the sphere of radius ε, as far along \(J^\top u\) as the norm allows.

    Args:
        balls: The ball of each look-up.
        gradients: \(J^\top u\) for each look-up, from `pullback`. An example without a usable one starts at 0.

    Raises:
        RuntimeError: The output depends on no embedding.
    """
    if gradients is None:
        raise RuntimeError(INDEPENDENT)
    starts, marks = [], []
    for ball, gradient in zip(balls, gradients, strict=True):
        usable, unusable = ball.usable(gradient)
        gradient = torch.where(usable, ball.hide_padding(gradient.to(ball.norm_scale.dtype)), 0.0)
        starts.append(ball.radius * ball.steepest(gradient))
        marks.append(unusable)
    return Start(starts, marks)


def cotangents(
    compared: Sequence[Tensor], kind: Kind | None, start: StartName, generator: torch.Generator | None
) -> list[Tensor]:
    r"""u for each tensor to compare, whose pullback \(J^\top u\) is where the search starts.

    `"gradient"`: random, with the curvature S of the divergence at equality as covariance, since near the clean point
    \(\ell(f(x + \delta), f(x)) \propto \delta^\top J^\top S J \delta\). With ξ ~ N(0, I):

    * softmax, \(S = \mathrm{diag}(p) - p p^\top\): \(u = \sqrt p \odot \xi - p \, \langle \sqrt p, \xi \rangle\);
    * Bernoulli, \(S = p (1 - p)\): \(u = \sqrt{p (1 - p)} \, \xi\);
    * values, and whatever a divergence of the user's own compares, S = I: u = ξ.

    `"towards_uniform"`: \(u = 1 / C - p\) for softmax outputs over C classes, \(1/2 - p\) for Bernoulli outputs, no
    draw: away from the prediction, where a divergence has room to grow (it saturates where the prediction becomes
    more certain). Values have no such direction: u = ξ.

    Args:
        compared: The tensors to compare, detached; softmax outputs are (..., classes).
        kind: What the divergence compares; None for one of the user's own.
        start: Which u.
        generator: Draws ξ.

    Returns:
        Tensors of the shapes of `compared`, in float32 at least.
    """
    found = []
    for f in compared:
        f = f.detach().to(wide_dtype(f.dtype))
        if start == "towards_uniform" and kind in ("softmax", "bernoulli"):
            found.append(_towards_uniform(f, kind))
            continue
        source = f.device if generator is None else generator.device
        xi = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=source).to(f.device)
        if kind == "softmax":
            root = f.softmax(-1).sqrt()
            found.append(root * xi - root.square() * (root * xi).sum(-1, keepdim=True))
        elif kind == "bernoulli":
            found.append((f.sigmoid() * (-f).sigmoid()).sqrt() * xi)
        else:
            found.append(xi)
    return found


def _towards_uniform(logits: Tensor, kind: Kind) -> Tensor:
    if kind == "bernoulli":
        return 0.5 - logits.sigmoid()
    present = logits != -torch.inf  # an absent class is in neither distribution
    return torch.where(present, 1.0 / present.sum(-1, keepdim=True).clamp_min(1), 0.0) - logits.softmax(-1)


def given_cotangents(compared: Sequence[Tensor], noise: Noise) -> list[Tensor]:
    """u as the user gave it, for each tensor to compare."""
    given = _given(noise, compared, each="tensor to compare", shape_of='the outputs (start="gradient")')
    return [one.to(f.device, wide_dtype(f.dtype)) for f, one in zip(compared, given, strict=True)]


def _given(noise: Noise, like: Sequence[Tensor], *, each: str, shape_of: str) -> list[Tensor]:
    """Tensors that the user gave, or whose function the user gave, each of the shape of its counterpart in `like`."""
    if callable(noise):
        given: list[Any] = [noise(one) for one in like]
    else:
        given = list(as_sequence("noise", noise))
    if len(given) != len(like):
        raise ValueError(f"noise must be one tensor for each {each}, in order: expected {len(like)}, got {len(given)}")
    for tensor, one in zip(like, given, strict=True):
        if not isinstance(one, Tensor):
            raise TypeError(f"noise must be a tensor for each {each}, got {type(one).__name__}")
        if one.shape != tensor.shape:
            raise ValueError(f"noise must have the shape of {shape_of}, {tuple(tensor.shape)}, got {tuple(one.shape)}")
    return [one.detach() for one in given]


def check_generator(generator: object) -> None:
    """Raises a `TypeError` unless the argument is a generator of torch, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def refuse_surroundings(settings: SmartSettings) -> None:
    """Raises a `RuntimeError` where the search needs gradients, or state, that cannot be had."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "the search runs passes of its own and reads their values, which torch.func transforms (vmap, grad) "
            "forbid: call it outside of them, on the whole batch"
        )
    if torch.is_inference_mode_enabled() and (settings.steps or settings.start != "noise"):
        raise RuntimeError(
            "the search needs gradients, which torch.inference_mode forbids: use torch.no_grad, or steps=0 with "
            'start="noise"'
        )


def warn_if_nothing_to_follow(settings: SmartSettings, divergence: Divergence) -> bool:
    """Whether an ascent without given noise starts where the divergence is flat; if so, with a `SmartWarning`."""
    flat = settings.start == "noise" and settings.noise_std == 0 and is_builtin(divergence)
    doomed = settings.steps > 0 and settings.epsilon > 0 and flat
    if doomed:
        warn(
            f"steps={settings.steps} with noise_std=0 has no gradient to follow: a divergence is flat at the clean "
            f'point. Set noise_std above 0, pass noise=, set steps=0, or start="gradient"'
        )
    return doomed
