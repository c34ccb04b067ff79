"""Where a `SmartWarning` points: at the line of the user's that led to it."""

import linecache
import warnings

import pytest
import torch
from torch import nn

from smartreg import MomentumBregman, SlantedTriangularLR, SmartLoss, SmartWarning, smoothness_penalty


class Wrapper(nn.Module):
    """A module of the user's around the regularizer, so that torch stands between the line and the warning twice."""

    def __init__(self, smart: SmartLoss) -> None:
        super().__init__()
        self.smart = smart

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.smart(lambda m: m(ids), divergence="mse").penalty  # the line


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))


IDS = torch.tensor([[1, 2], [3, 4]])


def absolute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs().mean()


def from_the_constructor() -> None:
    SmartLoss(model(), embedding="0", noise_std=0.0, start="noise", steps=1)  # the line


def from_a_call_behind_two_modules() -> None:
    options = {"noise_std": 0.0, "start": "noise", "steps": 1}
    smart = SmartLoss(model(), embedding="0", divergence=absolute, **options)
    Wrapper(smart)(IDS)


def from_the_function() -> None:
    smoothness_penalty(lambda x: x.sum(dim=1), torch.ones(2, 2, 3), noise_std=0.0, start="noise", steps=1)  # the line


def from_the_precision_check() -> None:
    smart = SmartLoss(model().bfloat16(), embedding="0", epsilon=1e-6, noise_std=1e-6, epsilon_scale="absolute")
    smart(lambda m: m(IDS))  # the line


def from_a_loaded_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    state = SlantedTriangularLR(optimizer, 10).state_dict()
    SlantedTriangularLR(optimizer, 20).load_state_dict(state)  # the line


@pytest.mark.parametrize(
    "provoke",
    [
        from_the_constructor,
        from_a_call_behind_two_modules,
        from_the_function,
        from_the_precision_check,
        from_a_loaded_schedule,
    ],
)
def test_the_warning_stands_at_the_users_line(provoke) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        provoke()
    (warning,) = [w for w in caught if issubclass(w.category, SmartWarning)]
    assert warning.filename == __file__
    assert linecache.getline(__file__, warning.lineno).rstrip().endswith("# the line")


def test_printing_shows_the_settings_and_the_numbers() -> None:
    smart, bregman = SmartLoss(model(), embedding="0", epsilon=0.25), MomentumBregman(model(), beta=0.5)
    assert "epsilon=0.25" in repr(smart)
    assert "Sequential" in repr(smart)
    assert "divergence=symmetric_kl" in repr(smart)
    assert "beta=0.5, divergence=symmetric_kl, updates=0" in repr(bregman)
    smart(lambda m: m(IDS))
    assert f"bad_examples={smart.stats.bad_examples}" in repr(smart.stats)
    assert "tensor" not in repr(smart.stats)
