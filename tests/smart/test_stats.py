"""`smart.stats`, and ascent gradients that cannot be used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from smart_models import FEATURES, Sentence, algorithm_1, batch, both_modes, build, gradients, noise, perturbations
from torch import Tensor

from smartreg import SmartLoss, _masks, symmetric_kl
from smartreg._ascent import looks

IDS, MASK = batch(examples=4, tokens=5)


@both_modes
def test_numbers_of_the_last_call(memory_efficient: bool) -> None:
    model = build(scale=2.0)
    smart = algorithm_1(model, steps=2, memory_efficient=memory_efficient)
    assert smart.stats is None
    outputs, penalty = smart(lambda m: m(IDS, MASK), mask=MASK, noise=noise)
    stats = smart.stats
    passes = perturbations(model)

    def divergence_at(delta: Tensor) -> float:
        hidden = torch.tanh(model.hidden(model.embedding(IDS) + delta)) * MASK.unsqueeze(-1)
        return symmetric_kl(model.head(hidden.sum(dim=1) / MASK.sum(dim=1, keepdim=True)), outputs).item()

    assert stats.penalty == penalty.item() == pytest.approx(divergence_at(passes[2][0]), rel=1e-9)
    assert stats.start_divergence == pytest.approx(divergence_at(passes[0][0]), rel=1e-9)
    assert stats.ascent_gain == stats.penalty / stats.start_divergence > 1
    assert stats.max_perturbation == pytest.approx(passes[2][0].abs().max().item(), rel=1e-9)
    assert stats.bad_examples == 0
    rms = (model.embedding(IDS).square() * MASK.unsqueeze(-1)).sum((1, 2)).div(MASK.sum(1) * 4).sqrt()
    used = passes[2][0].abs().amax((1, 2)) / (0.15 * rms)
    assert stats.radius_used == pytest.approx(used.mean().item(), rel=1e-9)
    assert [type(value) for value in dict(stats).values()] == [float, float, float, float, int, float]
    names = ["penalty", "start_divergence", "ascent_gain", "max_perturbation", "bad_examples", "radius_used"]
    assert list(dict(stats)) == names
    assert stats["penalty"] == stats.penalty
    with pytest.raises(KeyError, match="loss"):
        stats["loss"]
    smart(lambda m: m(IDS, MASK), mask=MASK)
    assert smart.stats is not stats
    assert smart.stats.penalty != stats.penalty


def test_without_an_ascent_the_start_is_the_end() -> None:
    smart = SmartLoss(build(), steps=0)
    penalty = smart(lambda m: m(IDS), noise=noise).penalty
    assert smart.stats.start_divergence == smart.stats.penalty == penalty.item()
    assert smart.stats.ascent_gain == 1.0
    smart = SmartLoss(build(), epsilon=0.0)
    smart(lambda m: m(IDS))
    assert (smart.stats.penalty, smart.stats.start_divergence, smart.stats.max_perturbation) == (0.0, 0.0, 0.0)
    assert smart.stats.ascent_gain != smart.stats.ascent_gain  # 0 / 0: not a number


@pytest.mark.parametrize("examples", [1, 3])
def test_a_start_on_the_sphere_uses_the_whole_radius(examples: int) -> None:
    ids, mask = batch(examples=examples)
    smart = SmartLoss(build(), start="gradient", steps=0)
    smart(lambda m: m(ids), mask=mask)
    assert smart.stats.radius_used == pytest.approx(1.0)


def test_without_a_radius_nobody_misses_a_gradient() -> None:
    """No warning: nothing was to be perturbed, whatever the mask says."""
    smart = SmartLoss(build(), epsilon=0.0)
    assert smart(lambda m: m(IDS), mask=torch.zeros_like(IDS)).penalty == 0


@pytest.mark.parametrize("order", [1, -1])
def test_largest_perturbation_is_that_of_any_look_up(order: int) -> None:
    smart = SmartLoss(build(sentences=2), steps=0, epsilon=9.0)
    small, large = (torch.full((4, 5, FEATURES), size, dtype=torch.float64) for size in (0.01, 0.02))
    smart(lambda m: m.compare(IDS, None, IDS, None), noise=[-large, small][::order])
    assert smart.stats.max_perturbation == pytest.approx(0.02, rel=1e-12)


@both_modes
def test_stats_hold_no_graph(memory_efficient: bool) -> None:
    smart = SmartLoss(build(), memory_efficient=memory_efficient)
    smart(lambda m: m(IDS))
    held = [value for value in vars(smart.stats).values() if isinstance(value, Tensor)]
    assert len(held) == 5
    assert not any(value.requires_grad for value in held)


@both_modes
@pytest.mark.parametrize("options", [{}, {"norm": "2", "norm_over": "token", "steps": 2}, {"ascent": "normalized"}])
def test_nothing_is_read_from_the_device_before_the_stats_are(
    options: dict[str, Any], memory_efficient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_masks, looks):  # as on an accelerator
        monkeypatch.setattr(module, "reading_waits", lambda tensor: True)
    model = build()
    smart = SmartLoss(model, memory_efficient=memory_efficient, **options)
    for _ in range(3):  # what is looked at in the first calls has been looked at
        smart(lambda m: m(IDS, MASK), mask=MASK)

    def refuse(*_: Any) -> Any:
        raise AssertionError("synchronised")

    for name in ("item", "tolist", "numpy", "nonzero", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)
    _, penalty = smart(lambda m: m(IDS, MASK), mask=MASK)
    penalty.backward()
    with pytest.raises(AssertionError, match="synchronised"):
        _ = smart.stats.penalty
    monkeypatch.undo()
    assert smart.stats.penalty > 0


def spoiled(poison: float, rows: list[bool], lookup: int = 0, lookups: int = 1) -> Callable[[Any, Any, Tensor], None]:
    """A hook that spoils the ascent gradient of some examples in one look-up, as an overflow would."""
    calls: list[None] = []

    def hook(module: Any, args: Any, embedded: Tensor) -> None:
        if embedded.requires_grad and not module.weight.requires_grad:  # in the ascent
            if len(calls) % lookups == lookup:
                embedded.register_hook(lambda g: torch.where(torch.tensor(rows).view(-1, 1, 1), poison, g))
            calls.append(None)

    return hook


def with_gradients_of_one_example_spoiled(poison: float, *, spoil: bool = True, **options: Any) -> Any:
    model = build(scale=2.0)
    smart = SmartLoss(model, **options)
    if spoil:
        model.embedding.register_forward_hook(spoiled(poison, [False, True, False, False]))
    outputs, penalty = smart(lambda m: m(IDS, MASK), mask=MASK, noise=noise)
    (outputs.square().mean() + penalty).backward()
    return model, smart.stats


@both_modes
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("ascent", ["projected", "normalized"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_an_unusable_gradient_in_one_example(poison: float, ascent: str, norm: str, memory_efficient: bool) -> None:
    options = {"steps": 2, "ascent": ascent, "norm": norm, "memory_efficient": memory_efficient}
    model, stats = with_gradients_of_one_example_spoiled(poison, **options)
    healthy, healthy_stats = with_gradients_of_one_example_spoiled(poison, spoil=False, **options)
    assert (stats.bad_examples, healthy_stats.bad_examples) == (1, 0)
    (start,), _, (end,) = perturbations(model)[:3]
    torch.testing.assert_close(end[1], start[1], rtol=0, atol=1e-15)  # it keeps its noise
    others = torch.tensor([0, 2, 3])
    assert torch.equal(end[others], perturbations(healthy)[2][0][others])
    assert not torch.equal(end[1], perturbations(healthy)[2][0][1])
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_noise_that_is_kept_is_projected_all_the_same() -> None:
    model = build()
    smart = algorithm_1(model, epsilon=0.5, epsilon_scale="absolute")
    model.embedding.register_forward_hook(spoiled(float("nan"), [False, True, False, False]))
    smart(lambda m: m(IDS), noise=lambda x: torch.full_like(x, 0.7))
    assert perturbations(model)[1][0][1].abs().max().item() == pytest.approx(0.5, rel=1e-12)


def test_an_example_that_was_bad_in_one_step_is_counted() -> None:
    model, calls = build(), []

    def hook(module: Any, args: Any, embedded: Tensor) -> None:
        if embedded.requires_grad and not module.weight.requires_grad:
            calls.append(None)
            if len(calls) == 1:
                embedded.register_hook(lambda g: torch.where(torch.arange(4).view(-1, 1, 1) == 2, torch.nan, g))

    smart = SmartLoss(model, steps=3)
    model.embedding.register_forward_hook(hook)
    smart(lambda m: m(IDS), noise=noise)
    assert len(calls) == 3
    assert smart.stats.bad_examples == 1
    start, first, second, _ = perturbations(model)
    torch.testing.assert_close(first[0][2], start[0][2], rtol=0, atol=1e-15)
    assert (second[0][2] - first[0][2]).abs().max() > 1e-3  # and goes on with the next step


@pytest.mark.parametrize("lookup", [0, 1])
def test_an_example_is_counted_once(lookup: int) -> None:
    """However many steps were without a usable gradient; one bad look-up is enough."""
    model = build(sentences=2)
    smart = SmartLoss(model, steps=3)
    hook = spoiled(float("nan"), [True, False, False, True], lookup, lookups=2)
    model.embedding.register_forward_hook(hook)
    smart(lambda m: m.compare(IDS, None, IDS, None), noise=noise)
    assert smart.stats.bad_examples == 2
    start, *_, end = perturbations(model, lookups=2)
    torch.testing.assert_close(end[lookup][[0, 3]], start[lookup][[0, 3]], rtol=0, atol=1e-15)
    assert (end[1 - lookup] - start[1 - lookup]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_an_example_bad_in_both_look_ups_is_one_example() -> None:
    model = build(sentences=2)
    smart = algorithm_1(model)
    for lookup, rows in enumerate([[True, False, False, True], [False, False, False, True]]):
        model.embedding.register_forward_hook(spoiled(float("nan"), rows, lookup, lookups=2))
    smart(lambda m: m.compare(IDS, None, IDS, None))
    assert smart.stats.bad_examples == 2


def test_look_ups_of_different_batch_sizes_are_counted_apart() -> None:
    model = build()
    smart = SmartLoss(model)

    def forward(m: Sentence) -> Tensor:
        return m(IDS) * torch.tensor([0.0, 1.0, 1.0, 1.0]).unsqueeze(-1) + m(IDS[:1])

    smart(forward)
    assert smart.stats.bad_examples == 1  # one of the first four, none of the other one
