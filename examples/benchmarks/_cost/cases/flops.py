"""The arithmetic of one step, counted and not timed: floating-point operations of its matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from . import variants

WARM_UP = variants.WARM_UP


def build(spec: Mapping[str, Any]) -> Callable[[], dict[str, int]]:
    """A call that returns how many operations one step of every variant takes, on one sentence."""
    return lambda: {name: count({**spec, "batch": 1, "variant": name}) for name in variants.ALL}


def count(spec: Mapping[str, Any]) -> int:
    """The operations of one step of one variant."""
    step = variants.build(spec)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
