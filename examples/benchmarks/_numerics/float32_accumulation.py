"""Half-precision matrix products as accelerators compute them, fast on a CPU without instructions for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
}
_HALF = (torch.bfloat16, torch.float16)


class Float32Accumulation(TorchDispatchMode):
    """Matrix products of half-precision numbers are summed in float32 and rounded once; all else stays as it is.

    That is what tensor cores and the CPU instructions for bfloat16 do. Without those instructions the kernels of torch
    do the same, twenty times slower than in float32.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        dtype = next((a.dtype for a in args if isinstance(a, Tensor)), None)
        if function in _PRODUCTS and dtype in _HALF:
            return function(*(a.float() if isinstance(a, Tensor) else a for a in args), **options).to(dtype)
        return function(*args, **options)
