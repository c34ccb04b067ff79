"""The teacher beside a model that is moved, changed, or has buffers."""

from typing import Any

import pytest
import torch
from teacher_models import mlp, shift
from torch import Tensor, nn

from smartreg.bregman import MomentumBregman

X = torch.ones(2, 3)


# Buffers


class Counting(nn.Module):
    """Writes to a buffer in every forward, and holds one that is not saved."""

    scale: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.scale


def test_batch_norm_statistics_are_those_of_the_model() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    bregman = MomentumBregman(model, divergence="mse")
    for _ in range(3):
        outputs = model(torch.randn(8, 3) + 5)
        bregman(lambda m: m(X), outputs[:2])
        assert torch.equal(bregman.teacher[1].running_mean, model[1].running_mean)
        assert bregman.teacher[1].num_batches_tracked == model[1].num_batches_tracked
    assert model[1].running_mean.abs().max() > 0.1
    before = model[1].running_mean.clone()
    bregman.teacher(X)
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("name", ["calls", "scale"])
def test_buffers_follow_whether_written_or_replaced(name: str) -> None:
    model = Counting()
    bregman = MomentumBregman(model)
    getattr(model, name).fill_(3)
    assert (getattr(bregman.teacher, name) == 3).all()
    setattr(model, name, torch.full_like(getattr(model, name), 5))
    teacher = bregman._teacher.module
    bregman.update()
    assert (getattr(teacher, name) == 5).all()
    setattr(model, name, torch.full_like(getattr(model, name), 7))
    bregman(lambda m: m(X), model(X))
    assert (getattr(teacher, name) == getattr(model, name)).all()


def test_a_forward_that_writes_to_a_buffer_leaves_the_models_alone() -> None:
    model = Counting()
    bregman = MomentumBregman(model)
    outputs = model(X)
    bregman(lambda m: m(X), outputs)
    assert model.calls == 1
    assert bregman.teacher.calls is model.calls

    def fails(module: nn.Module) -> Tensor:
        module(X)
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        bregman(fails, outputs)
    assert model.calls == 1
    assert bregman.teacher.calls is model.calls


def test_a_buffer_held_twice_stays_one() -> None:
    model = nn.ModuleList([Counting(), Counting()])
    model[1].calls = model[0].calls
    bregman = MomentumBregman(model)
    seen = []
    outputs = model[0](X)
    bregman(lambda m: (seen.append(m[0].calls is m[1].calls), m[0](X))[1], outputs)
    assert seen == [True]


# Moves


def test_follows_to_half_precision_and_back_without_losing_the_average() -> None:
    model = mlp()
    bregman = MomentumBregman(model, beta=0.999)
    shift(model)
    bregman.update()
    exact = bregman.teacher[0].weight.detach().clone()
    model.to(torch.bfloat16)
    assert bregman.teacher[0].weight.dtype == torch.bfloat16
    assert torch.equal(bregman.state_dict()["average.0.weight"], exact)
    bregman.update()
    model.float()
    bregman.update()
    assert bregman.teacher[0].weight.dtype == torch.float32
    assert set(bregman._teacher.wide) == set()
    expected = exact
    for _ in range(2):
        expected = expected.lerp(model[0].weight.detach(), 1 - 0.999)
    torch.testing.assert_close(bregman.teacher[0].weight.detach(), expected)
    model.double()
    bregman.update()
    assert bregman.teacher[0].weight.dtype == bregman.state_dict()["average.0.weight"].dtype == torch.float64


def test_an_update_alone_follows_too() -> None:
    """Without a call or a look at the teacher in between."""
    model = mlp()
    bregman = MomentumBregman(model, beta=0.5)
    bregman.update()
    model.to(torch.bfloat16)
    start = model[0].weight.detach().float()
    shift(model)
    bregman.update()
    model.double()
    bregman.update()
    end = model[0].weight.detach()
    assert bregman._teacher.module[0].weight.dtype == torch.float64
    expected = mlp()[0].weight.detach().double().lerp(end, 0.75)
    torch.testing.assert_close(bregman._teacher.module[0].weight.detach(), expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(start.double(), end)


def test_shared_parameters_stay_shared_when_the_model_moves() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model)
    teacher = bregman.teacher
    model.double()
    assert teacher[0].weight.data_ptr() != model[0].weight.data_ptr()
    bregman(lambda m: m(X.double()), model(X.double()))
    assert teacher[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert teacher[0].weight.dtype == teacher[2].weight.dtype == torch.float64


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_follows_to_the_gpu() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model)
    model.cuda()
    x = X.cuda()
    assert bregman(lambda m: m(x), model(x)).item() == 0.0
    shift(model)
    bregman.update()
    assert {p.device.type for p in bregman.teacher.parameters()} == {"cuda"}
    assert bregman.teacher[0].weight.data_ptr() == model[0].weight.data_ptr()


def test_replaced_parameters_of_the_same_names_are_found() -> None:
    model = mlp()
    bregman = MomentumBregman(model, beta=0.5)
    bregman.update()
    model.load_state_dict({name: torch.ones_like(p) for name, p in model.named_parameters()}, assign=True)
    start = bregman.teacher[0].weight.detach().clone()
    bregman.update()
    torch.testing.assert_close(bregman.teacher[0].weight.detach(), start.lerp(torch.ones(5, 3), 0.5))


# Changes of the set


def change_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 3)


def add_module(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def remove_bias(model: nn.Sequential) -> None:
    model[2].bias = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_head,
            r"of another shape: 2\.bias is \(3,\) in the model, \(2,\) in the teacher, 2\.weight is \(3, 5\)",
        ),
        (add_module, r"changed .*: only in the model: 3\.bias, 3\.weight\. Make a new one"),
        (remove_bias, r"changed .*: only in the teacher: 2\.bias\. Make a new one"),
    ],
)
def test_a_changed_set_of_parameters_is_an_error_that_names_them(change: Any, message: str) -> None:
    model = mlp()
    bregman = MomentumBregman(model)
    outputs = model(X)
    change(model)
    for use in (bregman.update, lambda: bregman(lambda m: m(X), outputs), lambda: bregman.teacher, bregman.state_dict):
        with pytest.raises(RuntimeError, match=message):
            use()
    assert bregman.updates == 0


def test_untying_in_the_model_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    bregman = MomentumBregman(model)
    model[1].weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match=r"tied in the teacher alone: 0\.weight = 1\.weight"):
        bregman.update()
