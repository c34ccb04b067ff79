"""What perturbations of one size do: the measurements of `diagnose` for one ε."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball
from smartreg._ascent.objective import Objective
from smartreg._ascent.precision import agreement, cosine_from
from smartreg._ascent.search import Found, search
from smartreg._ascent.start import Start
from smartreg._outputs import keep_of
from smartreg.divergences import kind_of


@dataclass(frozen=True)
class Row:
    """The measurements at one ε; see `Diagnosis` for their meaning."""

    penalty: float
    random: float
    flips: float | None
    predictions: int | None
    """How many predictions `flips` is a share of."""
    cosine: float
    rounding: float
    dropout: float
    share: float | None


@dataclass(frozen=True)
class Sweep:
    """One batch, and the passes around its clean one.

    Attributes:
        ascent: The objective that is differentiated, without autocast if the settings say so.
        penalty: The objective of the pass that makes the penalty.
        balls: The ball of each look-up; the ε in their settings is not used.
        start: Where the search begins for ε = 1; it is proportional to ε.
        restart: The start towards the uniform prediction for ε = 1; None where the search ends there, without a step.
        noise: A starting noise for σ = 1.
        dropout: D, the divergence of two clean passes under different dropout masks.
    """

    ascent: Objective
    penalty: Objective
    balls: Sequence[Ball]
    start: Start
    restart: Start | None
    noise: Start
    dropout: float

    def row(self, size: float, reference_steps: int) -> Row:
        """Everything that is measured at ε = η = σ = `size`.

        Args:
            size: ε.
            reference_steps: How long the ascent is that the penalty is compared with; 0: it is not.
        """
        settings = replace(self.balls[0].settings, epsilon=size, step_size=size, noise_std=size)
        balls = [replace(ball, settings=settings) for ball in self.balls]
        noise = [size * nu for nu in self.noise.perturbations]
        start = self.start._replace(perturbations=[size * delta for delta in self.start.perturbations])
        found = search(self.ascent, balls, start)
        agreed = agreement(self.ascent, balls, noise)
        plus = self._outputs(found.perturbations)
        minus = self._outputs([-delta for delta in found.perturbations])
        random = self._outputs([ball.project(nu) for ball, nu in zip(balls, noise, strict=True)])
        penalty = float(self.penalty.value(plus))
        changed = self._changed(plus)
        return Row(
            penalty=penalty,
            random=float(self.penalty.value(random)),
            flips=None if changed is None else float(changed.float().mean()),
            predictions=None if changed is None else changed.numel(),
            cosine=0.0 if agreed is None else cosine_from(agreed),
            rounding=self._rounding(plus, minus),
            dropout=ratio(self.dropout, self.dropout + penalty) if self.dropout else 0.0,
            share=self._share(penalty, balls, found, reference_steps) if reference_steps else None,
        )

    def _share(self, penalty: float, balls: Sequence[Ball], found: Found, steps: int) -> float:
        """The penalty over the largest one that two longer ascents end at, whose steps become smaller and smaller."""
        epsilon, largest = balls[0].settings.epsilon, penalty
        again = [] if self.restart is None else [[epsilon * delta for delta in self.restart.perturbations]]
        for deltas in (found.perturbations, *again):
            for k in range(steps):
                size = 2.0 * epsilon * (1.0 - k / steps)
                settings = replace(balls[0].settings, ascent="steepest", steps=1, step_size=size)
                further = [replace(ball, settings=settings) for ball in balls]
                deltas = search(self.ascent, further, self.start._replace(perturbations=deltas)).perturbations
            largest = max(largest, float(self.penalty.value(self._outputs(deltas))))
        return ratio(penalty, largest) if largest else 1.0

    def _outputs(self, perturbations: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with self.penalty.run(perturbations) as outputs:
            return tuple(output.detach() for output in outputs)

    def uniform_loss(self) -> float | None:
        """The task loss of a model that predicts every class alike: ln C, ln 2 for a Bernoulli logit.

        None for values, and for a divergence of the user's own, whose scale may be any.
        """
        kind = kind_of(self.penalty.divergence)
        if kind == "softmax":
            return math.fsum(math.log(tensor.shape[-1]) for tensor in self.penalty.reference)
        return math.log(2.0) * len(self.penalty.reference) if kind == "bernoulli" else None

    def _changed(self, outputs: tuple[Tensor, ...]) -> Tensor | None:
        """Which predictions differ, in a row; None where there is no class to predict.

        A divergence of the user's own counts as one between softmax outputs, where the outputs can be such.
        """
        clean, kind = self.penalty.reference, kind_of(self.penalty.divergence)
        if kind is None:
            kind = "softmax" if all(c.ndim > 1 and c.shape[-1] > 1 for c in clean) else "value"
        if kind == "value":
            return None
        changed = []
        for a, b, keep in zip(outputs, clean, keep_of(self.penalty.output_mask, clean), strict=True):
            differs = a.argmax(-1) != b.argmax(-1) if kind == "softmax" else (a > 0) != (b > 0)
            changed.append((differs if keep is None else differs[keep]).flatten())
        return torch.cat(changed)

    def _rounding(self, plus: tuple[Tensor, ...], minus: tuple[Tensor, ...]) -> float:
        """In float64, so that no more than the rounding of the outputs themselves is seen."""
        exact = replace(self.penalty, reference=tuple(_wide(tensor) for tensor in self.penalty.reference))
        whole = float(exact.value(tuple(_wide(a) for a in plus)))
        part = float(exact.value(tuple((_wide(a) + _wide(b)) / 2 for a, b in zip(plus, minus, strict=True))))
        return min(1.0, 4.0 / 3.0 * part / whole) if whole > 0 else 1.0


def ratio(part: float, whole: float) -> float:
    """Part over whole; of nothing, NaN for nothing and infinity for anything else."""
    return part / whole if whole else (math.nan if part == 0 else math.inf)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()  # MPS has no float64
