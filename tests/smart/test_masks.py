"""Padding: never perturbed, never measured, and out of the gradient before its norm is taken."""

from typing import Any

import pytest
import torch
from smart_models import FEATURES, Sentence, algorithm_1, batch, build, noise, perturbations
from torch import Tensor

from smartreg import SmartLoss, SmartWarning

IDS, MASK = batch(examples=3, tokens=5)  # 0, 1 and 2 padding positions
OTHER, OTHER_MASK = batch(1, examples=3, tokens=3)


class Leaking(Sentence):
    """Does not know of padding: the last position matters a thousand times more than the others."""

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded = self.embedding(ids)
        self.seen.append(embedded.detach().clone())
        weights = torch.ones(ids.shape[1], 1).double()
        weights[-1] = 1000.0
        return torch.tanh(self.hidden(embedded) * 1e-3 * weights).mean(dim=1)


def leaking() -> Leaking:
    torch.manual_seed(0)
    return Leaking().double()


@pytest.mark.parametrize("given", [None, noise], ids=["drawn", "given"])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("norm_over", ["example", "token"])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("ascent", ["projected", "normalized"])
def test_padding_is_never_perturbed(ascent: str, norm: str, norm_over: str, steps: int, given: Any) -> None:
    model = leaking()
    smart = SmartLoss(model, steps=steps, norm=norm, norm_over=norm_over, ascent=ascent, epsilon=3.0, step_size=3.0)
    smart(lambda m: m(IDS), mask=MASK, noise=given)
    assert len(perturbations(model)) == steps + 1
    for (delta,) in perturbations(model):
        assert not delta[MASK == 0].any()
        assert (delta[MASK == 1].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_gradient_at_padding_does_not_count_in_its_norm(norm: str) -> None:
    model = leaking()
    smart = algorithm_1(model, norm=norm, epsilon=3.0, step_size=1.0, epsilon_scale="absolute")
    smart(lambda m: m(IDS), mask=MASK, noise=noise)
    (start,), (end,) = perturbations(model)
    step = (end - start)[1:]  # the rows whose last position, with the giant gradient, is padding
    size = step.abs().amax(dim=(1, 2)) if norm == "inf" else step.square().sum(dim=(1, 2)).sqrt()
    torch.testing.assert_close(size, torch.ones(2).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_gradient_at_padding_may_be_anything(poison: float) -> None:
    clean, poisoned = leaking(), leaking()

    def spoil(module: Any, args: Any, embedded: Tensor) -> None:
        if embedded.requires_grad and not module.weight.requires_grad:  # in the ascent
            embedded.register_hook(lambda g: torch.where(MASK.bool().unsqueeze(-1), g, poison))

    SmartLoss(clean)(lambda m: m(IDS), mask=MASK, noise=noise)
    smart = SmartLoss(poisoned)
    poisoned.embedding.register_forward_hook(spoil)
    _, penalty = smart(lambda m: m(IDS), mask=MASK, noise=noise)
    penalty.backward()
    assert torch.equal(perturbations(poisoned)[-1][0], perturbations(clean)[-1][0])
    assert smart.stats.bad_examples == 0
    assert all(torch.isfinite(p.grad).all() for p in poisoned.parameters())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e6])
def test_embeddings_at_padding_do_not_count_in_the_radius(poison: float) -> None:
    ids = torch.where(MASK.bool(), IDS, 0)
    model = build()
    with torch.no_grad():
        model.embedding.weight[0] = poison
    smart = SmartLoss(model, steps=0, epsilon=0.5)

    def forward(m: Sentence) -> Tensor:
        embedded = torch.where(MASK.bool().unsqueeze(-1), m.embedding(ids), 0.0)
        m.seen.append(embedded.detach().clone())
        return m.head(torch.tanh(m.hidden(embedded)).mean(dim=1))

    smart(forward, mask=MASK, noise=lambda x: torch.full_like(x, 99.0))
    (delta,) = perturbations(model)[0]
    for i in range(3):
        real = MASK[i].bool()
        radius = 0.5 * model.embedding(ids[i, real]).square().mean().sqrt().item()
        torch.testing.assert_close(delta[i, real], torch.full_like(delta[i, real], radius), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_every_dtype(dtype: torch.dtype) -> None:
    found = []
    for mask in (MASK, MASK.to(dtype)):
        model = build()
        SmartLoss(model)(lambda m: m(IDS, MASK), mask=mask, noise=noise)
        found.append(perturbations(model)[-1][0])
    assert torch.equal(*found)


def test_without_a_mask_every_position_is_real() -> None:
    model = build()
    SmartLoss(model)(lambda m: m(IDS), noise=noise)
    unmasked = perturbations(model)[-1][0]
    model.seen.clear()
    SmartLoss(model)(lambda m: m(IDS), mask=torch.ones_like(MASK), noise=noise)
    assert torch.equal(perturbations(model)[-1][0], unmasked)
    assert unmasked.abs().amax(dim=-1).min() > 0


def test_masks_go_with_the_look_ups_in_order() -> None:
    model = build(sentences=2)
    smart = SmartLoss(model)
    smart(lambda m: m.compare(IDS, MASK, OTHER, OTHER_MASK), mask=(MASK, OTHER_MASK))
    first, second = perturbations(model, lookups=2)[-1]
    for delta, mask in ((first, MASK), (second, OTHER_MASK)):
        assert torch.equal(delta.abs().amax(dim=-1) > 0, mask.bool())


def test_one_look_up_may_go_without_a_mask() -> None:
    model = build(sentences=2)
    SmartLoss(model)(lambda m: m.compare(IDS, None, OTHER, OTHER_MASK), mask=[None, OTHER_MASK])
    first, second = perturbations(model, lookups=2)[-1]
    assert (first.abs().amax(dim=-1) > 0).all()
    assert torch.equal(second.abs().amax(dim=-1) > 0, OTHER_MASK.bool())


def test_a_sequence_of_one_mask_is_fine() -> None:
    model = build()
    SmartLoss(model)(lambda m: m(IDS, MASK), mask=[MASK])
    assert torch.equal(perturbations(model)[-1][0].abs().amax(dim=-1) > 0, MASK.bool())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK, r"one tensor for each embedding look-up, in order: expected 2, got 1"),
        ([MASK], r"one tensor for each embedding look-up, in order: expected 2, got 1"),
        ([MASK, OTHER_MASK, MASK], r"expected 2, got 3"),
        ([OTHER_MASK, MASK], r"without the feature dimension, \(3, 5\), got \(3, 3\)"),
        ([MASK, OTHER_MASK[:2]], r"\(3, 3\), got \(2, 3\)"),
        ([MASK.unsqueeze(-1), OTHER_MASK], r"\(3, 5\), got \(3, 5, 1\)"),
    ],
)
def test_wrong_number_or_shape_of_masks(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmartLoss(build(sentences=2))(lambda m: m.compare(IDS, MASK, OTHER, OTHER_MASK), mask=mask)


def test_a_row_of_padding_alone() -> None:
    mask = MASK.clone()
    mask[1] = 0
    model = build()
    smart = SmartLoss(model, steps=2)
    _, penalty = smart(lambda m: m(IDS, mask), mask=mask)
    penalty.backward()
    assert not any(delta[1].any() for (delta,) in perturbations(model))
    assert all(delta[[0, 2]].any() for (delta,) in perturbations(model))
    assert smart.stats.bad_examples == 0  # there is nothing to perturb in it
    assert penalty.item() > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_nothing_but_padding() -> None:
    model = build()
    smart = SmartLoss(model, norm="2")
    with pytest.warns(SmartWarning, match=r"no example of this call.* marks 0% of the positions"):
        _, penalty = smart(lambda m: m(IDS, MASK), mask=torch.zeros_like(MASK))
    penalty.backward()
    assert penalty.item() == 0.0
    assert smart.stats.max_perturbation == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_radius_of_a_sentence_does_not_depend_on_its_neighbours() -> None:
    alone, together = build(), build()
    for model, rows in ((alone, slice(1, 2)), (together, slice(0, 3))):
        ids, mask = IDS[rows], MASK[rows]
        drawn = noise(torch.zeros(3, 5, FEATURES).double())[rows]
        SmartLoss(model, steps=2)(lambda m, ids=ids, mask=mask: m(ids, mask), mask=mask, noise=drawn)
    torch.testing.assert_close(perturbations(alone)[-1][0][0], perturbations(together)[-1][0][1], rtol=0, atol=1e-12)
