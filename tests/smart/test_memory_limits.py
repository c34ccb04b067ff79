"""`memory_efficient=True`: what it refuses, and half precision."""

from typing import Any

import pytest
import torch
from smart_models import CLASSES, Sentence, algorithm_1, batch, build, gradients
from torch import Tensor, nn

from smartreg import SmartLoss, mse
from smartreg._loss_scale import LossScale

IDS, MASK = batch(examples=4, tokens=5)
SOURCE = torch.Generator()


def noise(embeddings: Tensor) -> Tensor:
    drawn = torch.randn(embeddings.shape, generator=SOURCE.manual_seed(1), dtype=torch.float64)
    return (0.1 * drawn).to(embeddings.dtype)


def test_create_graph_is_an_error() -> None:
    model = build()
    _, penalty = SmartLoss(model, memory_efficient=True)(lambda m: m(IDS, MASK))
    with pytest.raises(RuntimeError, match=r"create_graph=True\) needs memory_efficient=False"):
        penalty.backward(create_graph=True)
    _, penalty = SmartLoss(model)(lambda m: m(IDS, MASK))
    gradient = torch.autograd.grad(penalty, model.hidden.weight, create_graph=True)[0]
    assert torch.autograd.grad(gradient.square().sum(), model.hidden.weight)[0].abs().max() > 0


def test_second_backward_is_an_error_that_names_the_remedy() -> None:
    model = build()
    _, penalty = SmartLoss(model, memory_efficient=True)(lambda m: m(IDS, MASK))
    penalty.backward()
    before = gradients(model)
    with pytest.raises(RuntimeError, match=r"gone after one backward: call backward\(retain_graph=True\)"):
        penalty.backward()
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("enters", ["the model", "the divergence"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_graph_from_outside_is_an_error(steps: int, enters: str) -> None:
    model, prompt = build(), torch.ones(CLASSES, requires_grad=True)
    outside = prompt.exp().double()

    def forward(m: Sentence) -> Tensor:
        return m(IDS, MASK) * (outside if enters == "the model" else 1)

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b) * (outside if enters == "the divergence" else 1)).square().sum()

    standard = SmartLoss(model, steps=steps, divergence=divergence)
    standard(forward).penalty.backward(retain_graph=True)
    assert prompt.grad is not None
    kept, prompt.grad = prompt.grad, None
    with pytest.raises(RuntimeError, match=r"enters from outside \(\w+\): move its computation into forward"):
        SmartLoss(model, steps=steps, divergence=divergence, memory_efficient=True)(forward)
    assert prompt.grad is None
    outside.sum().backward()  # its graph was not freed
    assert kept.shape == prompt.grad.shape


def test_a_leaf_or_a_constant_from_outside_is_none() -> None:
    model, scale, constant = build(), torch.ones(CLASSES, dtype=torch.float64, requires_grad=True), torch.ones(CLASSES)
    smart = SmartLoss(model, memory_efficient=True)
    smart(lambda m: m(IDS, MASK) * scale * constant).penalty.backward()
    assert scale.grad.abs().max() > 0


def test_a_backward_inside_forward_is_an_error() -> None:
    def forward(m: Sentence) -> Tensor:
        logits = m(IDS, MASK)
        torch.autograd.grad(logits.square().sum(), m.head.weight, retain_graph=True)
        return logits

    with pytest.raises(RuntimeError, match="forward must not run a backward of its own"):
        algorithm_1(build(), memory_efficient=True)(forward)


def test_without_gradients_it_is_the_standard_mode() -> None:
    model = build()
    smart = algorithm_1(model, memory_efficient=True)
    with torch.no_grad():
        _, penalty = smart(lambda m: m(IDS, MASK), noise=noise)
    assert len(model.seen) == 3
    assert not penalty.requires_grad
    assert penalty.item() == algorithm_1(model)(lambda m: m(IDS, MASK), noise=noise).penalty.item()


def test_a_model_without_a_trainable_parameter() -> None:
    model = build().requires_grad_(False)
    values = [
        SmartLoss(model, memory_efficient=mode)(lambda m: m(IDS, MASK), noise=noise).penalty for mode in (False, True)
    ]
    assert values[0].item() == values[1].item() > 0
    assert not any(value.requires_grad for value in values)


def under_autocast(dtype: torch.dtype, *, memory_efficient: bool, run_before: bool = False) -> Any:
    model = build(dtype=torch.float32, scale=2.0)
    torch.manual_seed(3)
    outside = nn.Linear(CLASSES, CLASSES)
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    with torch.autocast("cpu", dtype):
        if run_before:  # leaves casts of the weights in the cache of autocast, with graphs of their own
            earlier = outside(model(IDS, MASK)).sum()
        outputs, penalty = smart(lambda m: outside(m(IDS, MASK)), noise=noise)
        again = smart(lambda m: outside(m(IDS, MASK)), noise=noise).penalty
    assert outputs.dtype == dtype
    assert penalty.dtype == torch.float32
    loss = outputs.float().square().mean() + penalty + again
    (loss + earlier if run_before else loss).backward()
    return penalty.item(), {**gradients(model), **gradients(outside)}


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_agrees_with_the_standard_mode(dtype: torch.dtype, run_before: bool) -> None:
    value, standard = under_autocast(dtype, memory_efficient=False, run_before=run_before)
    same, efficient = under_autocast(dtype, memory_efficient=True, run_before=run_before)
    assert value == same > 0
    rounding = torch.finfo(dtype).eps
    for name, gradient in standard.items():
        torch.testing.assert_close(
            efficient[name], gradient, rtol=2 * rounding, atol=2 * rounding * gradient.abs().max().item()
        )


def test_float16_gradients_that_would_vanish_in_the_inner_backward() -> None:
    """With a `GradScaler` outside the standard mode keeps them; the inner backward has a scale of its own."""

    def faint(a: Tensor, b: Tensor) -> Tensor:
        return 1e-6 * mse(a, b)

    found = []
    for memory_efficient in (False, True):
        model = build(dtype=torch.float16, scale=2.0)
        smart = algorithm_1(model, divergence=faint, memory_efficient=memory_efficient)
        (2.0**20 * smart(lambda m: m(IDS, MASK), noise=noise).penalty).backward()
        found.append(torch.cat([gradient.flatten().float() for gradient in gradients(model).values()]))
    assert found[0].abs().max() / 2.0**20 < torch.finfo(torch.float16).smallest_normal / 10
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


def test_the_ascent_divides_its_loss_scale_out() -> None:
    """The normalized ascent feels the length of the gradient."""
    found = []
    for dtype in (torch.float64, torch.float16):
        model = build(dtype=dtype, scale=2.0)
        smart = SmartLoss(model, ascent="normalized", step_size=100.0, epsilon_scale="absolute")
        smart(lambda m: m(IDS, MASK), noise=noise)
        found.append((model.seen[-1] - model.seen[0]).double())
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


def test_loss_scale_is_for_float16_alone() -> None:
    scales, cpu = LossScale(), torch.device("cpu")
    assert scales.get(cpu, torch.float32, torch.bfloat16, None) is None
    scales.update(None, [torch.tensor(torch.inf)])
    scale = scales.get(cpu, torch.float32, torch.float16)
    assert scale.item() == 2.0**12


def test_loss_scale_is_halved_by_an_overflow_and_stays_above_one() -> None:
    scales, cpu = LossScale(), torch.device("cpu")
    first = scales.get(cpu, torch.float16)
    scales.update(first, [torch.ones(2), torch.zeros(3)])
    assert scales.get(cpu, torch.float16).item() == first.item()
    sparse = torch.sparse_coo_tensor([[1]], [torch.nan], (3,), check_invariants=True)
    for number, gradient in enumerate([torch.tensor([1.0, torch.inf]), torch.tensor(torch.nan), sparse], start=1):
        scales.update(scales.get(cpu, torch.float16), [torch.ones(2), gradient])
        assert scales.get(cpu, torch.float16).item() == 2.0 ** (12 - number)
    assert first.item() == 2.0**12  # a graph may hold it
    for _ in range(20):
        scales.update(scales.get(cpu, torch.float16), [torch.tensor(torch.inf)])
    assert scales.get(cpu, torch.float16).item() == 1.0


def test_loss_scale_grows_back_after_two_thousand_gradients_without_an_overflow() -> None:
    scales, cpu, good = LossScale(), torch.device("cpu"), [torch.ones(2)]
    for _ in range(2):
        scales.update(scales.get(cpu, torch.float16), [torch.tensor(torch.inf)])
    found = []
    for _ in range(6000):
        scales.update(scales.get(cpu, torch.float16), good)
        found.append(scales.get(cpu, torch.float16).item())
    assert found == [2.0**10] * 1999 + [2.0**11] * 2000 + [2.0**12] * 2001  # and no further than it began
    scales.update(scales.get(cpu, torch.float16), [torch.tensor(torch.inf)])
    for number in range(3000):  # an overflow begins the count anew
        scales.update(scales.get(cpu, torch.float16), [torch.tensor(torch.inf)] if number == 1500 else good)
    assert scales.get(cpu, torch.float16).item() == 2.0**10


def test_float16_autocast_with_a_sparse_embedding() -> None:
    found = []
    for memory_efficient in (False, True):
        model = build(dtype=torch.float32, scale=2.0, sparse=True)
        with torch.autocast("cpu", torch.float16):
            _, penalty = SmartLoss(model, memory_efficient=memory_efficient)(lambda m: m(IDS, MASK), noise=noise)
        penalty.backward()
        found.append(model.embedding.weight.grad.to_dense())
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3 * found[0].abs().max().item())
