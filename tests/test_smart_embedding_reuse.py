"""The memory-efficient mode stores the gradient of the embeddings, not the dense one of their table."""

import copy

import pytest
import torch
from torch import Tensor, nn

from smartreg import SmartLoss, stored_gradients


class InPlace(nn.Module):
    """Scales and shifts its embeddings in place, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        embedded.mul_(3.0).add_(1.0)
        return self.head(self.dropout(embedded).flatten(1).tanh())


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def gradients(model: nn.Module, **options: object) -> list[Tensor]:
    model = copy.deepcopy(model)
    torch.manual_seed(3)
    smart = SmartLoss(model, embedding="embedding", **options)
    outputs, penalty = smart(lambda m: m(IDS))
    (outputs.square().sum() + penalty).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize("trainable", [True, False])
def test_embeddings_that_are_changed_in_place(dropout: str, trainable: bool) -> None:
    torch.manual_seed(0)
    model = InPlace().double()
    # A table whose output needs no gradient must not get one.
    model.embedding.weight.requires_grad_(trainable)
    if not trainable:
        model.dropout.p = 0.0
    standard = gradients(model, dropout=dropout)
    efficient = gradients(model, dropout=dropout, memory_efficient=True)
    for expected, found in zip(standard, efficient, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (standard[0] is not None) == trainable


@pytest.mark.parametrize(("dropout", "dense"), [("shared", False), ("independent", True)])
def test_the_gradient_of_the_table_is_not_stored(monkeypatch: pytest.MonkeyPatch, dropout: str, dense: bool) -> None:
    stored = []
    attach = stored_gradients.StoredGradients.attach

    def record(self: stored_gradients.StoredGradients, clean: object) -> Tensor:
        stored.extend(tuple(gradient.shape) for gradient in self.all())
        return attach(self, clean)

    monkeypatch.setattr(stored_gradients.StoredGradients, "attach", record)
    torch.manual_seed(0)
    gradients(InPlace(), dropout=dropout, memory_efficient=True)
    assert ((50, 4) in stored) == dense
    assert ((2, 3, 4) in stored) != dense
