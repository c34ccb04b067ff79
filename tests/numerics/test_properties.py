"""Properties that hold in every dtype: sizes, extreme logits, layouts."""

import warnings
from typing import Any

import numerics_models as models
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import smartreg
from smartreg import SmartLoss, SmartWarning, smoothness_penalty
from smartreg.divergences import BUILTIN

QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
FEW = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@QUICK
@given(
    dtype=DTYPES,
    name=st.sampled_from([name for name in BUILTIN if name != "mse"]),
    size=st.floats(0, 1e4),
    seed=st.integers(0, 1000),
)
def test_divergences_of_extreme_logits_in_every_dtype(dtype: torch.dtype, name: str, size: float, seed: int) -> None:
    """Finite in value and gradient, not below zero, wide, and that of the same numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (size * (2 * torch.rand(4, 3, generator=generator) - 1) for _ in range(2))
    a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    value = BUILTIN[name](a, b)
    assert value.dtype is torch.promote_types(dtype, torch.float32)
    assert value >= 0
    exact = BUILTIN[name](a.detach().double(), b.detach().double()).item()
    assert value.item() == pytest.approx(exact, rel=1e-4, abs=1e-12)
    value.backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in (a, b))


@QUICK
@given(
    dtype=DTYPES,
    epsilon=st.floats(1e-3, 10.0),
    norm=st.sampled_from(["inf", "2"]),
    norm_over=st.sampled_from(["example", "token"]),
    steps=st.integers(0, 3),
    seed=st.integers(0, 1000),
    transposed=st.booleans(),
)
def test_inside_the_ball_in_every_dtype(
    dtype: torch.dtype, epsilon: float, norm: str, norm_over: Any, steps: int, seed: int, transposed: bool
) -> None:
    """The perturbation as it was asked for, in float32 at least, before it is rounded into the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 4, 6, generator=generator).to(dtype)
    if transposed:
        embeds = embeds.transpose(1, 2).contiguous().transpose(1, 2)
    head = torch.randn(6, 3, generator=generator).to(dtype)
    last: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        last.append(x.detach())
        return x.tanh().mean(1) @ head

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmartWarning)  # 1e-3 is too small for half precision, and says so
        value = smoothness_penalty(
            run,
            embeds,
            epsilon=epsilon,
            norm=norm,
            norm_over=norm_over,
            steps=steps,
            epsilon_scale="absolute",
            noise_std=epsilon,
            step_size=epsilon,
            generator=generator,
        ).penalty
    assert torch.isfinite(value)
    assert value >= 0
    delta = last[-1].double() - embeds.double()
    dims = (1, 2) if norm_over == "example" else (2,)
    length = torch.linalg.vector_norm(delta, float(norm), dims)
    eps = torch.finfo(dtype).eps
    rounding = eps * torch.linalg.vector_norm(last[-1].double(), float(norm), dims)
    assert torch.all(length <= epsilon * (1 + 1e-5) + rounding)


@FEW
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    autocast=st.sampled_from([None, torch.bfloat16, torch.float16]),
    epsilon=st.floats(0, 10.0),
    padded=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    memory_efficient=st.booleans(),
    evaluation=st.booleans(),
)
def test_any_precision_any_mask(
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    epsilon: float,
    padded: list[int],
    memory_efficient: bool,
    evaluation: bool,
) -> None:
    """Penalty finite and not negative, gradients finite, padding untouched, an all-padding row included."""
    assume(dtype is not torch.bfloat16 or autocast is not torch.float16)  # torch has no kernel for the mixture
    model = models.build(dropout=0.1).to(dtype).train(not evaluation)
    ids = models.sentences(len(padded), 4)
    mask = torch.arange(4) < 4 - torch.tensor(padded)[:, None]
    smart = SmartLoss(model, epsilon=epsilon, memory_efficient=memory_efficient)
    seen: list[Tensor] = []
    handle = model.words.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    with warnings.catch_warnings(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        warnings.simplefilter("ignore", SmartWarning)
        value = smart(lambda m: m(ids), mask=mask).penalty
    handle.remove()
    assert value.dtype is torch.float32
    assert torch.isfinite(value)
    assert value >= 0
    assert all(torch.equal(moved[~mask], seen[0][~mask]) for moved in seen)
    value.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_and_huge_gradients_have_a_direction(dtype: torch.dtype) -> None:
    """Squares of 1e-7 vanish, those of 1e4 overflow in float16, and neither may lose the direction."""
    for size in (1e-7, 10.0):  # times the loss scale of 4096
        head = torch.tensor([[size], [0.0]]).to(dtype)
        embeds = torch.ones(2, 3, 2, dtype=dtype)
        seen: list[Tensor] = []

        def run(x: Tensor, head: Tensor = head, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.detach().float())
            return (x @ head).mean(1)

        smoothness_penalty(
            run,
            embeds,
            divergence=lambda a, b: (a - b).float().sum(),
            noise=torch.zeros(2, 3, 2),
            start="noise",
            epsilon=0.5,
            step_size=0.5,
            steps=1,
            norm="2",
            epsilon_scale="absolute",
        )
        moved = seen[-1] - seen[0]
        assert torch.allclose(moved[..., 0], torch.full((2, 3), 0.5 / 3**0.5), atol=4e-3)
        assert torch.equal(moved[..., 1], torch.zeros(2, 3))


def test_everything_is_exported() -> None:
    assert "diagnose" in smartreg.__all__
    assert callable(smartreg.diagnose)
