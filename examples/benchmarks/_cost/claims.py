"""What the library says about its cost, against what was measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .cases import averages, divergence
from .cases.variants import EFFICIENT, PEER, STANDARD

Rows = list[Mapping[str, Any]]


def claims(results: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """A row for each claim whose table was measured: `claim`, `bound`, `measured`, `holds`."""
    return [
        {
            "claim": claim,
            "bound": f"{sign} {bound:.2f}×",
            "measured": f"{found:.2f}×",
            "holds": _holds(found, sign, bound),
        }
        for claim, found, sign, bound in _all(results)
    ]


def _all(results: Mapping[str, Rows]) -> Iterator[tuple[str, float, str, float]]:
    if grid := [row for row in results.get("grid", []) if row["axis"] == "main"]:
        at = _by(grid, "variant")
        yield "memory-efficient: peak memory of a plain step", at[EFFICIENT]["times_bytes"], "≤", 1.20
        yield "standard: time of a plain step", at[STANDARD]["times"], "≤", 2.75
        yield "standard: time of smart-pytorch", at[STANDARD]["seconds"] / at[PEER]["seconds"], "≤", 1.0
        yield "memory-efficient: time of a plain step", at[EFFICIENT]["times"], "≤", 3.15
    if kept := results.get("kept"):
        at = _by(kept, "variant")
        yield "standard, freed memory kept: time of a plain step", at[STANDARD]["times"], "≤", 2.75
        yield "memory-efficient, freed memory kept: time of a plain step", at[EFFICIENT]["times"], "≤", 3.15
    if fit := results.get("fit"):
        yield "memory-efficient: largest batch of smart-pytorch", _by(fit, "variant")[EFFICIENT]["times"], "≥", 1.7
    if forms := results.get("divergences"):
        ours = _by(forms, "form")[divergence.OURS]
        yield "symmetric_kl: speed of two kl_div", ours["speedup"], "≥", 4.0
        yield "symmetric_kl: peak memory of two kl_div", ours["times_bytes"], "≤", 0.55
    if moving := results.get("averages"):
        yield "teacher update: time of one flat lerp", _by(moving, "average")[averages.OURS]["times"], "≤", 1.2


def _by(rows: Rows, key: str) -> dict[str, Mapping[str, Any]]:
    return {row[key]: row for row in rows}


def _holds(found: float, sign: str, bound: float) -> bool:
    compare: Callable[[float], bool] = bound.__ge__ if sign == "≤" else bound.__le__
    return compare(found)
