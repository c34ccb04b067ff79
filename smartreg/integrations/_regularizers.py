"""Both regularizers of one training run: built when first used, saved and loaded as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smartreg import MomentumBregman, SmartLoss, suggested_beta
from smartreg._checks import not_negative, whole
from smartreg._masks import Masks
from smartreg._outputs import Forward
from smartreg._wrappers import innermost


@dataclass(frozen=True)
class Strength:
    """How much of each term a step gets.

    Attributes:
        smart_lambda: λ_s; 0 leaves the smoothness term out.
        bregman_mu: μ; 0 leaves the proximal term out.
        smart_every: The smoothness term is taken at one optimizer step in so many, with so many times the weight.
        smart_warmup_steps: λ_s grows from 0 over so many optimizer steps.

    Raises:
        TypeError: A weight is no number.
        ValueError: A weight is negative or not finite, or a number of steps is out of range.
    """

    smart_lambda: float
    bregman_mu: float
    smart_every: int = 1
    smart_warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("smart_lambda", "bregman_mu"):
            not_negative(name, getattr(self, name))
        whole("smart_every", self.smart_every, least=1, meaning=" (every step)")
        whole("smart_warmup_steps", self.smart_warmup_steps, meaning=" (none)")

    def __bool__(self) -> bool:
        return self.smart_lambda > 0 or self.bregman_mu > 0

    def smart_at(self, step: int) -> float:
        """The weight of the smoothness term at an optimizer step, counted from 0.

        Examples:
            >>> strength = Strength(0.5, 0.0, smart_every=2, smart_warmup_steps=4)
            >>> [strength.smart_at(step) for step in range(7)]
            [0.0, 0.0, 0.5, 0.0, 1.0, 0.0, 1.0]
        """
        if step % self.smart_every:
            return 0.0
        ramp = min(1.0, step / self.smart_warmup_steps) if self.smart_warmup_steps else 1.0
        return self.smart_lambda * self.smart_every * ramp


class Regularizers:
    """λ_s R_s + μ D_Breg of one run.

    Args:
        strength: The weights.
        smart_options: Arguments of `SmartLoss`, without the model.
        bregman_options: Arguments of `MomentumBregman`, without the model. β is by the length of the run if not there.

    Attributes:
        smart: None until the first step, and where λ_s is 0.
        bregman: None until the first step, and where μ is 0.
    """

    def __init__(
        self, strength: Strength, smart_options: Mapping[str, Any], bregman_options: Mapping[str, Any]
    ) -> None:
        self.strength = strength
        self.smart: SmartLoss | None = None
        self.bregman: MomentumBregman | None = None
        self._smart_options, self._bregman_options = dict(smart_options), dict(bregman_options)
        self._model: nn.Module | None = None
        self._pending: dict[str, Tensor] | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def restart(self) -> None:
        """Let the next step build both anew, from the weights that the model has then."""
        if self.smart is not None:
            self.smart.remove()
        self.smart = self.bregman = self._model = self._pending = None
        self._sums, self._counts = {}, {}

    def follow(
        self,
        model: nn.Module,
        options: Mapping[str, Any],
        *,
        total_steps: Callable[[], float],
        embedding: nn.Module | None = None,
        teacher: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Build what the run needs for this model, if that has not been done.

        The search depends on what wraps the model, the teacher on the model inside: a new wrapper keeps the teacher.

        Raises:
            RuntimeError: It is another model than before, whose teacher would be lost.

        Args:
            model: As the framework hands it over, wrapped or not.
            options: Arguments of both, such as the divergence; those given to the constructor win.
            total_steps: Of the optimizer in the whole run; asked for where β follows from it.
            embedding: Where the model does not tell it.
            teacher: Makes one where a plain copy would copy too much.
        """
        if self._model not in (None, innermost(model)):
            raise RuntimeError(
                f"one run regularizes one model, got {type(innermost(model)).__name__} after "
                f"{type(self._model).__name__}: regularize the module that holds both, or use SmartLoss and "
                f"MomentumBregman for each"
            )
        self._model = innermost(model)
        if self.strength.smart_lambda and (self.smart is None or self.smart.model is not model):
            if self.smart is not None:
                self.smart.remove()
            self.smart = SmartLoss(model, **{"embedding": embedding, **options, **self._smart_options})
        if self.strength.bregman_mu and self.bregman is None:
            given = {"teacher": None if teacher is None else teacher(), **options, **self._bregman_options}
            if "beta" not in given:
                given["beta"] = _beta_by_length(total_steps())
            self.bregman = MomentumBregman(model, **given)
        if self._pending is not None:
            state, self._pending = self._pending, None
            for prefix, part in self._parts().items():
                part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def __call__(
        self,
        model: nn.Module,
        forward: Forward,
        step: int,
        *,
        mask: Masks = None,
        output_mask: Masks = None,
        example_ids: Masks = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The outputs of the clean pass, and what is to be added to the loss: each penalty times its weight.

        Args:
            model: The model that `follow` was given.
            forward: Runs the module given to it once.
            step: The optimizer step, counted from 0.
            mask: One for each look-up of the embedding, see `SmartLoss`.
            output_mask: Which positions of the output are compared.
            example_ids: Which tokens are one example, see `SmartLoss`.
        """
        terms: dict[str, Tensor] = {}
        weight = self.strength.smart_at(step)
        if self.smart is not None and weight > 0:
            outputs, penalty = self.smart(forward, mask=mask, output_mask=output_mask, example_ids=example_ids)
            self._note("smart_penalty", penalty)
            terms["smart_term"] = weight * penalty
        else:
            outputs = forward(model)
        if self.bregman is not None:
            proximal = self.bregman(forward, outputs, output_mask=output_mask)
            self._note("bregman_penalty", proximal)
            terms["bregman_term"] = self.strength.bregman_mu * proximal
        return outputs, terms

    def update(self) -> None:
        """Move the teacher; call it after an optimizer step that was not skipped."""
        if self.bregman is not None:
            self.bregman.update()

    def means(self) -> dict[str, Tensor]:
        """The mean of each penalty over the batches since the last call of this, without its weight."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def ascent_gain(self) -> float | None:
        """That of the last search, if there has been one."""
        return None if self.smart is None or self.smart.stats is None else self.smart.stats.ascent_gain

    def state_dict(self) -> dict[str, Tensor]:
        """Teacher, counters and generator as one flat mapping of tensors."""
        if self._pending is not None:  # loaded, and no step since
            return dict(self._pending)
        return {f"{prefix}{key}": v for prefix, part in self._parts().items() for key, v in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state over as soon as there is a model, in place of a new start.

        Raises:
            ValueError: It has a teacher that this run would lose.
        """
        if any(key.startswith("bregman.") for key in state) and not self.strength.bregman_mu:
            raise ValueError("the saved run had a teacher, and this one with bregman_mu=0 has none: resume with its mu")
        self._pending = dict(state)

    def _parts(self) -> dict[str, nn.Module]:
        parts = {"smart.": self.smart, "bregman.": self.bregman}
        return {prefix: part for prefix, part in parts.items() if part is not None}

    def _note(self, name: str, penalty: Tensor) -> None:
        penalty = penalty.detach()
        self._sums[name] = self._sums[name] + penalty if name in self._sums else penalty
        self._counts[name] = self._counts.get(name, 0) + 1


def _beta_by_length(total_steps: float) -> float:
    if not 0 < total_steps < math.inf:
        raise ValueError(
            "the momentum of the teacher follows from the number of optimizer steps, which is not known of this run: "
            "pass bregman_options={'beta': 0.99}, or another"
        )
    return suggested_beta(int(total_steps))


def require(framework: str, extra: str, error: ImportError) -> ImportError:
    """The error of an import that failed, with the extra that would have brought it."""
    return ImportError(
        f"smartreg.integrations.{extra.replace('-', '_')} needs {framework}: pip install 'smartreg[{extra}]' ({error})"
    )
