"""The perturbed pass starts from the embeddings of the clean one, so that their table's dense gradient is made once."""

import copy

import pytest
import torch
from torch import Tensor, nn

from smartreg import SmartLoss
from smartreg._model import stored_gradients


class ChangesEmbeddings(nn.Module):
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


def look_ups_in_graph(tensor: Tensor) -> int:
    """How many look-ups a backward through this tensor would pass."""
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return sum(node.name().startswith("EmbeddingBackward") for node in seen)


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
    model = ChangesEmbeddings().double()
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
    gradients(ChangesEmbeddings(), dropout=dropout, memory_efficient=True)
    assert ((50, 4) in stored) == dense
    assert ((2, 3, 4) in stored) != dense


@pytest.mark.parametrize(("dropout", "look_ups"), [("shared", 1), ("independent", 2)])
def test_both_graphs_start_from_one_look_up(dropout: str, look_ups: int) -> None:
    torch.manual_seed(0)
    outputs, penalty = SmartLoss(ChangesEmbeddings(), embedding="embedding", dropout=dropout)(lambda m: m(IDS))
    assert look_ups_in_graph(outputs.sum() + penalty) == look_ups


def test_detached_reference_leaves_two_graphs_with_a_backward_each() -> None:
    torch.manual_seed(0)
    model = ChangesEmbeddings()
    outputs, penalty = SmartLoss(model, embedding="embedding", detach_reference=True)(lambda m: m(IDS))
    assert look_ups_in_graph(penalty) == 1
    outputs.sum().backward()
    before = model.embedding.weight.grad.clone()
    penalty.backward()
    assert not torch.equal(before, model.embedding.weight.grad)
