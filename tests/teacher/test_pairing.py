"""Names behind wrappers, and a layout that knows whether it is still true."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from smartreg._teacher.parameters import Layout, differences, pair


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 3)))


def replace_parameter(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(torch.zeros(2, 2))


def replace_module(module: nn.Sequential) -> None:
    module[1][0] = nn.ReLU()


def add_parameter_at_the_end(module: nn.Sequential) -> None:
    module[1][1].register_parameter("extra", nn.Parameter(torch.zeros(1)))


def remove_parameter_at_the_end(module: nn.Sequential) -> None:
    del module[1][1].bias


def add_module(module: nn.Sequential) -> None:
    module[1][1].extra = nn.Tanh()


@pytest.mark.parametrize(
    "change", [replace_parameter, replace_module, add_parameter_at_the_end, remove_parameter_at_the_end, add_module]
)
def test_every_change_is_noticed(change: Callable[[nn.Sequential], None]) -> None:
    module = model()
    layout = Layout(module)
    assert layout.is_current()
    module.double().requires_grad_(False).eval()
    assert layout.is_current()
    change(module)
    assert not layout.is_current()


def test_replacing_keeps_it_current_and_ties_tied() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    layout = Layout(module)
    new = nn.Parameter(torch.zeros(2, 2))
    layout.replace(module[0].weight, new)
    assert module[0].weight is module[1].weight is new
    assert layout.parameters["0.weight"] is layout.parameters["1.weight"] is new
    assert layout.is_current()


def test_a_cycle_of_modules_ends() -> None:
    parent, child = nn.Module(), nn.Linear(1, 1, bias=False)
    parent.child = child
    child.parent = parent
    assert list(Layout(parent).parameters) == ["child.weight"]


def test_tied_parameters_pair_once_under_their_first_name() -> None:
    student, teacher = Layout(model()), Layout(model())
    assert list(pair(student, teacher)) == ["0.weight", "0.bias", "1.1.weight", "1.1.bias"]
    assert differences(student, teacher) == ""
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert list(pair(Layout(tied), Layout(tied))) == ["0.weight", "0.bias", "1.bias"]
