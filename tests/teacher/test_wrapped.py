"""The teacher of a model that is wrapped: DistributedDataParallel, torch.compile, FSDP2."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from teacher_models import mlp, shift
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from smartreg._teacher.parameters import Layout
from smartreg._wrappers import innermost
from smartreg.bregman import MomentumBregman

X = torch.ones(2, 3)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_moves(model: nn.Module, bregman: MomentumBregman, forward_to: nn.Module) -> None:
    before = [p.detach().clone() for p in bregman.teacher.parameters()]
    shift(model)
    assert bregman(lambda m: m(X), forward_to(X)).item() > 0
    bregman.update()
    for old, own, new in zip(before, bregman.teacher.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.detach(), old.lerp(new.detach(), 0.5))


@pytest.mark.parametrize("wrapped_when", ["before", "after"])
def test_ddp_is_taken_off(process_group: None, wrapped_when: str) -> None:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    bregman = MomentumBregman(wrapped if wrapped_when == "before" else model, beta=0.5, divergence="mse")
    assert type(bregman.teacher) is nn.Sequential
    assert [name for name in bregman.state_dict() if "module" in name] == []
    check_moves(model, bregman, wrapped)


def test_wrappers_around_wrappers(process_group: None) -> None:
    model = mlp()
    assert innermost(DistributedDataParallel(torch.compile(model, backend="eager"))) is model
    assert innermost(torch.compile(DataParallel(model), backend="eager")) is model


def test_a_module_that_is_called_module_keeps_its_name(process_group: None) -> None:
    holder = nn.Module()
    holder.module = nn.Linear(1, 1, bias=False)
    assert list(Layout(holder).parameters) == ["module.weight"]
    holder.module = DistributedDataParallel(holder.module)
    assert list(Layout(holder).parameters) == ["module.weight"]


@pytest.mark.parametrize("part", ["whole", "in place", "nested before", "nested after", "nested in place"])
def test_compiled_models(part: str) -> None:
    torch._dynamo.reset()
    model = mlp()
    user = model
    if part == "whole":
        user = torch.compile(model, backend="eager")
    elif part == "in place":
        model.compile(backend="eager")
    elif part == "nested before":
        model[0] = torch.compile(model[0], backend="eager")
    elif part == "nested in place":
        model[0].compile(backend="eager")
    bregman = MomentumBregman(user, beta=0.5, divergence="mse")
    if part == "nested after":
        model[0] = torch.compile(model[0], backend="eager")
    check_moves(model, bregman, user)
    assert [name for name in bregman.state_dict() if "_orig_mod" in name] == []


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Inner()
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


@pytest.mark.parametrize("how", ["wrapped", "in place", "nested", "nested in place"])
@pytest.mark.parametrize("called_before", [False, True])
def test_compiled_teachers_are_seen_to_run_and_not_compiled_again(how: str, called_before: bool) -> None:
    torch._dynamo.reset()
    model, teacher = Outer(), Outer()
    counter = torch._dynamo.testing.CompileCounter()
    if how == "wrapped":
        teacher = torch.compile(teacher, backend=counter)
    elif how == "in place":
        teacher.compile(backend=counter)
    elif how == "nested":
        teacher.inner = torch.compile(teacher.inner, backend=counter)
    else:
        teacher.inner.compile(backend=counter)
    if called_before:
        with torch.no_grad():
            teacher(X)
    bregman = MomentumBregman(model, beta=0.5, teacher=teacher, divergence="mse")
    assert bregman.teacher is teacher
    frames = []
    for step in range(4):
        shift(model, step)
        assert bregman(lambda m: m(X), model(X)).item() > 0
        bregman.update()
        frames.append(counter.frame_count)
    # Called before it was frozen, a graph is made once more.
    assert frames == [1 + called_before] * 4
    if how == "wrapped":
        with pytest.raises(RuntimeError, match="never called the teacher"):
            bregman(lambda m: model(X), model(X))


def train_beside_the_teacher(model: nn.Module, bregman: MomentumBregman) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    penalties = []
    for _ in range(3):
        outputs = model(X)
        penalty = bregman(lambda m: m(X), outputs)
        (outputs.square().sum() + 3 * penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        bregman.update()
        penalties.append(penalty.item())
        # Whole weights are given back after the pass, and not only when the average moves.
        bregman(lambda m: m(X), outputs)
        assert isinstance(bregman._teacher.module[0].weight, type(model[0].weight))
    return penalties


def test_sharded_teacher_built_first(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole = mlp()
    whole[0].bias.requires_grad_(False)
    model, teacher = copy.deepcopy(whole), copy.deepcopy(whole)
    reference = MomentumBregman(whole, beta=0.5, divergence="mse")
    expected = train_beside_the_teacher(whole, reference)
    assert expected[-1] > 1e-3
    for module in (model, teacher):
        fully_shard(module[2], mesh=init_device_mesh("cpu", (1,)))
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    bregman = MomentumBregman(model, beta=0.5, teacher=teacher, divergence="mse")
    assert "average.0.bias" in bregman.state_dict()  # equal here, but the shards of other processes might not be
    assert train_beside_the_teacher(model, bregman) == pytest.approx(expected, rel=1e-6)
    for one, other in ((model, whole), (bregman.teacher, reference.teacher)):
        for name, parameter in one.named_parameters():
            assert isinstance(parameter, DTensor), name
            torch.testing.assert_close(parameter.detach().to_local(), other.get_parameter(name).detach())
    resumed = MomentumBregman(model, beta=0.5, teacher=copy_of_shards(bregman), divergence="mse")
    resumed.load_state_dict(bregman.state_dict())
    assert torch.equal(resumed.teacher[2].weight.to_local(), bregman.teacher[2].weight.to_local())
    with pytest.raises(RuntimeError, match=r"cannot be copied for a teacher.*teacher="):
        MomentumBregman(model)


def copy_of_shards(bregman: MomentumBregman) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = mlp()
    fully_shard(module[2], mesh=init_device_mesh("cpu", (1,)))
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


def test_sharding_after_the_teacher_was_made_is_an_error(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    bregman = MomentumBregman(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=r"sharded in one of the two alone: 0\.bias, 0\.weight"):
        bregman.update()
