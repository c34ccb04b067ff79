"""The scale that keeps inner gradients of half-precision passes inside the range of float16."""

from collections.abc import Sequence

import torch
from torch import Tensor

_START = 2.0**12


class LossScale:
    """A loss scale for each device, for passes in float16 only; it is halved after an overflow, without synchronising.

    The inner backward has its own, since the user's `GradScaler` multiplies the loss only after the call.
    """

    def __init__(self) -> None:
        self._scales: dict[torch.device, Tensor] = {}

    def get(self, device: torch.device, *dtypes: torch.dtype | None) -> Tensor | None:
        """The scale, a float32 scalar, for passes that work in `dtypes`; None unless one of them is float16."""
        if torch.float16 not in dtypes:
            return None
        if device not in self._scales:
            self._scales[device] = torch.full((), _START, device=device)
        return self._scales[device]

    def lower_on_overflow(self, scale: Tensor | None, gradients: Sequence[Tensor]) -> None:
        """Halve the scale for the next call if a gradient taken under it is not finite; it never falls below 1."""
        if scale is None or not gradients:
            return
        entries = [g._values() if g.is_sparse else g for g in gradients]
        finite = torch.stack([torch.isfinite(e).all().to(scale.device) for e in entries]).all()
        # A new tensor: the old one may be saved in a graph.
        self._scales[scale.device] = torch.where(finite, scale, (scale / 2).clamp_min(1.0))


def scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """`value * scale`, or `value` where there is no scale."""
    return value if scale is None else value * scale.to(value.device, value.dtype)
