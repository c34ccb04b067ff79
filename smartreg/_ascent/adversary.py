"""The search on one batch: what is maximised, where, from where, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball
from smartreg._ascent.looks import Looks, Repeated
from smartreg._ascent.objective import Graph, Objective, RunPass
from smartreg._ascent.search import Found, search
from smartreg._ascent.settings import SmartSettings
from smartreg._ascent.start import (
    Noise,
    Start,
    balls_around,
    cotangents,
    given_cotangents,
    gradient_start,
    noise_start,
    zero_start,
)
from smartreg._masks import Masks
from smartreg._outputs import divergence_of, keep_of
from smartreg.divergences import Divergence, kind_of


class Clean(Protocol):
    """What the search is told of the clean pass."""

    @property
    def compared(self) -> tuple[Tensor, ...]:
        """f(x), the tensors to compare."""

    @property
    def embeddings(self) -> Sequence[Tensor]:
        """x of each look-up, detached."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast makes of float32; None where it is off."""

    @property
    def graph(self) -> Graph | None:
        """The tensors to compare and the embeddings, where their graph may be differentiated now and kept."""


class Passes(Repeated, Protocol):
    """What can run the clean pass again."""

    def perturbed(
        self, perturbations: Sequence[Tensor], *, freeze: bool = False, autocast: bool = True
    ) -> AbstractContextManager[tuple[Tensor, ...]]:
        """A pass with perturbations; with `freeze` nothing but they needs a gradient."""

    def reference_without_autocast(self) -> tuple[tuple[Tensor, ...], bool]:
        """f(x) with the user's autocast off, detached, and whether another one was on inside of f."""

    def undone(self) -> AbstractContextManager[None]:
        """In this block whatever is written to the state of the model is undone at its end."""


class Query(NamedTuple):
    """What a call asks for: ℓ, where there is padding, the start if given, what ℓ compares, and what an example is."""

    divergence: Divergence
    mask: Masks
    noise: Noise
    output_mask: Masks = None
    example_ids: Masks = None


class Position(NamedTuple):
    """An objective, the ball of each look-up, and the first perturbation in it."""

    objective: Objective
    balls: list[Ball]
    start: Start


@dataclass(frozen=True)
class Adversary:
    """Searches the ball around the embeddings of a batch, by the same way for a model and for a function.

    Attributes:
        settings: The hyperparameters.
        generator: Draws the noise, or u.
        looks: What is looked at beside the search, and the loss scale of float16 passes.
    """

    settings: SmartSettings
    generator: torch.Generator | None
    looks: Looks

    @property
    def pulls_back(self) -> bool:
        """Whether the start comes from the graph of the clean pass, where there is one."""
        return self.settings.start != "noise" and self.settings.epsilon > 0 and torch.is_grad_enabled()

    def penalty(self, passes: Passes, clean: Clean, query: Query, run: RunPass) -> tuple[Found, Tensor]:
        """R_s with its graph, and what the search found."""
        found = self.search(passes, clean, self.begin(passes, clean, query))
        detached = self.settings.detach_reference
        reference = tuple(tensor.detach() for tensor in clean.compared) if detached else clean.compared
        with run(found.perturbations) as perturbed:
            penalty = divergence_of(query.divergence, perturbed, reference, query.output_mask)
        self.looks.outcome.look(clean.compared, found, penalty.detach(), query.output_mask, clean.autocast_dtype)
        return found, penalty

    def begin(self, passes: Passes, clean: Clean, query: Query) -> Position:
        """Set up the objective, the balls and the start.

        Args:
            passes: Run f again.
            clean: The clean pass.
            query: What the call asks for.
        """
        fixed = tuple(tensor.detach() for tensor in clean.compared)
        dtypes = (clean.autocast_dtype, *(tensor.dtype for tensor in (*clean.embeddings, *fixed)))
        run = partial(passes.perturbed, freeze=True)
        objective = Objective(run, fixed, query.divergence, self.looks.loss_scale, dtypes, query.output_mask)
        if self.looks.repeatable is not None:
            self.looks.repeatable.look(passes, objective)
        balls = balls_around(clean.embeddings, query.mask, self.settings, query.example_ids)
        start, noise = self.settings.start, query.noise
        given = noise is not None and start != "gradient"  # the start itself; for "gradient" it is u
        idle = self.settings.steps == 0 or not self.settings.moves
        if self.settings.epsilon == 0 and idle and start != "noise":
            return Position(objective, balls, zero_start(balls))
        if start == "noise" or given or self.settings.epsilon == 0:
            return Position(objective, balls, noise_start(balls, noise, self.generator))
        if noise is None:
            u = cotangents(fixed, kind_of(query.divergence), start, self.generator)
        else:
            u = given_cotangents(fixed, noise)
        u = [_kept(one, keep) for one, keep in zip(u, keep_of(query.output_mask, fixed), strict=True)]
        if clean.graph is None:
            gradients = objective.pullback(u, zero_start(balls).perturbations)
        else:
            with passes.undone():  # a checkpointed part of the model runs again, under the user's own graph
                gradients = objective.pullback_through(u, clean.graph)
        return Position(objective, balls, gradient_start(balls, gradients))

    def search(self, passes: Passes, clean: Clean, position: Position) -> Found:
        """The perturbation of each look-up: Algorithm 1, after a look at the precision."""
        objective, balls, start = position
        if self.looks.precision is not None:
            with passes.same_dropout():
                if self.looks.precision.look(objective, balls, start.perturbations, clean.autocast_dtype):
                    self.looks.outcome.expect_nothing()
        if clean.autocast_dtype is not None and self.settings.steps and not self.settings.ascent_autocast:
            run = partial(passes.perturbed, freeze=True, autocast=False)
            reference, inside = passes.reference_without_autocast()
            if inside:
                self.looks.outcome.tell_of_autocast()
            objective = replace(objective, run=run, reference=reference)
        return search(objective, balls, start)


def _kept(u: Tensor, keep: Tensor | None) -> Tensor:
    """u with 0 where a position is left out, by selection, so that NaN stays out."""
    return u if keep is None else torch.where(keep.reshape(*keep.shape, *[1] * (u.ndim - keep.ndim)), u, 0.0)
