"""What a call of `SmartLoss` returns, and what it did."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

_NAMES = ("penalty", "start_divergence", "ascent_gain", "max_perturbation", "bad_examples", "radius_used")


class SmartOutput(NamedTuple):
    """What a regularized forward pass returns.

    Attributes:
        outputs: What `forward` returned in the clean pass, unchanged.
        penalty: R_s(θ), a scalar in float32 at least, to be multiplied by λ_s and added to the task loss.
    """

    outputs: Any
    penalty: Tensor


@dataclass(frozen=True, repr=False)
class SmartStats:
    """Plain numbers of the last call; the device is synchronised when one is read, not before.

    Reads as attributes and as a mapping: `stats.penalty`, `stats["penalty"]`, `dict(stats)`.

    Example:
        >>> import torch
        >>> stats = SmartStats(*map(torch.tensor, (0.5, 0.25, 0.125, 0, 1.0)))
        >>> dict(stats)["ascent_gain"]
        2.0
    """

    _penalty: Tensor
    _start_divergence: Tensor
    _max_perturbation: Tensor
    _bad_examples: Tensor
    _radius_used: Tensor

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={self[name]:.4g}" for name in self.keys())  # not a dict
        return f"{type(self).__name__}({numbers})"

    @property
    def penalty(self) -> float:
        """The penalty."""
        return float(self._penalty)

    @property
    def start_divergence(self) -> float:
        """The divergence at the random starting point, before the first ascent step."""
        return float(self._start_divergence)

    @property
    def ascent_gain(self) -> float:
        """The penalty over the start divergence: what the ascent adds to random noise. NaN if both are zero."""
        penalty, start = self.penalty, self.start_divergence
        return penalty / start if start else (float("nan") if penalty == 0 else float("inf"))

    @property
    def max_perturbation(self) -> float:
        """The largest absolute entry of the perturbation, in the units of the embeddings."""
        return float(self._max_perturbation)

    @property
    def bad_examples(self) -> int:
        """How many examples met an ascent gradient that was not finite, or zero, and kept their perturbation."""
        return int(self._bad_examples)

    @property
    def radius_used(self) -> float:
        """How much of the ball was used: the mean of ‖δ‖ / ε, over examples or tokens as `norm_over` says."""
        return float(self._radius_used)

    def __getitem__(self, name: str) -> float:
        if name not in _NAMES:
            raise KeyError(name)
        value: float = getattr(self, name)
        return value

    def keys(self) -> Iterator[str]:
        """The names of the numbers."""
        return iter(_NAMES)
