r"""The maximum of the divergence in a ball, found by a long search that shares nothing with the library.

A projected steepest ascent: the step that gains most to first order under the norm of the ball (the sign of the
gradient for inf, the gradient over its length for 2), twice the radius at first, shrinking linearly to nothing. For
each example the best point of all steps of all restarts counts. The landscape has a summit for each class that the
output can be driven to, and the highest is usually that of a class which the clean output all but excludes; so two
thirds of the restarts begin on the sphere, in the directions that raise the least likely classes, the others at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Deltas = list[Tensor]  # one perturbation for each look-up of the embedding, (batch, length, feature)
Run = Callable[[Deltas], Tensor]  # the model's outputs, (batch, outputs), at x + delta

STEPS, RESTARTS = 40, 3
FIRST_STEP = 2.0  # in radii: from any point of the ball the first step reaches its far side


@dataclass(frozen=True)
class Ball:
    """The perturbations of one look-up with a norm of at most `radius`, zero at padding.

    Attributes:
        norm: "inf" or "2".
        over: "example", one norm for a sentence, or "token".
        radius: broadcasts to the perturbation.
        mask: (batch, length, 1), True for real tokens.
        shape: of the perturbation.
    """

    norm: str
    over: str
    radius: Tensor
    mask: Tensor
    shape: torch.Size

    @classmethod
    def around(cls, embeddings: Tensor, mask: Tensor, *, norm: str, over: str, epsilon: float) -> Ball:
        """`epsilon` is in root mean squares of an example's embeddings, with norm 2 times the root of the entries."""
        visible = mask.bool()[:, :, None]
        entries = visible.sum((1, 2), keepdim=True) * embeddings.shape[-1]
        squares = torch.where(visible, embeddings.detach().double().square(), 0.0).sum((1, 2), keepdim=True)
        radius = epsilon * (squares / entries).sqrt()
        if norm == "2":
            radius = radius * (entries if over == "example" else torch.tensor(embeddings.shape[-1])).sqrt()
        return cls(norm, over, radius.to(embeddings.dtype), visible, embeddings.shape)

    def length(self, delta: Tensor) -> Tensor:
        """The norm, one for each example or token, with the dimensions kept."""
        dims = (1, 2) if self.over == "example" else (2,)
        return (
            delta.abs().amax(dims, keepdim=True)
            if self.norm == "inf"
            else delta.square().sum(dims, keepdim=True).sqrt()
        )

    def steepest(self, gradient: Tensor) -> Tensor:
        """The point of the sphere that a linear function with this gradient is largest at."""
        gradient = torch.where(self.mask, gradient, 0.0)
        unit = gradient.sign() if self.norm == "inf" else gradient / self.length(gradient).clamp_min(1e-30)
        return self.radius * unit

    def project(self, delta: Tensor) -> Tensor:
        """The nearest point of the ball."""
        if self.norm == "inf":
            return delta.clamp(-self.radius, self.radius)
        return delta * (self.radius / self.length(delta).clamp_min(1e-30)).clamp_max(1.0)

    def noise(self, generator: torch.Generator) -> Tensor:
        """A random point, for norm 2 on the sphere and for inf mostly well inside."""
        draw = torch.randn(self.shape, generator=generator).to(self.radius.dtype) * self.mask
        return self.project(0.5 * self.radius * draw)


def divergence(kind: str, moved: Tensor, clean: Tensor) -> Tensor:
    """Of each example, in float64, (batch,): (..., classes) of logits, single Bernoulli logits, or values."""
    p, q = moved.double(), clean.double()
    if kind == "symmetric_kl":
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return ((p.exp() - q.exp()) * (p - q)).sum(-1)
    if kind == "binary_symmetric_kl":
        return ((p.sigmoid() - q.sigmoid()) * (p - q)).sum(-1)
    if kind == "mse":
        return (p - q).square().sum(-1)
    raise ValueError(f"no divergence {kind!r}")


def maximum(
    run: Run, balls: Sequence[Ball], kind: str, *, seed: int, steps: int = STEPS, restarts: int = RESTARTS
) -> Tensor:
    """The largest divergence found around each example, (batch,), float64."""
    zero = [torch.zeros(ball.shape, dtype=ball.radius.dtype) for ball in balls]
    with torch.no_grad():
        clean = run(zero)
    best = torch.zeros(len(clean), dtype=torch.float64)
    for start in _starts(run, balls, clean, zero, restarts, torch.Generator().manual_seed(seed)):
        deltas = start
        for step in range(steps):
            value, gradients = _differentiate(run, deltas, lambda moved: divergence(kind, moved, clean))
            best = torch.maximum(best, value)
            size = FIRST_STEP * (1 - step / steps)
            deltas = [
                ball.project(delta + size * ball.steepest(gradient))
                for ball, delta, gradient in zip(balls, deltas, gradients, strict=True)
            ]
        with torch.no_grad():
            best = torch.maximum(best, divergence(kind, run(deltas), clean))
    return best


def _starts(
    run: Run, balls: Sequence[Ball], clean: Tensor, zero: Deltas, restarts: int, generator: torch.Generator
) -> Iterator[Deltas]:
    """Two thirds along gradients, as far as there are classes, and random points."""
    directions = _directions(clean)[: 2 * restarts // 3]
    for direction in directions:
        _, gradients = _differentiate(run, zero, lambda outputs, u=direction: (outputs * u).sum(-1))
        yield [ball.steepest(gradient) for ball, gradient in zip(balls, gradients, strict=True)]
    for _ in range(restarts - len(directions)):
        yield [ball.noise(generator) for ball in balls]


def _directions(clean: Tensor) -> list[Tensor]:
    """In output space: from the likeliest class to each, the least likely first; both signs of a single output."""
    if clean.shape[-1] == 1:
        return [torch.ones_like(clean), -torch.ones_like(clean)]
    order = clean.argsort(-1)
    one_hot = torch.eye(clean.shape[-1], dtype=clean.dtype)[order]  # (batch, rank, classes)
    return [one_hot[:, rank] - one_hot[:, -1] for rank in range(clean.shape[-1] - 1)]


def _differentiate(run: Run, deltas: Deltas, measure: Callable[[Tensor], Tensor]) -> tuple[Tensor, Deltas]:
    variables = [delta.detach().requires_grad_() for delta in deltas]
    value = measure(run(variables))
    return value.detach(), list(torch.autograd.grad(value.sum(), variables))
