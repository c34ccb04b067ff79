"""Whether a module ran: noticed outside of graphs, and without a trace afterwards."""

import pytest
import torch
from torch import Tensor, nn

from smartreg._wrappers import noting_calls

X = torch.ones(1, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_it_and_everything_in_it_is_watched() -> None:
    net, other = Net(), Net()
    for run, times in ((lambda: net(X), 3), (lambda: net.second(X), 1), (lambda: other(X), 0), (lambda: None, 0)):
        with noting_calls(net.modules()) as called:
            run()
        assert len(called) == times
    net(X)
    assert len(called) == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_is_noted_inside_a_graph(in_place: bool) -> None:
    """A graph would go on writing to the list of the call in which it was made."""
    torch._dynamo.reset()
    net = Net()
    if in_place:
        net.compile(backend="eager")
    run = net if in_place else torch.compile(net, backend="eager")
    entry = net._compiled_call_impl
    lists = []
    for _ in range(2):
        with noting_calls(run.modules()) as called, torch.no_grad():
            run(X)
        lists.append(called)
    assert [len(called) for called in lists] == [1, 1]
    assert net._compiled_call_impl is entry


def test_nothing_is_left_behind_by_a_failure() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), noting_calls(net.modules()) as called:
        net(torch.ones(1, 5))
    assert len(called) > 0
    assert not any(part._forward_pre_hooks for part in net.modules())
