"""The teacher's weights: averaged by name, in enough precision."""

import copy

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_models import averages, mlp, shift
from torch import Tensor, nn

from smartreg._teacher import averaging
from smartreg.bregman import MomentumBregman

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().cpu().numpy().copy() for name, p in module.named_parameters()}


# The average


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.99, 0.999])
def test_update_equals_the_reference(dtype: torch.dtype, beta: float, device: str) -> None:
    model = mlp(dtype, device)
    bregman = MomentumBregman(model, beta=beta)
    start, students = arrays(model), []
    for step in range(7):
        shift(model, step)
        students.append(arrays(model))
        bregman.update()
    expected = reference.momentum(start, students, [beta] * 7)
    precision = 1e-13 if dtype == torch.float64 else 3e-7
    for name, average in averages(bregman).items():
        assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(average.double().cpu().numpy(), expected[name], rtol=precision, atol=precision)
    for name, parameter in bregman.teacher.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.device.type == device
        assert torch.equal(parameter, averages(bregman)[name].to(dtype))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    weights=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=2, max_size=8),
    betas=st.lists(st.floats(0, 0.9999), min_size=7, max_size=7),
)
def test_the_average_stays_between_the_weights_it_has_seen(weights: list[list[float]], betas: list[float]) -> None:
    model = nn.Linear(3, 1, bias=False)
    seen = torch.tensor(weights)
    with torch.no_grad():
        model.weight.copy_(seen[:1])
    bregman = MomentumBregman(model, beta=lambda update: betas[update], divergence="mse")
    for row in seen[1:]:
        with torch.no_grad():
            model.weight.copy_(row[None])
        bregman.update()
    teacher = bregman.teacher.weight[0]
    slack = 1e-6 * seen.abs().max()
    assert (teacher >= seen.min(dim=0).values - slack).all()
    assert (teacher <= seen.max(dim=0).values + slack).all()
    students = [{"w": row.numpy()} for row in seen[1:]]
    expected = reference.momentum({"w": seen[0].numpy()}, students, betas[: len(students)])["w"]
    np.testing.assert_allclose(teacher.numpy(), expected, rtol=1e-5, atol=1e-6 * float(seen.abs().max()) + 1e-30)


def test_beta_zero_is_the_model_itself_and_forgets_infinities() -> None:
    model = mlp()
    bregman = MomentumBregman(model, beta=0)
    with torch.no_grad():
        model[0].weight.fill_(torch.inf)
    bregman.update()
    shift_from = mlp()
    model.load_state_dict(shift_from.state_dict())
    bregman.update()
    for parameter, own in zip(model.parameters(), bregman.teacher.parameters(), strict=True):
        assert torch.equal(parameter, own)
        assert parameter.data_ptr() != own.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", [0.99, 0.999])
def test_a_bfloat16_teacher_moves(beta: float, device: str) -> None:
    """Averaged in bfloat16 it would not: the second half shows it."""
    model = nn.Linear(4, 4, bias=False, device=device, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    bregman = MomentumBregman(model, beta=beta)
    naive = model.weight.detach().clone()
    nn.init.constant_(model.weight, 1.125)
    for _ in range(500):
        bregman.update()
        naive.lerp_(model.weight.detach(), 1 - beta)
    expected = 1.125 - 0.125 * beta**500
    torch.testing.assert_close(bregman.teacher.weight, torch.full_like(naive, expected))
    assert (naive == 1.0).all()


def test_an_update_is_one_fused_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    bregman = MomentumBregman(model, beta=0.5)
    calls = []
    fused = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), fused(*args))[1])
    bregman.update()
    bregman.update()
    assert calls == [40, 40]


def test_large_half_precision_weights_are_converted_piece_by_piece() -> None:
    """More than one piece, and several small tensors in one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1100, 1000), nn.LayerNorm(1000), nn.Linear(1000, 1100)).bfloat16()
    bregman = MomentumBregman(model, beta=0.75)
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    shift(model, 0)
    bregman.update()
    for name, parameter in model.named_parameters():
        expected = before[name].lerp(parameter.detach().float(), 0.25)
        assert torch.equal(averages(bregman)[name], expected), name


def test_the_pieces_hold_few_elements_together_and_every_element_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded(Tensor):
        """Stands in for a tensor whose rows are not all here."""

    monkeypatch.setattr(averaging, "_CHUNK", 12)
    torch.manual_seed(0)
    shapes = [(4, 3), (5,), (2, 3), (10, 4), (), (1, 30), (3, 15), (0, 3), (2, 0), (2, 3)]
    values = [torch.randn(shape).bfloat16() for shape in shapes]
    values.append(torch.randn(10, 4).bfloat16())
    own = [torch.randn(value.shape) for value in values]
    own[-1] = own[-1].as_subclass(Sharded)
    expected = [a.double().lerp(v.double(), 0.25).float() for a, v in zip(own, values, strict=True)]
    pieces = []
    fused = torch._foreach_lerp_
    monkeypatch.setattr(
        torch, "_foreach_lerp_", lambda *args: (pieces.append([tuple(a.shape) for a in args[0]]), fused(*args))[1]
    )
    averaging.move_averages(own, values, 0.75)
    for average, right in zip(own, expected, strict=True):
        torch.testing.assert_close(average, right)
    assert pieces == [
        [(4, 3)],
        [(5,), (2, 3), (3, 4)],
        [(3, 4)],
        [(3, 4)],
        [(1, 4), (), (1, 30)],  # a row is not cut
        *[[(1, 15)]] * 3,
        [(2, 0), (2, 3), (10, 4)],
    ]


def test_the_dtype_of_an_average_is_wide() -> None:
    wide = {torch.float8_e4m3fn: torch.float32, torch.float16: torch.float32, torch.float64: torch.float64}
    wide |= {torch.complex64: torch.complex64, torch.int64: torch.int64}
    assert {dtype: averaging.average_dtype(dtype) for dtype in wide} == wide


def test_a_model_of_several_dtypes() -> None:
    model = nn.Sequential(mlp(torch.bfloat16)[0], mlp(torch.float64)[2], mlp()[2])
    bregman = MomentumBregman(model, beta=0.75)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    shift(model, 0)
    bregman.update()
    for name, parameter in model.named_parameters():
        expected = before[name].lerp(parameter.detach().double(), 0.25)
        torch.testing.assert_close(averages(bregman)[name].double(), expected, rtol=3e-7, atol=3e-7)
        own = bregman.teacher.get_parameter(name)
        assert own.dtype == parameter.dtype
        assert torch.equal(own, averages(bregman)[name].to(own.dtype))


def test_strided_and_complex_and_scalar_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Parameter(torch.randn(4, 6).t())
            self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.zeros(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scalar

    torch.manual_seed(2)
    model = Odd()
    bregman = MomentumBregman(model, beta=0.75, teacher=copy.deepcopy(model))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    bregman.update()
    for name, own in bregman.teacher.named_parameters():
        torch.testing.assert_close(own.detach(), 1.5 * before[name])  # ¼ · 3 + ¾ · 1
    assert bregman.teacher.turned.stride() == model.turned.stride()
