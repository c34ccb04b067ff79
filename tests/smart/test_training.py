"""A hand-written siamese model and its training loop take the regularizer in five changed lines."""

import difflib
import inspect

import pytest
import torch
from smart_models import VOCABULARY, Sentence, build
from torch import Tensor, nn

from smartreg import SmartLoss


def pairs(seed: int = 0) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]]:
    """Two sentences, their masks, and whether the sentences are the same."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(8):
        a, b = (torch.randint(1, VOCABULARY, (16, 5), generator=generator) for _ in range(2))
        same = torch.rand(16, generator=generator) < 0.5
        b = torch.where(same.unsqueeze(-1), a, b)
        mask_a, mask_b = (torch.arange(5) < torch.randint(2, 6, (16, 1), generator=generator) for _ in range(2))
        batches.append(((a, b), (mask_a, mask_b), same.long()))
    return batches


# fmt: off
def train(model: Sentence, epochs: int = 8) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(epochs):
        for sentences, masks, labels in pairs():
            logits = model.compare(sentences[0], masks[0], sentences[1], masks[1])
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def train_smoothly(model: Sentence, epochs: int = 8, *, memory_efficient: bool, lambda_s: float = 0.3) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    losses = []
    for _ in range(epochs):
        for sentences, masks, labels in pairs():
            logits, penalty = smart(lambda m, s=sentences, q=masks: m.compare(s[0], q[0], s[1], q[1]), mask=masks)
            loss = nn.functional.cross_entropy(logits, labels) + lambda_s * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
# fmt: on


def sensitivity(model: Sentence) -> float:
    """The penalty at one fixed setting, in eval mode."""
    smart = SmartLoss(model.eval(), steps=3, epsilon=0.3, generator=torch.Generator().manual_seed(0))
    total = 0.0
    with torch.no_grad():
        for sentences, masks, _ in pairs(1):
            total += smart(lambda m, s=sentences, q=masks: m.compare(s[0], q[0], s[1], q[1]), mask=masks).penalty.item()
    return total


def test_the_loop_changes_in_five_lines() -> None:
    plain, smooth = (inspect.getsource(function).splitlines()[1:] for function in (train, train_smoothly))
    added = [line for line in difflib.ndiff(plain, smooth) if line.startswith("+ ")]
    assert 1 + len(added) <= 5  # one for the import


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_a_siamese_model_trains_and_becomes_smoother(memory_efficient: bool) -> None:
    plain, smooth = (build(sentences=2, dropout=0.1, dtype=torch.float32) for _ in range(2))
    torch.manual_seed(0)
    train(plain)
    torch.manual_seed(0)
    losses = train_smoothly(smooth, memory_efficient=memory_efficient, lambda_s=3.0)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert all(torch.isfinite(p).all() for p in smooth.parameters())
    assert sensitivity(smooth) < 0.8 * sensitivity(plain)


def test_both_modes_train_to_the_same_weights() -> None:
    models = [build(sentences=2, dropout=0.1) for _ in range(2)]
    for model, memory_efficient in zip(models, (False, True), strict=True):
        torch.manual_seed(0)
        train_smoothly(model, epochs=2, memory_efficient=memory_efficient)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
