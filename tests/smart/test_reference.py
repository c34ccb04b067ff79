"""`SmartLoss` against the slow restatement of Algorithm 1: trajectory, penalty and parameter gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from smart_models import CLASSES, FEATURES, Sentence, algorithm_1, batch, build, gradients, perturbations
from torch import Tensor

from smartreg import SmartLoss

TOLERANCE = 1e-9
Case = tuple[Sentence, Callable[[Any], Tensor], list[Tensor], list[Tensor], list[Tensor]]


def case(lookups: int, seed: int = 0) -> Case:
    """A model, its forward, and for each look-up ids, mask (with padding) and noise."""
    model = build(seed, sentences=lookups, scale=2.0)
    sentences = [batch(seed + k, examples=3, tokens=4 + k) for k in range(lookups)]
    ids, masks = [s[0] for s in sentences], [s[1] for s in sentences]
    noise = [torch.randn(*i.shape, FEATURES, dtype=torch.float64) * 0.05 for i in ids]
    if lookups == 1:
        return model, lambda m: m(ids[0], masks[0]), ids, masks, noise
    return model, lambda m: m.compare(ids[0], masks[0], ids[1], masks[1]), ids, masks, noise


def expected(model: Sentence, ids: list[Tensor], masks: list[Tensor], noise: list[Tensor], **settings: Any) -> Any:
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    arrays = [[one.numpy() for one in group] for group in (ids, masks, noise)]
    return reference.smart(weights, *arrays, **settings)


def distance(ours: Tensor | None, theirs: np.ndarray) -> float:
    assert ours is not None
    assert ours.shape == theirs.shape
    return float(np.abs(ours.numpy() - theirs).max())


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
@pytest.mark.parametrize("lookups", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("norm_over", ["example", "token"])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("epsilon_scale", ["rms", "absolute"])
def test_algorithm_1(
    norm: str, norm_over: str, epsilon_scale: str, steps: int, lookups: int, memory_efficient: bool
) -> None:
    model, forward, ids, masks, noise = case(lookups)
    settings = {"epsilon": 0.1, "step_size": 0.06, "steps": steps, "norm": norm}
    settings |= {"norm_over": norm_over, "epsilon_scale": epsilon_scale}
    smart = SmartLoss(model, memory_efficient=memory_efficient, **settings)
    _, penalty = smart(forward, mask=masks if lookups > 1 else masks[0], noise=noise if lookups > 1 else noise[0])
    visited, value, parameter_gradients, start = expected(model, ids, masks, noise, **settings)

    passes = perturbations(model, lookups)  # ascent passes, the perturbed one, and with memory_efficient a clean one
    last = [[np.zeros(d.shape) for d in visited[0]]] if memory_efficient else []
    visited = (visited if steps else visited[1:]) + last
    assert len(passes) == len(visited)
    for ours, theirs in zip(passes, visited, strict=True):
        assert max(distance(o, t) for o, t in zip(ours, theirs, strict=True)) <= TOLERANCE
    assert abs(penalty.item() - value) <= TOLERANCE * value
    assert value > 1e-5  # so that a relative error of 1e-9 can be seen
    assert smart.stats is not None
    assert smart.stats.start_divergence == pytest.approx(start if steps else value, rel=TOLERANCE)

    penalty.backward()
    for name, gradient in gradients(model).items():
        assert distance(gradient, parameter_gradients[name]) <= TOLERANCE * np.abs(parameter_gradients[name]).max()


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_detached_reference(memory_efficient: bool) -> None:
    model, forward, ids, masks, noise = case(2)
    ball = {"epsilon": 0.1, "step_size": 0.06, "norm": "inf", "norm_over": "example"}
    _, penalty = algorithm_1(model, detach_reference=True, memory_efficient=memory_efficient, **ball)(
        forward, mask=masks, noise=noise
    )
    penalty.backward()
    _, value, detached, _ = expected(model, ids, masks, noise, steps=1, detach_reference=True, **ball)
    _, same, through_both, _ = expected(model, ids, masks, noise, steps=1, **ball)
    assert value == same
    assert penalty.item() == pytest.approx(value, rel=TOLERANCE)
    for name, gradient in gradients(model).items():
        assert distance(gradient, detached[name]) <= TOLERANCE * np.abs(detached[name]).max()
        assert distance(gradient, through_both[name]) > 1e-3 * np.abs(detached[name]).max()


@pytest.mark.parametrize("norm_over", ["example", "token"])
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_normalized_ascent(norm: str, norm_over: str) -> None:
    model, forward, ids, masks, noise = case(1)
    settings = {"epsilon": 1e-3, "step_size": 5.0, "steps": 2, "norm": norm, "norm_over": norm_over}
    settings |= {"epsilon_scale": "absolute", "ascent": "normalized"}
    _, penalty = SmartLoss(model, **settings)(forward, mask=masks[0], noise=noise[0])
    visited, value, _, _ = expected(model, ids, masks, noise, **settings)
    for ours, theirs in zip(perturbations(model), visited, strict=True):
        assert distance(ours[0], theirs[0]) <= TOLERANCE
    assert penalty.item() == pytest.approx(value, rel=TOLERANCE)
    assert np.abs(visited[-1][0]).max() > 0.3  # no projection: far outside of epsilon


@pytest.mark.parametrize("lookups", [1, 2])
@pytest.mark.parametrize("detach_reference", [False, True])
def test_reference_against_finite_differences(lookups: int, detach_reference: bool) -> None:
    """The restatement differentiates by hand; here it is checked by moving its weights, the perturbation held."""
    model, _, ids, masks, noise = case(lookups)
    ball = {"epsilon": 0.1, "step_size": 0.06, "norm": "2", "norm_over": "token"}
    visited, _, analytic, _ = expected(model, ids, masks, noise, steps=1, detach_reference=detach_reference, **ball)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}

    def penalty(moved: dict[str, np.ndarray]) -> float:
        total = 0.0
        for i in range(len(ids[0])):
            sentences = [moved["embedding.weight"][one[i].numpy()] for one in ids]
            real = [one[i].numpy().astype(bool) for one in masks]
            shifted = [x + delta[i] for x, delta in zip(sentences, visited[-1], strict=True)]
            clean = [weights["embedding.weight"][one[i].numpy()] for one in ids] if detach_reference else sentences
            total += reference.symmetric_kl_of_position(
                reference.model_of_example(moved, shifted, real)[0],
                reference.model_of_example(weights if detach_reference else moved, clean, real)[0],
            )
        return total / len(ids[0])

    h = 1e-6
    for name in weights:
        for index in list(np.ndindex(*weights[name].shape))[:7]:
            values = []
            for sign in (1, -1):
                moved = {key: value.copy() for key, value in weights.items()}
                moved[name][index] += sign * h
                values.append(penalty(moved))
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(analytic[name][index], abs=1e-8)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
@pytest.mark.parametrize("lookups", [1, 2])
@pytest.mark.parametrize("start", ["noise", "gradient"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("norm_over", ["example", "token"])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("epsilon_scale", ["rms", "absolute"])
def test_steepest_steps_and_the_start_along_the_gradient(
    norm: str, norm_over: str, epsilon_scale: str, steps: int, start: str, lookups: int, memory_efficient: bool
) -> None:
    model, forward, ids, masks, noise = case(lookups)
    if start == "gradient":
        noise = [torch.randn(len(ids[0]), CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(3))]
    settings = {"epsilon": 0.1, "step_size": 0.06, "steps": steps, "norm": norm, "ascent": "steepest", "start": start}
    settings |= {"norm_over": norm_over, "epsilon_scale": epsilon_scale}
    smart = SmartLoss(model, memory_efficient=memory_efficient, **settings)
    _, penalty = smart(forward, mask=masks if lookups > 1 else masks[0], noise=noise)
    visited, value, parameter_gradients, start_divergence = expected(model, ids, masks, noise, **settings)

    passes = perturbations(model, lookups)
    last = [[np.zeros(d.shape) for d in visited[0]]] if memory_efficient else []
    visited = (visited if steps else visited[1:]) + last
    assert len(passes) == len(visited)  # the start along the gradient has taken no pass
    for ours, theirs in zip(passes, visited, strict=True):
        assert max(distance(o, t) for o, t in zip(ours, theirs, strict=True)) <= TOLERANCE
    assert abs(penalty.item() - value) <= TOLERANCE * value
    assert value > 1e-5
    assert smart.stats is not None
    assert smart.stats.start_divergence == pytest.approx(start_divergence if steps else value, rel=TOLERANCE)
    assert smart.stats.bad_examples == 0
    if start == "gradient" and steps == 0:
        assert smart.stats.radius_used == pytest.approx(1.0, rel=TOLERANCE)

    penalty.backward()
    for name, gradient in gradients(model).items():
        assert distance(gradient, parameter_gradients[name]) <= TOLERANCE * np.abs(parameter_gradients[name]).max()
