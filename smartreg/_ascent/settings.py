"""The hyperparameters of the adversarial search, checked once."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from typing_extensions import Self

from smartreg._checks import flag, not_negative, whole

Norm = Literal["inf", "2"]
NormOver = Literal["example", "token"]
EpsilonScale = Literal["rms", "absolute"]
Ascent = Literal["projected", "steepest", "normalized"]
Start = Literal["noise", "gradient", "towards_uniform"]
Dropout = Literal["shared", "independent"]

LARGEST = 1e9
"""Of the sizes: no limit to any embedding, and far from where squares, and with them norms, overflow in float32."""

_NORMS: dict[object, Norm] = {"inf": "inf", math.inf: "inf", "2": "2", 2: "2"}
_CHOICES = {
    "norm_over": get_args(NormOver),
    "epsilon_scale": get_args(EpsilonScale),
    "ascent": get_args(Ascent),
    "start": get_args(Start),
    "dropout": get_args(Dropout),
}


@dataclass(frozen=True, kw_only=True)
class SmartSettings:
    r"""Everything that decides where the perturbation ends, given a model and a batch.

    See `SmartLoss` for the meaning of each field. Build one with `SmartSettings.checked`, which accepts the spellings
    that users may write (`float("inf")`, `2`) and raises for everything out of range.
    """

    epsilon: float
    step_size: float
    noise_std: float
    steps: int
    norm: Norm
    norm_over: NormOver
    epsilon_scale: EpsilonScale
    ascent: Ascent
    start: Start
    dropout: Dropout
    detach_reference: bool
    ascent_autocast: bool

    @property
    def moves(self) -> bool:
        """Whether the ascent may move a perturbation at all: a ball of radius 0 holds nothing but its centre."""
        return self.epsilon > 0 or self.ascent == "normalized"

    @classmethod
    def checked(cls, *, norm: object, **options: Any) -> Self:
        """Validate the options as a user wrote them.

        Raises:
            TypeError: A number is not a number, a flag is not a bool.
            ValueError: A number is out of range or an option is misspelt.
        """
        for name in ("epsilon", "step_size", "noise_std"):
            options[name] = _size(name, options[name])
        for name in ("detach_reference", "ascent_autocast"):
            flag(name, options[name])
        options["steps"] = whole("steps", options["steps"], meaning=" (no ascent)")
        for name, choices in _CHOICES.items():
            if options[name] not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {options[name]!r}")
        try:
            checked_norm = None if isinstance(norm, bool) else _NORMS.get(norm)
        except TypeError:  # unhashable
            checked_norm = None
        if checked_norm is None:
            raise ValueError(f'norm must be "inf" (or float("inf")) or "2" (or 2), got {norm!r}')
        return cls(norm=checked_norm, **options)


def _size(name: str, value: object) -> float:
    if (size := not_negative(name, value)) > LARGEST:
        raise ValueError(
            f"{name} must be at most {LARGEST:g}, got {size:g}: norms of much more overflow in float32, and "
            f"{LARGEST:g} is as good as no limit"
        )
    return size
