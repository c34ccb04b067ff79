"""What a regularizer looks at beside its work, once or in its first calls, and warns about."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from smartreg._ascent.objective import Objective
from smartreg._ascent.precision import PrecisionCheck
from smartreg._ascent.search import Found
from smartreg._ascent.settings import SmartSettings
from smartreg._ascent.start import warn_if_nothing_to_follow
from smartreg._loss_scale import LossScale
from smartreg._masks import Masks, reading_waits
from smartreg._outputs import keep_of
from smartreg._warnings import warn
from smartreg.divergences import Divergence


class Repeated(Protocol):
    """Passes whose clean one can be run again."""

    @property
    def kind(self) -> object:
        """What runs, and in which mode: a look at one says nothing about another."""

    def repeated(self) -> tuple[Tensor, ...]:
        """The tensors to compare of one more clean pass, detached."""

    def same_dropout(self) -> AbstractContextManager[None]:
        """In this block every pass sees the dropout masks of the clean one."""


class RepeatCheck:
    """Runs the clean pass once more, in the first call of each kind, and warns if the output is another.

    It should be the same to the bit: what is left over is randomness or state that no replay reaches, and would be
    taken for the effect of a perturbation.
    """

    _MOST = 8  # functions that are made anew for every call must not be looked at for ever

    def __init__(self) -> None:
        self._looked: set[object] = set()

    def look(self, passes: Repeated, objective: Objective) -> None:
        """Warn if the clean pass cannot be repeated.

        Args:
            passes: Run it.
            objective: What a difference is measured by.
        """
        if passes.kind in self._looked or len(self._looked) >= self._MOST:
            return
        self._looked.add(passes.kind)
        with passes.same_dropout():
            again = passes.repeated()
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (objective.reference, again)]
        if shapes[0] != shapes[1]:
            warn(
                f"forward is not repeatable: its outputs are of shape {shapes[0]}, and {shapes[1]} when {_RUN}; {_WHY}"
            )
            return
        off, size = _largest_difference(objective.reference, again)
        if off > 0:
            warn(
                f"forward is not repeatable: when {_RUN}, outputs of up to {size:.3g} are off by up to {off:.3g}; the "
                f"divergence of the two, {float(objective.value(again)):.3g}, would be part of every penalty, with no "
                f"perturbation at all; {_WHY}"
            )


_RUN = "it runs once more without a perturbation, from the same random state, buffers and attributes"
_WHY = (
    "usual causes: randomness that is not torch's, Python's or numpy's, or that forward reseeds; an argument or a "
    "global that forward changes (a key-value cache, an image normalised in place, next(iterator)). Give forward "
    "fresh arguments in every call (lambda m: m(copy.deepcopy(cache))), and draw outside of it. "
    "check_first_call=False leaves this look out"
)
_ROUNDINGS = 16.0  # of the largest entry: kernels that add in no fixed order may differ by as much


def _largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference that is more than rounding, and the largest entry; equal infinities and NaN are equal."""
    worst, size = 0.0, 0.0
    for a, b in zip(first, second, strict=True):
        differs = (a != b) & ~(a.isnan() & b.isnan())
        if not differs.any():
            continue
        gap = (a - b).abs()[differs].float()
        entries = float(torch.where(a.isfinite(), a, 0.0).abs().max())
        allowed = (2.0 if a.dtype.itemsize < 4 else _ROUNDINGS) * torch.finfo(a.dtype).eps * entries
        largest = float(torch.where(gap.isnan(), torch.inf, gap).max())
        if largest > max(allowed, worst):
            worst, size = largest, entries
    return worst, size


class OutcomeCheck:
    """Warns once where a call did nothing, and once where its numbers are not finite.

    On the CPU after every call; on an accelerator, where looking takes a wait for the device, after the first three.
    """

    _CALLS = 3

    def __init__(self) -> None:
        self._calls = 0
        self._said: set[str] = set()

    def look_ahead(self, settings: SmartSettings, divergence: Divergence) -> None:
        """Warn if these settings leave the ascent no gradient to follow; that a call has no effect is then no news."""
        if "flat" not in self._said and warn_if_nothing_to_follow(settings, divergence):
            self._said.update(("flat", "idle"))

    def expect_nothing(self) -> None:
        """A perturbation without effect is no news, since something has been said about it."""
        self._said.add("idle")

    def tell_of_autocast(self) -> None:
        """Warn that `ascent_autocast=False` has nothing to switch off."""
        if "autocast" not in self._said:
            self._said.add("autocast")
            warn(
                "ascent_autocast=False has no effect: autocast is entered inside of forward, as in a model that "
                "accelerate has prepared, where nothing outside can switch it off. Give SmartLoss the model without "
                "that (accelerator.unwrap_model(model, keep_fp32_wrapper=False)) and call it in an autocast of your own"
            )

    def look(
        self,
        clean: Sequence[Tensor],
        found: Found,
        penalty: Tensor,
        output_mask: Masks,
        autocast: torch.dtype | None,
    ) -> None:
        """Warn if no example had a gradient to follow, or the penalty is not finite.

        Args:
            clean: The tensors to compare of the clean pass.
            autocast: What autocast made of float32 in it; None where it was off.
            found: What the search found.
            penalty: The value, detached.
            output_mask: Which positions were compared.
        """
        self._calls += 1
        if reading_waits(penalty) and self._calls > self._CALLS:
            return
        value = float(penalty)
        if not -torch.inf < value < torch.inf:
            if "broken" not in self._said:
                self._said.add("broken")
                warn(_broken(value, clean))
        elif "idle" not in self._said and found.balls[0].settings.moves and _all_bad(found, autocast):
            if not all(keep is None or bool(keep.any()) for keep in keep_of(output_mask, clean)):
                return  # there was nothing to compare
            self._said.add("idle")
            warn(
                f"no example of this call had a gradient to follow ({int(found.bad_examples)} of them zero or not "
                f"finite; penalty {value:.3g}). Either mask has the other convention: it must "
                f"be 1 or True at real tokens, and marks {found.share_real():.0%} of the positions as such; "
                f"pass ~mask if it marks padding. Or the output does not depend on the embeddings there, or its "
                f"gradients are not finite"
            )


def _all_bad(found: Found, autocast: torch.dtype | None) -> bool:
    """Whether no example had a usable gradient; not asked in float16, whose loss scale may still be too large."""
    embedded = found.balls[0].embeddings
    masked = embedded.numel() > 0 and found.share_real() == 0  # nothing was left to have a gradient
    found_none = (int(found.bad_examples) > 0 or masked) and bool(found.all_bad)
    return torch.float16 not in (embedded.dtype, autocast) and found_none


def all_finite(clean: Sequence[Tensor]) -> bool:
    """Whether the outputs are numbers; −∞ is one, the logit of an absent class."""
    return all(bool(((tensor < torch.inf) | tensor.isneginf()).all()) for tensor in clean)


def _broken(value: float, clean: Sequence[Tensor]) -> str:
    if all_finite(clean):
        return (
            f"the penalty is {value}, and the clean output is finite: the perturbed pass overflows, the divergence is "
            f"infinite, or a given noise is not finite. Use smaller values of epsilon, or a bounded divergence, as "
            f"jensen_shannon is"
        )
    return (
        f"the clean output of the model is not finite, before any perturbation, so that the penalty is {value}: the "
        f"weights or the batch hold NaN or inf. Go back to a sound checkpoint, and lower the learning rate or clip "
        f"gradients"
    )


@dataclass
class Looks:
    """What one regularizer remembers from call to call.

    Attributes:
        loss_scale: That of float16 passes.
        precision: Whether the dtype in use can carry the perturbation; None does not look.
        repeatable: Whether the clean pass can be repeated; None does not look.
        outcome: Whether a call did anything.
    """

    loss_scale: LossScale = field(default_factory=LossScale)
    precision: PrecisionCheck | None = field(default_factory=PrecisionCheck)
    repeatable: RepeatCheck | None = field(default_factory=RepeatCheck)
    outcome: OutcomeCheck = field(default_factory=OutcomeCheck)

    @classmethod
    def of(cls, *, check_first_call: bool) -> Looks:
        """With a look at whether the first call can be repeated, or without."""
        return cls() if check_first_call else cls(repeatable=None)
