"""Invariants that hold for every shape, mask and setting."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smart_models import FEATURES, VOCABULARY, algorithm_1, build, perturbations
from torch import Tensor

# Masks that leave nothing to perturb are among those drawn, and are told.
pytestmark = pytest.mark.filterwarnings("ignore:no example of this call had:smartreg.SmartWarning")

everywhere = settings(
    derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], database=None
)

balls = st.fixed_dictionaries(
    {
        "epsilon": st.sampled_from([0.0, 1e-6, 0.02, 0.5]),
        "step_size": st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
        "noise_std": st.sampled_from([1e-8, 0.05, 3.0]),
        "steps": st.integers(0, 3),
        "norm": st.sampled_from(["inf", "2"]),
        "norm_over": st.sampled_from(["example", "token"]),
        "epsilon_scale": st.sampled_from(["rms", "absolute"]),
    }
)


@st.composite
def batches(draw: st.DrawFn, *, least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a mask of any pattern (rows of padding alone too) and noise; an empty batch, one example, one token."""
    examples, tokens = draw(st.integers(least, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ids = torch.randint(0, VOCABULARY, (examples, tokens), generator=generator)
    mask = torch.rand(examples, tokens, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    noise = torch.randn(examples, tokens, FEATURES, generator=generator, dtype=torch.float64)
    return ids, mask, 0.05 * noise


def final(ids: Tensor, mask: Tensor | None, noise: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The penalty and the last perturbation."""
    model = build(scale=2.0)
    _, penalty = algorithm_1(model, **options)(lambda m: m(ids, mask), mask=mask, noise=noise)
    return penalty, perturbations(model)[options.get("steps", 1) if options.get("epsilon", 1.0) else 0][0]


@everywhere
@given(batches(), balls)
def test_inside_the_ball(data: tuple[Tensor, Tensor, Tensor], ball: dict[str, Any]) -> None:
    ids, mask, _ = data
    model = build(scale=2.0)
    smart = algorithm_1(model, **ball, generator=torch.Generator().manual_seed(0))
    _, penalty = smart(lambda m: m(ids, mask), mask=mask)
    x, count = model.seen[0], mask.sum(dim=1).clamp_min(1).double() * FEATURES
    unit = torch.ones(len(ids)).double()
    if ball["epsilon_scale"] == "rms":
        unit = ((x * mask.unsqueeze(-1)).square().sum(dim=(1, 2)) / count).sqrt()
    radius = (ball["epsilon"] * unit).unsqueeze(-1)  # (examples, 1)
    if ball["norm"] == "2" and ball["epsilon_scale"] == "rms":
        radius = radius * (count.sqrt().unsqueeze(-1) if ball["norm_over"] == "example" else FEATURES**0.5)
    for number, (delta,) in enumerate(perturbations(model)):
        if number == 0 and ball["steps"] and ball["epsilon"]:
            continue  # the random start, which the first step alone sees
        size = delta.abs().amax(dim=-1) if ball["norm"] == "inf" else delta.square().sum(dim=-1).sqrt()  # per token
        if ball["norm"] == "2" and ball["norm_over"] == "example":
            size = size.square().sum(dim=-1, keepdim=True).sqrt()
        assert (size <= radius + 1e-14).all()
        assert not delta[~mask].any()
    assert penalty.item() >= 0.0
    assert torch.isfinite(penalty)
    penalty.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert 0 <= smart.stats.bad_examples <= len(ids)


@everywhere
@given(batches(least=1), balls)
def test_batched_equals_one_by_one(data: tuple[Tensor, Tensor, Tensor], ball: dict[str, Any]) -> None:
    ids, mask, noise = data
    penalty, together = final(ids, mask, noise, **ball)
    alone = [final(ids[i : i + 1], mask[i : i + 1], noise[i : i + 1], **ball) for i in range(len(ids))]
    torch.testing.assert_close(together, torch.cat([delta for _, delta in alone]), rtol=0, atol=1e-9)
    mean = sum(one.item() for one, _ in alone) / len(alone)
    assert penalty.item() == pytest.approx(mean, rel=1e-8, abs=1e-20)


@everywhere
@given(batches(least=1), balls, st.integers(1, 3))
def test_masked_equals_removed(data: tuple[Tensor, Tensor, Tensor], ball: dict[str, Any], padding: int) -> None:
    ids, mask, noise = data
    penalty, delta = final(ids, mask, noise, **ball)
    more = torch.randint(0, VOCABULARY, (len(ids), padding), generator=torch.Generator().manual_seed(padding))
    longer = torch.cat([mask, torch.zeros_like(more, dtype=torch.bool)], dim=1)
    loud = torch.full((len(ids), padding, FEATURES), 1e3).double()
    padded, padded_delta = final(torch.cat([ids, more], dim=1), longer, torch.cat([noise, loud], dim=1), **ball)
    torch.testing.assert_close(padded_delta[:, : ids.shape[1]], delta, rtol=0, atol=1e-9)
    assert padded.item() == pytest.approx(penalty.item(), rel=1e-8, abs=1e-20)


@everywhere
@given(batches(), balls)
def test_what_stands_at_padding_does_not_matter(data: tuple[Tensor, Tensor, Tensor], ball: dict[str, Any]) -> None:
    ids, mask, noise = data
    penalty, delta = final(ids, mask, noise, **ball)
    other = torch.where(mask, ids, (ids + 5) % VOCABULARY)
    same, same_delta = final(other, mask, torch.where(mask.unsqueeze(-1), noise, torch.nan), **ball)
    torch.testing.assert_close(same_delta, delta, rtol=0, atol=1e-15)  # seen through other embeddings at padding
    assert same.item() == penalty.item()


@everywhere
@given(batches(), balls)
def test_both_modes_agree(data: tuple[Tensor, Tensor, Tensor], ball: dict[str, Any]) -> None:
    ids, mask, noise = data
    found = []
    for memory_efficient in (False, True):
        model = build(scale=2.0)
        smart = algorithm_1(model, memory_efficient=memory_efficient, **ball)
        outputs, penalty = smart(lambda m: m(ids, mask), mask=mask, noise=noise)
        (outputs.square().sum() + penalty).backward()
        found.append((penalty.item(), [parameter.grad for parameter in model.parameters()]))
    assert found[0][0] == found[1][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@everywhere
@given(batches(least=1), st.sampled_from(["transposed", "strided", "expanded"]))
def test_layout_in_memory_does_not_matter(data: tuple[Tensor, Tensor, Tensor], layout: str) -> None:
    ids, mask, noise = data
    if layout == "expanded":
        ids, mask, noise = (t[:1].expand(3, *t.shape[1:]) for t in data)
        given = ids, mask, noise
    elif layout == "transposed":
        given = (
            ids.t().contiguous().t(),
            mask.t().contiguous().t(),
            noise.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        )
    else:
        given = tuple(torch.stack([t, t], dim=-1)[..., 0] for t in data)  # type: ignore[assignment]
    (plain, delta), (other, same) = final(ids.clone(), mask.clone(), noise.clone()), final(*given)
    assert plain.item() == other.item()
    assert torch.equal(delta, same)


@everywhere
@given(batches(least=1), balls)
def test_without_gradients_the_same_penalty_without_a_graph(
    data: tuple[Tensor, Tensor, Tensor], ball: dict[str, Any]
) -> None:
    ids, mask, noise = data
    expected, _ = final(ids, mask, noise, **ball)
    assert expected.requires_grad
    with torch.no_grad():
        penalty, _ = final(ids, mask, noise, **ball)
        assert torch.is_grad_enabled() is False
    assert not penalty.requires_grad
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    if ball["steps"] == 0:
        with torch.inference_mode():
            penalty, _ = final(ids, mask, noise, **ball)
        assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
@pytest.mark.parametrize("steps", [0, 2])
def test_empty_batch(steps: int, memory_efficient: bool) -> None:
    model = build()
    smart = algorithm_1(model, steps=steps, memory_efficient=memory_efficient)
    ids = torch.zeros(0, 4, dtype=torch.long)
    outputs, penalty = smart(lambda m: m(ids), mask=torch.ones(0, 4))
    penalty.backward()
    assert outputs.shape == (0, 3)
    assert penalty.item() == 0.0
    assert (smart.stats.bad_examples, smart.stats.max_perturbation) == (0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_other_dtypes_of_the_model(dtype: torch.dtype, memory_efficient: bool) -> None:
    model = build(dtype=dtype, scale=2.0)
    smart = algorithm_1(model, steps=2, memory_efficient=memory_efficient)
    ids, mask = torch.arange(12).reshape(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    outputs, penalty = smart(lambda m: m(ids, mask), mask=mask, noise=lambda x: torch.full_like(x, 0.25))
    assert outputs.dtype == dtype
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert all(parameter.grad.dtype == dtype for parameter in model.parameters())
    exact = build(scale=2.0)
    noise = torch.full((3, 4, FEATURES), 0.25).double()
    expected = algorithm_1(exact, steps=2)(lambda m: m(ids, mask), mask=mask, noise=noise).penalty.item()
    assert penalty.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.15)
