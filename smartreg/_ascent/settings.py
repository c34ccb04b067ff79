"""The hyperparameters of the adversarial search, checked once."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from typing_extensions import Self

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

    @classmethod
    def checked(cls, *, norm: object, **options: Any) -> Self:
        """Validate the options as a user wrote them.

        Raises:
            TypeError: A number is not a number, a flag is not a bool.
            ValueError: A number is out of range or an option is misspelt.
        """
        for name in ("epsilon", "step_size", "noise_std"):
            _require_size(name, options[name])
        for name in ("detach_reference", "ascent_autocast"):
            if not isinstance(options[name], bool):
                raise TypeError(f"{name} must be True or False, got {options[name]!r}")
        steps = options["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps must be an int, got {steps!r}")
        if steps < 0:
            raise ValueError(f"steps must be 0 (random smoothing) or more, got {steps}")
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


def require_not_negative(name: str, value: object) -> float:
    """The value as a float; a `TypeError` or `ValueError` unless it is a finite number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        fine = math.isfinite(value) and value >= 0
    except OverflowError:
        raise ValueError(f"{name} must be finite and not negative, got an int that no float can hold") from None
    if not fine:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return float(value)


def _require_size(name: str, value: object) -> None:
    if (size := require_not_negative(name, value)) > LARGEST:
        raise ValueError(
            f"{name} must be at most {LARGEST:g}, got {size:g}: norms of much more overflow in float32, and "
            f"{LARGEST:g} is as good as no limit"
        )
