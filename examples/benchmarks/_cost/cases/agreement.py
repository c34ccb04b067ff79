"""Do the modes compute the same gradients? Checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .variants import EFFICIENT, PLAIN, STANDARD, gradients_of

WARM_UP = {"size": "tiny", "batch": 1, "length": 8}
# Of the largest gradient entry. Float64 shows that the modes are one computation, float32 that rounding stays small.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}


def build(spec: Mapping[str, Any]) -> Callable[[], dict[str, float]]:
    """A call that returns the differences, relative to the largest gradient entry.

    Raises:
        RuntimeError: the call raises it where a difference exceeds its tolerance.
    """

    def check() -> dict[str, float]:
        differences = {}
        for name, tolerance in TOLERANCE.items():
            dtype = getattr(torch, name)
            plain = gradients_of(PLAIN, spec, dtype)
            silent = gradients_of(STANDARD, {**spec, "weight": 0.0}, dtype)
            standard = gradients_of(STANDARD, spec, dtype)
            efficient = gradients_of(EFFICIENT, spec, dtype)
            found = {
                f"plain and weight 0, {name}": _difference(plain, silent),
                f"standard and memory-efficient, {name}": _difference(standard, efficient),
            }
            if not _difference(plain, standard) > 1e-6:
                raise RuntimeError("the penalty has no gradient: nothing is compared")
            for what, difference in found.items():
                if not difference <= tolerance:
                    raise RuntimeError(f"gradients differ, {what}: {difference:.1e}, expected at most {tolerance:.0e}")
            differences |= found
        return differences

    return check


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    largest = max(float(g.abs().max()) for g in expected)
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) / largest
