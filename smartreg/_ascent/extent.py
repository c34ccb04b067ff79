"""What stands under one norm: an example or a token, where the first dimension is the example and where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_IDS = "example_ids"


@dataclass(frozen=True)
class Extent:
    """The entries of an embedding output, (batch, ..., feature), that are reduced to one number.

    Attributes:
        dims: The dimensions that are reduced, and kept with size 1.
        index: Int64, (batch, ..., 1): the number of the example that a position belongs to, where examples are not
            rows; after `dims`, the positions of one number are reduced together.
        count: How many examples `index` tells apart.
    """

    dims: tuple[int, ...]
    index: Tensor | None = None
    count: int = 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum, broadcastable to `values`."""
        partial = values.sum(self.dims, keepdim=True)
        if self.index is None:
            return partial
        return partial.new_zeros(self.count).index_add(0, self.index.flatten(), partial.flatten())[self.index]

    def largest(self, values: Tensor) -> Tensor:
        """The largest absolute value, broadcastable to `values`; NaN comes through, and 0 stands for no entry."""
        if values.numel() == 0:
            return values.new_zeros([1 if d in self.dims else n for d, n in enumerate(values.shape)])
        partial = values.abs().amax(self.dims, keepdim=True)
        if self.index is None:
            return partial
        zeros = partial.new_zeros(self.count)
        return zeros.scatter_reduce(0, self.index.flatten(), partial.flatten(), "amax")[self.index]

    def length(self, values: Tensor) -> Tensor:
        """The 2-norm, broadcastable to `values`."""
        if self.index is not None:
            return self.sum(values.square()).sqrt()
        length: Tensor = torch.linalg.vector_norm(values, 2, self.dims, keepdim=True)
        return length

    def any(self, marks: Tensor) -> Tensor:
        """Whether one of the booleans is true, broadcastable to `marks`."""
        return self.sum(marks.float()) > 0

    def one_each(self, reduced: Tensor) -> Tensor:
        """What `sum` and the others gave, once for each norm: without repetitions where examples are not rows."""
        if self.index is None:
            return reduced
        once = reduced.new_zeros(self.count)
        return once.scatter(0, self.index.flatten(), reduced.expand(self.index.shape).flatten())


def rows(ndim: int) -> Extent:
    """The first dimension is the example."""
    return Extent(tuple(range(1, ndim)))


def tokens(ndim: int) -> Extent:
    """Every position by itself."""
    return Extent((ndim - 1,))


def examples(ids: Tensor, mask: Tensor | None, shape: torch.Size) -> Extent:
    """Positions with one id are an example, wherever they stand.

    Args:
        ids: Integers, (batch, ...).
        mask: Bool, (batch, ...): ids of padding are not looked at. None: there is none.
        shape: Of the embeddings, (batch, ..., feature).

    Raises:
        TypeError: The ids are no tensor of integers.
        ValueError: They have another shape; or one id stands in several rows and columns, as when packed rows are
            numbered from 0 each.

    Examples:
        >>> packed = torch.tensor([[0, 0, 1], [2, 2, 2]])
        >>> examples(packed, None, torch.Size([2, 3, 1])).sum(torch.ones(2, 3, 1)).squeeze(-1)
        tensor([[2., 2., 1.],
                [3., 3., 3.]])
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        kind = str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{_IDS} must be a tensor of integers, got {kind}")
    if ids.shape != shape[:-1]:
        raise ValueError(
            f"{_IDS} must have the shape of the embeddings without the feature dimension, {tuple(shape[:-1])}, "
            f"got {tuple(ids.shape)}"
        )
    found, index = torch.unique(ids, return_inverse=True)
    _refuse_scattered(found, index, mask)
    return Extent((len(shape) - 1,), index.unsqueeze(-1), len(found))


def _refuse_scattered(found: Tensor, index: Tensor, mask: Tensor | None) -> None:
    """One example lies along one dimension: in a packed row, or in a column of text that is (length, batch)."""
    if index.ndim < 2:
        return
    real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
    number, (row, column) = index[real], torch.nonzero(real, as_tuple=True)[:2]

    def several(places: Tensor, most: int) -> Tensor:
        pairs = torch.unique(number * most + places)
        return torch.bincount(pairs // most, minlength=len(found)) > 1

    scattered = several(row, index.shape[0]) & several(column, index.shape[1])
    if scattered.any():
        raise ValueError(
            f"{_IDS} must give the positions of one example, in one row or in one column, an id that no other example "
            f"of the batch has, got id {int(found[scattered][0])} in several of both; ids that count from 0 in each "
            f"packed row are made different by torch.arange(len(ids))[:, None] * ids.shape[1] + ids"
        )
