"""`smoothness_penalty`: `SmartLoss` for those who hold the embeddings, pixels or audio in their hands."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from smart_models import ALGORITHM_1, FEATURES, Sentence, algorithm_1, batch, build
from torch import Tensor, nn

import smartreg
from smartreg import SmartOutput, SmartWarning, mse, symmetric_kl

smoothness_penalty = partial(smartreg.smoothness_penalty, **ALGORITHM_1)  # unless a test says otherwise
IDS, MASK = batch(examples=3, tokens=4)


def noise(embeddings: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return 0.05 * torch.randn(embeddings.shape, generator=generator, dtype=torch.float64)


class After:
    """The part of a model that follows its embedding; counts its calls and keeps what came in."""

    def __init__(self, model: Sentence) -> None:
        self.model, self.seen = model, []

    def __call__(self, embeds: Tensor) -> Tensor:
        self.seen.append(embeds.detach().clone())
        real = MASK.unsqueeze(-1)
        hidden = torch.tanh(self.model.hidden(self.model.dropout(embeds)))
        return self.model.head((hidden * real).sum(dim=1) / real.sum(dim=1))


def fresh(**options: Any) -> tuple[Sentence, After]:
    model = build(scale=2.0, **options)
    return model, After(model)


@pytest.mark.parametrize("norm_over", ["example", "token"])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("detach_reference", [False, True])
def test_against_the_restatement_of_algorithm_1(steps: int, norm: str, norm_over: str, detach_reference: bool) -> None:
    model, fn = fresh()
    ball = {"epsilon": 0.1, "step_size": 0.06, "norm": norm, "norm_over": norm_over, "steps": steps}
    embeds = model.embedding(IDS)
    outputs, penalty = smoothness_penalty(
        fn, embeds, mask=MASK, noise=noise(embeds), detach_reference=detach_reference, **ball
    )
    penalty.backward()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    visited, value, gradients, _ = reference.smart(
        weights, [IDS.numpy()], [MASK.numpy()], [noise(embeds).numpy()], detach_reference=detach_reference, **ball
    )
    assert torch.equal(outputs, fn(embeds))
    assert penalty.item() == pytest.approx(value, rel=1e-9)
    expected = [x + fn.seen[0].numpy() for (x,) in (visited if steps else visited[1:])]
    for seen, theirs in zip(fn.seen[1:-1], expected, strict=True):
        np.testing.assert_allclose(seen.numpy(), theirs, rtol=0, atol=1e-9)
    for name, parameter in model.named_parameters():
        scale = np.abs(gradients[name]).max()
        np.testing.assert_allclose(parameter.grad.numpy(), gradients[name], rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 2, "norm": 2, "norm_over": "token"},
        {"ascent": "normalized", "epsilon": 1e-3, "epsilon_scale": "absolute"},
        {"divergence": mse, "steps": 0},
        {"divergence": lambda a, b: (a - b).abs().sum()},
        {"epsilon": 0.0},
        {"output_to_logits": lambda out: (out, 2 * out)},
    ],
)
def test_equals_smart_loss(options: dict[str, Any]) -> None:
    found = []
    for functional in (False, True):
        model, fn = fresh(dropout=0.3)
        torch.manual_seed(9)
        if functional:
            embeds = model.embedding(IDS)
            result = smoothness_penalty(fn, embeds, mask=MASK, noise=noise, **options)
        else:
            result = algorithm_1(model, **options)(lambda m, fn=fn: fn(m.embedding(IDS)), mask=MASK, noise=noise)
        assert isinstance(result, SmartOutput)
        (result.outputs.square().sum() + result.penalty).backward()
        found.append((result.penalty.item(), torch.get_rng_state(), [p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert (found[0][0] > 0) == (options.get("epsilon") != 0.0)
    assert torch.equal(found[0][1], found[1][1])
    for a, b in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_random_start_and_generator() -> None:
    values = []
    for seed in (1, 1, 2):
        model, fn = fresh()
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        values.append(smoothness_penalty(fn, model.embedding(IDS), generator=generator).penalty.item())
        assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1] != values[2]


def test_gradient_reaches_the_embeddings_through_both_passes() -> None:
    model, fn = fresh()
    embeds = model.embedding(IDS).detach().requires_grad_()
    start = noise(embeds)
    smoothness_penalty(fn, embeds, noise=start, steps=0, epsilon=9.0).penalty.backward()
    expected = torch.autograd.grad(symmetric_kl(fn(embeds + start), fn(embeds)), embeds)[0]
    torch.testing.assert_close(embeds.grad, expected, rtol=1e-12, atol=1e-15)
    embeds.grad = None
    smoothness_penalty(fn, embeds, noise=start, steps=0, epsilon=9.0, detach_reference=True).penalty.backward()
    expected = torch.autograd.grad(symmetric_kl(fn(embeds + start), fn(embeds).detach()), embeds)[0]
    torch.testing.assert_close(embeds.grad, expected, rtol=1e-12, atol=1e-15)


def test_number_of_passes_and_gradients_left_alone() -> None:
    for steps, given in ((0, False), (2, False), (2, True)):
        model, fn = fresh()
        model.head.weight.grad = torch.ones_like(model.head.weight)
        embeds = model.embedding(IDS)
        options: dict[str, Any] = {"reference": After(model)(embeds), "dropout": "independent"} if given else {}
        smoothness_penalty(fn, embeds, steps=steps, **options)
        assert len(fn.seen) == steps + (1 if given else 2)
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert model.hidden.weight.grad is None
        assert all(p.requires_grad for p in model.parameters())


def test_a_given_reference_is_used_and_handed_back() -> None:
    model, fn = fresh()
    embeds = model.embedding(IDS)
    given = SimpleNamespace(logits=fn(embeds))
    without = smoothness_penalty(fn, embeds, noise=noise).penalty
    outputs, penalty = smoothness_penalty(fn, embeds, reference=given, noise=noise, dropout="independent")
    assert outputs is given
    assert penalty.item() == without.item()
    gradients = [torch.autograd.grad(value, model.head.weight, retain_graph=True)[0] for value in (penalty, without)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_a_given_reference_needs_independent_dropout() -> None:
    model, fn = fresh()
    embeds = model.embedding(IDS)
    with pytest.raises(ValueError, match=r'made under other dropout masks.*pass dropout="independent"'):
        smoothness_penalty(fn, embeds, reference=fn(embeds))


def test_pixels() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 3, 4)).double()
    images = torch.rand(6, 2, 5, 3, dtype=torch.float64)
    seen: list[Tensor] = []
    options = {"epsilon": 0.03, "step_size": 0.02, "noise_std": 0.01, "steps": 2, "epsilon_scale": "absolute"}
    outputs, penalty = smoothness_penalty(lambda x: (seen.append(x.detach()), network(x))[1], images, **options)
    assert outputs.shape == (6, 4)
    assert penalty.item() > 0
    assert all((x - images).abs().max() <= 0.03 + 1e-15 for x in seen[2:])
    mask = torch.zeros(6, 2, 5)
    mask[:, :, 1] = 1
    seen.clear()
    smoothness_penalty(lambda x: (seen.append(x.detach()), network(x))[1], images, mask=mask, **options)
    assert torch.equal((seen[-1] != images).any(dim=-1), mask.bool())


def test_layout_in_memory_does_not_matter() -> None:
    model, fn = fresh()
    embeds = model.embedding(IDS).detach()
    expected = smoothness_penalty(fn, embeds, noise=noise).penalty.item()
    turned = embeds.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    assert smoothness_penalty(fn, turned, noise=noise).penalty.item() == pytest.approx(expected, rel=1e-9)
    row = smoothness_penalty(lambda x: x.sum(dim=1), embeds[:1].expand(3, 4, FEATURES), noise=noise)
    same = smoothness_penalty(lambda x: x.sum(dim=1), embeds[:1].repeat(3, 1, 1), noise=noise)
    assert row.penalty.item() == same.penalty.item()


def test_without_gradients() -> None:
    model, fn = fresh()
    embeds = model.embedding(IDS).detach()
    expected = smoothness_penalty(fn, embeds, noise=noise).penalty
    with torch.no_grad():
        penalty = smoothness_penalty(fn, embeds, noise=noise).penalty
    assert expected.requires_grad
    assert not penalty.requires_grad
    assert penalty.item() == expected.item()
    with torch.inference_mode():
        assert smoothness_penalty(fn, embeds, noise=noise, steps=0).penalty.item() > 0
        with pytest.raises(RuntimeError, match=r"inference_mode forbids: use torch\.no_grad, or steps=0"):
            smoothness_penalty(fn, embeds)


def test_random_state_when_fn_raises() -> None:
    calls: list[None] = []

    def fn(x: Tensor) -> Tensor:
        calls.append(None)
        dropped = nn.functional.dropout(x, 0.5)
        if len(calls) == 3:
            raise KeyError("on purpose")
        return dropped.sum(dim=1)

    torch.manual_seed(5)
    nn.functional.dropout(torch.ones(3, 4, FEATURES), 0.5)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    with pytest.raises(KeyError, match="on purpose"):
        smoothness_penalty(fn, torch.ones(3, 4, FEATURES), noise=noise)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize(
    ("embeds", "error", "message"),
    [
        ([[1.0]], TypeError, r"embeds must be a floating-point tensor, got list"),
        (IDS, TypeError, r"embeds must be a floating-point tensor, got torch\.int64"),
        (torch.ones(3), ValueError, r"embeds must be \(batch, \.\.\., feature\), got shape \(3,\)"),
    ],
)
def test_embeds_that_cannot_be_perturbed(embeds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        smoothness_penalty(lambda x: x, embeds)


def test_other_errors() -> None:
    embeds = torch.ones(3, 4, FEATURES)
    with pytest.raises(ValueError, match=r"mask must have the shape.*\(3, 4\), got \(3, 5\)"):
        smoothness_penalty(lambda x: x.sum(dim=1), embeds, mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"noise must have the shape of the embeddings, \(3, 4, 4\), got \(3,\)"):
        smoothness_penalty(lambda x: x.sum(dim=1), embeds, noise=torch.ones(3))
    with pytest.raises(TypeError, match=r"forward must return a tensor.*got int; pass output_to_logits"):
        smoothness_penalty(lambda x: 3, embeds)
    with pytest.raises(RuntimeError, match="the output does not depend on the embeddings"):
        smoothness_penalty(lambda x: torch.ones(3, 2), embeds)
    with pytest.raises(TypeError, match="memory_efficient"):
        smoothness_penalty(lambda x: x.sum(dim=1), embeds, memory_efficient=True)


def test_steps_without_noise_have_nothing_to_follow() -> None:
    embeds = torch.ones(3, 4, FEATURES)
    with pytest.warns(SmartWarning, match="no gradient to follow"):
        smoothness_penalty(lambda x: x.sum(dim=1), embeds, noise_std=0.0)
    smoothness_penalty(lambda x: x.sum(dim=1), embeds, noise_std=0.0, steps=0)
    smoothness_penalty(lambda x: x.sum(dim=1), embeds, noise_std=0.0, noise=noise)


def test_the_ascent_can_run_without_the_autocast_of_its_surroundings() -> None:
    torch.manual_seed(0)
    weights, embeds, seen = torch.randn(4, 3), torch.randn(2, 5, 4), []

    def fn(x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.tanh(x).mean(1) @ weights

    # Sizes that bfloat16 carries beyond doubt, so that nothing is run to find out.
    options: dict[str, Any] = {
        "start": "noise",
        "steps": 1,
        "check_first_call": False,
        "noise_std": 5.0,
        "epsilon": 5.0,
    }
    with torch.autocast("cpu", torch.bfloat16):
        smoothness_penalty(fn, embeds, ascent_autocast=False, **options)
        without, seen[:] = list(seen), []
        smoothness_penalty(fn, embeds, **options)
    assert without == [True, False, False, True]  # clean, its like without autocast, ascent, perturbed
    assert seen == [True, True, True]


class Batch:
    """An object with a call, as `functools.partial` or a dataclass may stand in for a function; it has no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, embeds: Tensor) -> Tensor:
        return embeds.flatten(1) @ self.weight


def test_a_function_may_be_an_object() -> None:
    torch.manual_seed(0)
    embeds, weight = torch.randn(2, 3, 4), torch.randn(12, 2)
    _, penalty = smartreg.smoothness_penalty(Batch(weight), embeds)
    assert torch.equal(penalty, smartreg.smoothness_penalty(lambda x: x.flatten(1) @ weight, embeds).penalty)


def test_the_loss_scale_is_remembered_from_call_to_call() -> None:
    torch.manual_seed(0)
    weight, embeds = 20 * torch.randn(12, 2).half(), (0.05 * torch.randn(2, 3, 4)).half()

    def fn(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight

    found = [smartreg.smoothness_penalty(fn, embeds).penalty.item() for _ in range(8)]
    assert found[0] == 0.0  # 4096 times its gradients are beyond float16
    assert found[-1] > 0.0
