"""The start along the pullback of a cotangent through the clean pass: its draws, its ways, and what it leaves alone."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from smart_models import CLASSES, batch, build, counting, gradients, perturbations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smartreg import SmartLoss, smoothness_penalty
from smartreg._ascent.start import cotangents

IDS, MASK = batch(examples=3, tokens=4)
BALL: dict[str, Any] = {"epsilon": 0.2, "norm": "2", "steps": 0, "start": "gradient"}
both_modes = pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])


def drawn(seed: int = 5, *shape: int) -> Tensor:
    return torch.randn(*(shape or (3, CLASSES)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def start_by_hand(model: nn.Module, run: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """ε √N rms g / ‖g‖ for g = Jᵀu, by autograd on a function of the embeddings; no padding."""
    x = model.embedding(IDS).detach().requires_grad_()
    (g,) = torch.autograd.grad((run(x) * u).sum(), x)
    unit = x.detach().square().sum((1, 2), keepdim=True).sqrt()  # √N rms
    return 0.2 * unit * g / g.square().sum((1, 2), keepdim=True).sqrt()


def after_embedding(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model.head(torch.tanh(model.hidden(x)).mean(dim=1))


@pytest.mark.parametrize("kind", ["softmax", "bernoulli", "value", None])
def test_u_is_drawn_with_the_curvature_as_covariance(kind: Any) -> None:
    logits, draws = torch.tensor([1.5, -0.5, 0.2], dtype=torch.float64), 40_000
    (u,) = cotangents([logits.expand(draws, 3)], kind, "gradient", torch.Generator().manual_seed(0))
    expected = reference.curvature(logits.numpy(), kind or "value")
    # The standard error of a covariance of bounded fourth moments is about sqrt(2 / 40,000) = 0.007 of the variances.
    assert np.abs(np.cov(u.T.numpy(), bias=True) - expected).max() < 0.03 * np.abs(expected).max()
    assert np.abs(u.mean(0).numpy()).max() < 0.02


def test_towards_the_uniform_distribution_of_the_classes_that_there_are() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.0, 0.2]])
    (u,) = cotangents([p.log()], "softmax", "towards_uniform", None)
    assert torch.allclose(u, torch.tensor([[1 / 3 - 0.5, 1 / 3 - 0.3, 1 / 3 - 0.2], [-0.3, 0.0, 0.3]]), atol=1e-7)
    (u,) = cotangents([p[:1].logit()], "bernoulli", "towards_uniform", None)
    assert torch.allclose(u, torch.tensor([[0.0, 0.2, 0.3]]), atol=1e-7)


@pytest.mark.parametrize("kind", ["value", None])
def test_values_have_no_uniform_distribution_and_draw(kind: Any) -> None:
    uniform, random = (
        cotangents([torch.zeros(4, 2)], kind, start, torch.Generator().manual_seed(1))
        for start in ("towards_uniform", "gradient")
    )
    assert torch.equal(uniform[0], random[0])
    assert uniform[0].std() > 0.3


@both_modes
def test_the_start_lies_on_the_sphere_along_the_pullback(memory_efficient: bool) -> None:
    model, u = build(scale=2.0), drawn()
    smart = SmartLoss(model, memory_efficient=memory_efficient, **BALL)
    smart(lambda m: m(IDS), noise=u)
    delta = perturbations(model)[0][0]
    assert torch.allclose(delta, start_by_hand(model, after_embedding(model), u), rtol=1e-9, atol=0)
    assert smart.stats is not None
    assert smart.stats.radius_used == pytest.approx(1.0)


@both_modes
def test_several_tensors_are_pulled_back_together(memory_efficient: bool) -> None:
    model, u, v = build(scale=2.0), drawn(5), drawn(6)
    pair: Callable[[Any], list[Tensor]] = lambda out: [out, 3 * out.tanh()]  # noqa: E731  # short
    smart = SmartLoss(model, output_to_logits=pair, memory_efficient=memory_efficient, **BALL)
    smart(lambda m: m(IDS), noise=[u, v])
    run = after_embedding(model)
    both = lambda x: torch.cat([run(x), 3 * run(x).tanh()])  # noqa: E731  # short
    delta = perturbations(model)[0][0]
    assert torch.allclose(delta, start_by_hand(model, both, torch.cat([u, v])), rtol=1e-9, atol=0)


@both_modes
@pytest.mark.parametrize("start", ["gradient", "towards_uniform"])
def test_a_call_repeats_with_its_generator_and_leaves_the_global_one_alone(start: str, memory_efficient: bool) -> None:
    model = build(dropout=0.2)

    def penalty(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        options = BALL | {"start": start, "memory_efficient": memory_efficient, "generator": generator}
        torch.manual_seed(0)
        value = SmartLoss(model, divergence="mse", **options)(lambda m: m(IDS)).penalty.item()
        after = torch.get_rng_state()
        torch.manual_seed(0)
        model(IDS)
        assert torch.equal(after, torch.get_rng_state())
        return value

    assert penalty(1) == penalty(1) != penalty(2)


@both_modes
def test_given_noise_is_the_start_itself_unless_the_start_is_the_gradient(memory_efficient: bool) -> None:
    model = build()
    nu = drawn(7, *IDS.shape, 4) * 1e-3
    SmartLoss(model, memory_efficient=memory_efficient, **BALL | {"start": "towards_uniform"})(
        lambda m: m(IDS), noise=nu
    )
    assert torch.allclose(perturbations(model)[0][0], nu, atol=1e-15)


def frozen_embedding(model: nn.Module) -> nn.Module:
    model.embedding.requires_grad_(False)
    return model


def watched(model: nn.Module) -> nn.Module:
    model.hidden.register_full_backward_hook(lambda *_: None)
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]  # a module, but not by its type


@both_modes
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("change", [frozen_embedding, watched, compiled])
def test_where_the_clean_graph_is_left_alone_a_pass_of_its_own_gives_the_same(
    change: Callable[[nn.Module], nn.Module], steps: int, memory_efficient: bool
) -> None:
    options = BALL | {"steps": steps, "memory_efficient": memory_efficient}
    plain, other = build(scale=2.0, dropout=0.1), build(scale=2.0, dropout=0.1)
    changed = change(other)
    results = []
    for inner, model in ((plain, plain), (other, changed)):
        torch.manual_seed(3)
        smart = SmartLoss(model, **options)
        with counting(inner.hidden) as count:
            _, penalty = smart(lambda m: m(IDS), noise=drawn())
        penalty.backward()
        results.append((penalty.item(), inner.head.weight.grad, count()))
        smart.remove()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-9, atol=1e-14)
    passes = 2 + steps + memory_efficient
    assert results[0][2] == passes
    if change is not compiled:  # hooks on parts of a compiled model do not count
        assert results[1][2] == passes + 1
    torch._dynamo.reset()


def test_under_no_grad_the_penalty_is_the_same_without_a_graph() -> None:
    model = build(scale=2.0)
    smart = SmartLoss(model, **BALL)
    attached = smart(lambda m: m(IDS), noise=drawn()).penalty
    with torch.no_grad():
        detached = smart(lambda m: m(IDS), noise=drawn()).penalty
    assert detached.item() == pytest.approx(attached.item(), rel=1e-12)
    assert not detached.requires_grad


def test_inference_mode_is_refused_with_the_remedy() -> None:
    smart = SmartLoss(build(), **BALL)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r'use torch\.no_grad, or steps=0 with start="noise"'),
    ):
        smart(lambda m: m(IDS))


@both_modes
def test_nothing_but_the_graph_has_changed(memory_efficient: bool) -> None:
    model = build(scale=2.0)
    called: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.register_hook(lambda grad, name=name: called.append(name))
        parameter.register_post_accumulate_grad_hook(lambda p: called.append("accumulated"))
    before = gradients(model)
    outputs, penalty = SmartLoss(model, memory_efficient=memory_efficient, **BALL)(lambda m: m(IDS), noise=drawn())
    assert called == []
    assert all(torch.equal(before[name], after) for name, after in gradients(model).items())
    (outputs.sum() + penalty).backward()
    assert sorted(called) == sorted([*(name for name, _ in model.named_parameters()), *["accumulated"] * 5])


@both_modes
def test_a_checkpointed_layer_is_recomputed_for_the_start_too(memory_efficient: bool) -> None:
    def run(model: nn.Module, keep: bool) -> Tensor:
        x = model.embedding(IDS)
        hidden = lambda x: torch.tanh(model.hidden(model.dropout(x))).mean(dim=1)  # noqa: E731  # short
        return model.head(hidden(x) if keep else checkpoint(hidden, x, use_reentrant=False))

    found = []
    for keep in (True, False):
        model = build(scale=2.0, dropout=0.2)
        torch.manual_seed(4)
        smart = SmartLoss(model, memory_efficient=memory_efficient, **BALL)
        outputs, penalty = smart(lambda m, keep=keep: run(m, keep), noise=drawn())
        (outputs.sum() + penalty).backward()
        found.append((penalty.item(), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-9, atol=1e-14)


@both_modes
def test_a_checkpointed_layer_that_counts_is_counted_once(memory_efficient: bool) -> None:
    """The start's backward runs it once more, ahead of the user's, and what it writes then is taken back."""
    model = build()
    model.norm = nn.BatchNorm1d(model.hidden.out_features, dtype=torch.float64)
    model.seen = [(torch.zeros(()),)]
    plain = copy.deepcopy(model)

    def block(m: nn.Module, x: Tensor) -> Tensor:
        m.seen[0][0].add_(1)
        return m.norm(torch.tanh(m.hidden(x)).mean(dim=1))

    def run(m: nn.Module) -> Tensor:
        return m.head(checkpoint(partial(block, m), m.embedding(IDS), use_reentrant=False))

    SmartLoss(model, memory_efficient=memory_efficient, **BALL)(run, noise=drawn())
    run(plain)
    assert (int(model.norm.num_batches_tracked), float(model.seen[0][0])) == (1, 1.0)
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)


@both_modes
def test_a_checkpointed_layer_may_read_what_the_pass_has_written(memory_efficient: bool) -> None:
    """Run again it has to save as many tensors as before, so that what it reads must need a gradient as before."""
    model = build()
    model.memory = torch.zeros(len(IDS), 1, dtype=torch.float64)

    def run(m: nn.Module) -> Tensor:
        hidden = torch.tanh(m.hidden(m.embedding(IDS))).mean(dim=1)
        m.memory.detach_().copy_(hidden.mean(dim=1, keepdim=True).sigmoid())
        return m.head(checkpoint(lambda x: torch.tanh(x * m.memory), hidden, use_reentrant=False))

    assert SmartLoss(model, memory_efficient=memory_efficient, **BALL)(run, noise=drawn()).penalty > 0
    assert model.memory.requires_grad


@pytest.mark.parametrize("where", ["buffer", "attribute", "list"])
@both_modes
def test_a_checkpointed_layer_runs_again_on_what_the_pass_has_left(memory_efficient: bool, where: str) -> None:
    """Of the state before the pass its gradient, and so the start, would be another."""
    found = []
    for keep in (True, False):
        model = build()
        width = model.hidden.out_features
        model.register_buffer("scale", torch.ones(width, dtype=torch.float64))
        model.factor, model.held = torch.ones(width, dtype=torch.float64), [torch.ones(width, dtype=torch.float64)]

        def run(m: nn.Module, keep: bool = keep, width: int = width) -> Tensor:
            scale = torch.linspace(-1.0, 3.0, width, dtype=torch.float64)
            if where == "buffer":
                m.scale.copy_(scale)
            elif where == "attribute":
                m.factor = scale
            else:
                m.held[0] = scale
            block = lambda x: torch.tanh(m.hidden(x)).mean(dim=1) * m.scale * m.factor * m.held[0]  # noqa: E731  # short
            x = m.embedding(IDS)
            return m.head(block(x) if keep else checkpoint(block, x, use_reentrant=False))

        found.append(SmartLoss(model, memory_efficient=memory_efficient, **BALL)(run, noise=drawn()).penalty.item())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0] > 0


@both_modes
def test_an_example_without_a_usable_gradient_starts_at_the_clean_point_and_is_counted(memory_efficient: bool) -> None:
    model = build(scale=2.0)
    u = drawn()
    u[0], u[1] = torch.nan, 0.0
    smart = SmartLoss(model, memory_efficient=memory_efficient, **BALL)
    outputs, penalty = smart(lambda m: m(IDS), noise=u)
    delta = perturbations(model)[0][0]
    assert delta[:2].abs().max() == 0
    assert delta[2].abs().max() > 0
    assert smart.stats is not None
    assert (smart.stats.bad_examples, smart.stats.radius_used) == (2, pytest.approx(1 / 3))
    (outputs.sum() + penalty).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@both_modes
def test_padding_is_not_perturbed_and_does_not_count(memory_efficient: bool) -> None:
    model = build(scale=2.0)
    smart = SmartLoss(model, memory_efficient=memory_efficient, **BALL)
    smart(lambda m: m(IDS), mask=MASK, noise=drawn())  # the model itself does not know the mask
    delta = perturbations(model)[0][0]
    assert delta[MASK == 0].abs().max() == 0
    x = model.embedding(IDS).detach() * MASK.unsqueeze(-1)
    used = delta.square().sum((1, 2)).sqrt() / (0.2 * x.square().sum((1, 2)).sqrt())
    assert torch.allclose(used, torch.ones_like(used))


@both_modes
def test_float16_is_differentiated_under_a_scale_that_an_overflow_lowers(memory_efficient: bool) -> None:
    model = build(dtype=torch.float32)
    smart = SmartLoss(model, memory_efficient=memory_efficient, **BALL | {"epsilon": 0.5})
    with torch.autocast("cpu", torch.float16):
        smart(lambda m: m(IDS), noise=torch.full((3, CLASSES), 30.0))  # times 4,096 beyond the largest float16
        assert smart.stats is not None
        assert smart.stats.bad_examples == 3
        for _ in range(4):
            smart(lambda m: m(IDS), noise=torch.full((3, CLASSES), 30.0))
    assert smart.stats.bad_examples == 0
    assert smart.stats.radius_used == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("start", ["gradient", "towards_uniform"])
def test_the_function_is_the_class(start: str) -> None:
    model = build(scale=2.0)
    options = BALL | {"start": start, "steps": 1, "ascent": "steepest", "norm": "inf"}
    noise = drawn() if start == "gradient" else None
    ours = SmartLoss(model, **options)(lambda m: m(IDS), noise=noise).penalty
    other = smoothness_penalty(after_embedding(model), model.embedding(IDS), noise=noise, **options).penalty
    assert other.item() == pytest.approx(ours.item(), rel=1e-12)


def test_wrong_cotangents() -> None:
    smart = SmartLoss(build(), **BALL)
    with pytest.raises(ValueError, match=r'noise must have the shape of the outputs \(start="gradient"\), \(3, 3\)'):
        smart(lambda m: m(IDS), noise=drawn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="noise must be one tensor for each tensor to compare, in order: expected 1"):
        smart(lambda m: m(IDS), noise=[drawn(), drawn()])
    with pytest.raises(TypeError, match="noise must be a tensor for each tensor to compare, got float"):
        smart(lambda m: m(IDS), noise=[0.1])


@pytest.mark.parametrize("start", ["gradient", "towards_uniform"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_ball_of_radius_zero_has_no_start_to_draw(start: Any, steps: int) -> None:
    """Whether steps follow or not; u is for the outputs there too."""
    model = build()
    smart = SmartLoss(model, epsilon=0.0, steps=steps, start=start, divergence="mse", check_first_call=False)
    before = torch.get_rng_state()
    assert smart(lambda m: m(IDS)).penalty.item() == 0.0
    assert torch.equal(torch.get_rng_state(), before)
    if start == "gradient":
        assert smart(lambda m: m(IDS), noise=drawn()).penalty.item() == 0.0
