"""The rules that are compared, as settings of the library, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

FORWARD, BACKWARD_TO_INPUT = 1 / 3, 1 / 3  # of a plain training step, whose backward also makes the weights' gradients


def reversed_logits(outputs: Tensor) -> Tensor:
    """The clean logits, centred, with the other sign."""
    return outputs.mean(-1, keepdim=True) - outputs


def entropy(outputs: Tensor) -> Tensor:
    """The gradient of the entropy of the prediction."""
    log_p = outputs.log_softmax(-1)
    return -log_p.exp() * (log_p - (log_p.exp() * log_p).sum(-1, keepdim=True))


def against_the_top(outputs: Tensor) -> Tensor:
    """p − e_top: the gradient of the loss with the prediction for a label, as in the fast gradient sign method."""
    return outputs.softmax(-1) - one_hot(outputs.argmax(-1), outputs)


def towards_the_least(outputs: Tensor) -> Tensor:
    """From the likeliest class to the least likely."""
    return one_hot(outputs.argmin(-1), outputs) - one_hot(outputs.argmax(-1), outputs)


def one_hot(index: Tensor, outputs: Tensor) -> Tensor:
    return nn.functional.one_hot(index, outputs.shape[-1]).to(outputs.dtype)


@dataclass(frozen=True)
class Rule:
    """A way to search the ball.

    Attributes:
        name: In the tables.
        steps: The numbers of ascent steps that it is measured with.
        options: Of `SmartLoss`; `step_size` and `noise_std` in multiples of epsilon.
        u: The cotangent of a gradient start, from the clean outputs, where the library's own is not used.
        norms: The balls that it is meant for.
        divergences: The outputs that it is meant for.
        tried: Only measured in the main cells: it did not win.
    """

    name: str
    steps: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    u: Callable[[Tensor], Tensor] | None = None
    norms: tuple[str, ...] = ("inf", "2")
    divergences: tuple[str, ...] = ("symmetric_kl", "binary_symmetric_kl", "mse")
    tried: bool = False

    def suits(self, norm: str, divergence: str) -> bool:
        return norm in self.norms and divergence in self.divergences

    def cost(self, steps: int) -> float:
        """In plain training steps: the clean and the perturbed pass with their backwards, and the search."""
        start = 0.0 if self.options["start"] == "noise" else BACKWARD_TO_INPUT
        return 2.0 + start + steps * (FORWARD + BACKWARD_TO_INPUT)

    def settings(self, epsilon: float, steps: int) -> dict[str, Any]:
        """The arguments of `SmartLoss` at this radius."""
        scaled = {name: self.options.get(name, 1.0) * epsilon for name in ("step_size", "noise_std")}
        return {**self.options, **scaled, "epsilon": epsilon, "steps": steps}


NOISE = {"start": "noise"}
GRADIENT = {"ascent": "steepest", "start": "gradient"}
UNIFORM = {"ascent": "steepest", "start": "towards_uniform"}
FAR = {"step_size": 2.0}
SOFTMAX, PROBABLE = ("symmetric_kl",), ("symmetric_kl", "binary_symmetric_kl")

RULES = (
    Rule("Algorithm 1, σ = ε", (0, 1, 2, 3), {**NOISE, "ascent": "projected"}),
    Rule("Algorithm 1, σ = ε/10", (1, 2, 3), {**NOISE, "ascent": "projected", "noise_std": 0.1}),
    Rule("steepest, σ = ε/10", (1, 2, 3), {**NOISE, "ascent": "steepest", "noise_std": 0.1}, norms=("inf",)),
    Rule("gradient start", (0, 1, 2), GRADIENT),
    Rule("gradient start, η = 2ε", (1, 2), {**GRADIENT, **FAR}),
    Rule("start towards uniform", (0, 1, 2, 3), UNIFORM, divergences=PROBABLE),
    Rule("start towards uniform, η = 2ε", (1, 2), {**UNIFORM, **FAR}, divergences=PROBABLE),
    Rule("u = −(z − mean z)", (0, 1), {**GRADIENT, **FAR}, reversed_logits, divergences=SOFTMAX, tried=True),
    Rule("u = gradient of the entropy", (0, 1), {**GRADIENT, **FAR}, entropy, divergences=SOFTMAX, tried=True),
    Rule("u = p − e_top", (0, 1), {**GRADIENT, **FAR}, against_the_top, divergences=SOFTMAX, tried=True),
    Rule("u = e_least − e_top", (0, 1), {**GRADIENT, **FAR}, towards_the_least, divergences=SOFTMAX, tried=True),
)
