"""Checks of arguments that several entrances have: numbers (NumPy's too), flags, and `forward`."""

import math
from numbers import Integral, Real


def flag(name: str, value: object) -> bool:
    """The value; a `TypeError` unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def whole(name: str, value: object, least: int = 0, meaning: str = "") -> int:
    """The value as an int; a `TypeError` or `ValueError` unless it is a whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least}{meaning} or more, got {value}")
    return int(value)


def number(name: str, value: object) -> float:
    """The value as a float; a `TypeError` or `ValueError` unless it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite and not negative, got an int that no float can hold") from None


def not_negative(name: str, value: object) -> float:
    """The value as a float; a `TypeError` or `ValueError` unless it is a finite number of 0 or more."""
    checked = number(name, value)
    if not (math.isfinite(checked) and checked >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return checked


def check_forward(forward: object) -> None:
    """Raises a `TypeError` unless the argument can be called."""
    if not callable(forward):
        kind = type(forward).__name__
        raise TypeError(f"forward must be a function of the module, as in lambda m: m(**batch), got {kind}")
