"""A small transformer for tests of precision, whose embeddings can be rescaled without changing its function."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from smartreg import symmetric_kl


class Encoder(nn.Module):
    """Word embeddings / `scale`, two transformer layers, mean over tokens, a head of three classes."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.words = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers(self.norm(self.words(ids) / self.scale))
        return self.head(x.mean(1))


def build(scale: float = 1.0, dropout: float = 0.0, seed: int = 0) -> Encoder:
    """The same function of the words for every scale; the root mean square of the embeddings is `scale`."""
    torch.manual_seed(seed)
    model = Encoder(scale, dropout)
    with torch.no_grad():
        model.words.weight.mul_(scale)
        model.head.weight.mul_(4.0)
    return model


def sentences(examples: int = 6, tokens: int = 6) -> Tensor:
    return torch.randint(0, 50, (examples, tokens), generator=torch.Generator().manual_seed(1))


def direction(model: Encoder, ids: Tensor, delta: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """The ascent gradient at x + delta, without smartreg's search; float64 for a float64 model."""
    variable = delta.clone().requires_grad_()
    scale = 4096.0 if autocast is torch.float16 else 1.0

    def perturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return (output + variable).to(output.dtype)

    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        with torch.no_grad():
            clean = model(ids)
        handle = model.words.register_forward_hook(perturb)
        try:
            moved = model(ids)
        finally:
            handle.remove()
    (gradient,) = torch.autograd.grad(symmetric_kl(moved, clean) * scale, variable)
    return gradient.double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def in_float64(model: Encoder) -> Encoder:
    return copy.deepcopy(model).double()


@contextlib.contextmanager
def counted_passes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """How often the model has run inside the block."""
    passes: list[None] = []
    handle = model.register_forward_hook(lambda *_: passes.append(None))
    try:
        yield lambda: len(passes)
    finally:
        handle.remove()
