"""The scale that keeps inner gradients of half-precision passes inside the range of float16."""

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST = 2.0**12
_GROWTH_INTERVAL = 2000  # that of torch's GradScaler


class LossScale:
    """A loss scale for each device, for passes in float16 only, which follows overflows without synchronising.

    It is halved after one, and doubled after 2,000 gradients in a row without, up to where it began. The inner backward
    has its own, since the user's `GradScaler` multiplies the loss only after the call.
    """

    def __init__(self) -> None:
        self._scales: dict[torch.device, Tensor] = {}
        self._finite: dict[torch.device, Tensor] = {}  # how many in a row

    def get(self, device: torch.device, *dtypes: torch.dtype | None) -> Tensor | None:
        """The scale, a float32 scalar, for passes that work in `dtypes`; None unless one of them is float16."""
        if torch.float16 not in dtypes:
            return None
        if device not in self._scales:
            self._scales[device] = torch.full((), _LARGEST, device=device)
            self._finite[device] = torch.zeros((), device=device)
        return self._scales[device]

    def update(self, scale: Tensor | None, gradients: Sequence[Tensor]) -> None:
        """Halve the scale for the next call if a gradient taken under it is not finite; it never falls below 1."""
        if scale is None or not gradients:
            return
        entries = [g._values() if g.is_sparse else g for g in gradients]
        finite = torch.stack([torch.isfinite(e).all().to(scale.device) for e in entries]).all()
        row = torch.where(finite, self._finite[scale.device] + 1, 0.0)
        grown = torch.where(row == _GROWTH_INTERVAL, 2 * scale, scale).clamp_max(_LARGEST)
        # New tensors: the old scale may be saved in a graph.
        self._scales[scale.device] = torch.where(finite, grown, (scale / 2).clamp_min(1.0))
        self._finite[scale.device] = row % _GROWTH_INTERVAL


def scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """`value * scale`, or `value` where there is no scale."""
    return value if scale is None else value * scale.to(value.device, value.dtype)
