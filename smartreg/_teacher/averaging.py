"""One step of an exponential moving average over many tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements converted to another dtype at a time: few enough to stay in a CPU's cache, enough to fill a GPU.
_CHUNK = 1 << 20


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are averaged: float32 at least.

    In bfloat16 an average with β = 0.99 never moves: 1 % of a difference is below the distance of two such numbers.

    Examples:
        >>> average_dtype(torch.bfloat16), average_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32


def move_averages(averages: list[Tensor], values: list[Tensor], beta: float) -> None:
    r"""\(a \leftarrow (1-\beta)\,v + \beta\,a\) in place, as a + (1 − β)(v − a).

    Fused over the tensors; β = 0 copies the values exactly.

    Args:
        averages: Tensors a of one dtype on one device.
        values: Tensors v of the same shapes, on that device, of one dtype, which may be narrower.
        beta: β in [0, 1).

    Examples:
        >>> average = torch.tensor([0.0, 1.0])
        >>> move_averages([average], [torch.tensor([1.0, 1.0])], beta=0.75)
        >>> average
        tensor([0.2500, 1.0000])
    """
    if beta == 0.0:
        # The step a + 1 · (v − a) would turn an infinite average into NaN.
        torch._foreach_copy_(averages, values)
    elif averages[0].dtype == values[0].dtype:
        torch._foreach_lerp_(averages, values, 1.0 - beta)
    else:
        for some, narrow in _chunks(averages, values):
            torch._foreach_lerp_(some, [value.to(some[0].dtype) for value in narrow], 1.0 - beta)


def _chunks(averages: list[Tensor], values: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Lists of at most `_CHUNK` elements together; a larger tensor is cut into rows where it can be."""
    some: list[Tensor] = []
    narrow: list[Tensor] = []
    size = 0
    for average, value in zip(averages, values, strict=True):
        rows = average.shape[0] if type(average.data) is Tensor and average.dim() else 1
        step = max(1, _CHUNK * rows // max(1, average.numel()))
        for start in range(0, rows, step):
            whole = step >= rows
            some.append(average if whole else average[start : start + step])
            narrow.append(value if whole else value[start : start + step])
            size += some[-1].numel()
            if size >= _CHUNK:
                yield some, narrow
                some, narrow, size = [], [], 0
    if some:
        yield some, narrow
