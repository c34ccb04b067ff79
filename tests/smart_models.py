"""Small models for the tests of the regularizer, and what the tests ask of every model."""

from collections import UserList
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smartreg import SmartLoss

ALGORITHM_1: dict[str, Any] = {"norm": "inf", "start": "noise", "steps": 1, "noise_std": 0.15}
"""Algorithm 1 as printed, with the sizes ε = η = σ = 0.15; the defaults are another, stronger search."""


def algorithm_1(model: nn.Module, **options: Any) -> SmartLoss:
    """`SmartLoss` with `ALGORITHM_1`, for what is particular to noise and to ascent steps."""
    return SmartLoss(model, **{**ALGORITHM_1, **options})


VOCABULARY, FEATURES, HIDDEN, CLASSES = 13, 4, 5, 3
both_modes = pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])


class Sentence(nn.Module):
    """Mean over the real tokens of tanh(W x + b), then a linear head; two sentences u, v enter it as (u, v, u * v)."""

    def __init__(self, *, sentences: int = 1, dropout: float = 0.0, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES, sparse=sparse)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.head = nn.Linear(HIDDEN if sentences == 1 else 3 * HIDDEN, CLASSES)
        self.seen: UserList[Tensor] = UserList()  # no list, whose content would be that of the clean pass after a call
        """What every look-up gave, as the rest of the model saw it."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded = self.embedding(ids)  # (batch, sequence, feature)
        self.seen.append(embedded.detach().clone())
        hidden = torch.tanh(self.hidden(self.dropout(embedded)))
        if mask is None:
            return hidden.mean(dim=1)
        real = mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encode(ids, mask))

    def compare(self, a: Tensor, mask_a: Tensor | None, b: Tensor, mask_b: Tensor | None) -> Tensor:
        u, v = self.encode(a, mask_a), self.encode(b, mask_b)
        return self.head(torch.cat([u, v, u * v], dim=-1))


def build(seed: int = 0, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, **options: Any) -> Sentence:
    """A seeded model, its weights times `scale`."""
    torch.manual_seed(seed)
    model = Sentence(**options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def batch(seed: int = 0, *, examples: int = 3, tokens: int = 4) -> tuple[Tensor, Tensor]:
    """Token ids and a mask whose rows end in 0, 1, 2, ... padding positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (examples, tokens), generator=generator)
    padding = torch.arange(examples).remainder(tokens).unsqueeze(-1)
    return ids, (torch.arange(tokens) < tokens - padding).long()


def noise(embeddings: Tensor) -> Tensor:
    """Seeded: the same at every call."""
    generator = torch.Generator().manual_seed(4)
    return 0.01 * torch.randn(embeddings.shape, generator=generator).to(embeddings)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of every `.grad`."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def perturbations(model: Sentence, lookups: int = 1) -> list[list[Tensor]]:
    """What every pass after the first added to each look-up."""
    passes = [model.seen[start : start + lookups] for start in range(0, len(model.seen), lookups)]
    return [[seen - clean for seen, clean in zip(one, passes[0], strict=True)] for one in passes[1:]]


@contextmanager
def counting(module: nn.Module) -> Iterator[Callable[[], int]]:
    """How often the module runs in this block."""
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield lambda: len(calls)
    finally:
        handle.remove()
