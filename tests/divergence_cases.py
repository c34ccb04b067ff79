"""The divergences by the shape they ask for, and seeded pairs of logits."""

import torch
from torch import Tensor

OVER_CLASSES = ("symmetric_kl", "kl", "jensen_shannon", "hellinger")
OVER_ELEMENTS = ("binary_symmetric_kl", "mse")
ALL = OVER_CLASSES + OVER_ELEMENTS
BLOCKS = "symmetric_kl in blocks"


def logits(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pair(*shape: int, distance: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits, and logits about `distance` from them."""
    a = logits(*shape)
    return a.to(dtype), (a + logits(*shape, seed=1, scale=distance)).to(dtype)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def leaf_pair(*shape: int, distance: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return leaves(*pair(*shape, distance=distance, dtype=dtype))
