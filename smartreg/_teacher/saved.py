"""What a saved teacher must be to be taken over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smartreg._teacher.parameters import Pair, listed


def misfit(pairs: Mapping[str, Pair], averages: Mapping[str, Tensor], shared: set[str]) -> str:
    """What keeps saved averages from being those of these parameters, in words; empty if nothing does."""
    saved = averages.keys() | shared
    parts = {
        "only in the state": listed(saved - pairs.keys()),
        "only in the model": listed(pairs.keys() - saved),
        "of another shape": listed(
            f"{name} is {tuple(average.shape)} in the state, {tuple(pairs[name].teacher.shape)} in the model"
            for name, average in averages.items()
            if name in pairs and pairs[name].teacher.shape != average.shape
        ),
    }
    found = "; ".join(f"{what}: {names}" for what, names in parts.items() if names)
    return f"the saved averages are of other parameters than the model's: {found}" if found else ""


def unsound(updates: Tensor, averages: Mapping[str, Tensor]) -> str:
    """What no teacher can have saved, in words; empty if there is nothing.

    Examples:
        >>> unsound(torch.tensor(-5), {})
        'the saved number of updates must be an integer of 0 or more, got -5; the state was changed or damaged'
    """
    if updates.numel() != 1 or updates.is_floating_point() or updates.is_complex() or int(updates) < 0:
        return (
            f"the saved number of updates must be an integer of 0 or more, got {updates.tolist()}; the state was "
            f"changed or damaged"
        )
    broken = listed(name for name, average in averages.items() if bool(torch.isnan(average).any()))
    return f"saved averages hold NaN: {broken}; load a checkpoint from before the run diverged" if broken else ""
