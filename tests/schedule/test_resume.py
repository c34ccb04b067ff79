"""A schedule that is saved and resumed."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from schedule_tools import optimizer_of, rates_of, take
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR

from smartreg._warnings import SmartWarning
from smartreg.schedule import SlantedTriangle, SlantedTriangularLR


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "scheduler alone"])
@pytest.mark.parametrize("stop", [0, 1, 3, 7, 19])
def test_a_resumed_schedule_continues_exactly(order: str, stop: int) -> None:
    optimizer = optimizer_of(0.5, 2.0)
    scheduler = SlantedTriangularLR(optimizer, 20, cut_frac=0.25, ratio=7.0)
    take(optimizer, scheduler, stop)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    whole = take(optimizer, scheduler, 22 - stop)

    file.seek(0)
    saved = torch.load(file, weights_only=True)  # plain numbers: no pickle needed
    optimizer = optimizer_of(0.5, 2.0)
    scheduler = SlantedTriangularLR(optimizer, 20, cut_frac=0.25, ratio=7.0)
    if order == "optimizer first":
        optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    if order == "scheduler first":
        optimizer.load_state_dict(saved["optimizer"])
    assert take(optimizer, scheduler, 22 - stop) == whole


def test_a_scheduler_made_after_the_optimizer_was_loaded() -> None:
    optimizer = optimizer_of(0.5)
    scheduler = SlantedTriangularLR(optimizer, 20)
    take(optimizer, scheduler, 6)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    whole = take(optimizer, scheduler, 5)

    optimizer = optimizer_of(0.5)
    optimizer.load_state_dict(saved[0])
    scheduler = SlantedTriangularLR(optimizer, 20)  # sets the optimizer to the rate of step 0
    scheduler.load_state_dict(saved[1])
    assert take(optimizer, scheduler, 5) == whole


def test_plain_lambda_lr_alone_leaves_the_rate_unset() -> None:
    """What the class states of torch, and differs from."""
    optimizer = optimizer_of(0.5)
    scheduler = LambdaLR(optimizer, SlantedTriangle(20))
    take(optimizer, scheduler, 6)
    saved = scheduler.state_dict()

    optimizer = optimizer_of(0.5)
    scheduler = LambdaLR(optimizer, SlantedTriangle(20))
    scheduler.load_state_dict(saved)
    assert rates_of(optimizer) == [0.5 / 32]
    assert rates_of(optimizer) != scheduler.get_last_lr()


def test_loading_keeps_rates_that_somebody_else_set() -> None:
    optimizer = optimizer_of(0.5, 2.0)
    scheduler = SlantedTriangularLR(optimizer, 20)
    take(optimizer, scheduler, 6)
    saved = scheduler.state_dict()
    optimizer = optimizer_of(0.5, 2.0)
    scheduler = SlantedTriangularLR(optimizer, 20)
    optimizer.param_groups[0]["lr"] = 0.125
    scheduler.load_state_dict(saved)
    assert rates_of(optimizer) == [0.125, saved["_last_lr"][1]]


def test_resume_inside_sequential_lr() -> None:
    def make() -> tuple[torch.optim.Optimizer, SequentialLR]:
        optimizer = optimizer_of(0.5)
        parts = [SlantedTriangularLR(optimizer, 4, ratio=2), SlantedTriangularLR(optimizer, 6, ratio=8)]
        return optimizer, SequentialLR(optimizer, parts, milestones=[4])

    optimizer, scheduler = make()
    take(optimizer, scheduler, 2)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    whole = take(optimizer, scheduler, 7)
    optimizer, scheduler = make()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert take(optimizer, scheduler, 7) == whole


def test_a_tensor_rate_stays_the_same_tensor() -> None:
    """A capturable optimizer reads its rate from a tensor, which a CUDA graph holds by address."""

    def make() -> tuple[torch.optim.Optimizer, SlantedTriangularLR]:
        rate = torch.tensor(0.5, dtype=torch.float64)
        optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=rate, foreach=False)
        return optimizer, SlantedTriangularLR(optimizer, 20)

    optimizer, scheduler = make()
    take(optimizer, scheduler, 6)
    saved, expected = copy.deepcopy(scheduler.state_dict()), rates_of(optimizer)
    optimizer, scheduler = make()
    rate = optimizer.param_groups[0]["lr"]
    scheduler.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rates_of(optimizer) == expected


def test_a_loaded_state_wins_and_says_so() -> None:
    optimizer = optimizer_of(0.5)
    scheduler = SlantedTriangularLR(optimizer, 20, ratio=7)
    take(optimizer, scheduler, 3)
    saved = copy.deepcopy(scheduler.state_dict())
    whole = take(optimizer, scheduler, 10)

    optimizer = optimizer_of(0.25)
    scheduler = SlantedTriangularLR(optimizer, 200, ratio=8)
    message = r"total_steps 20 instead of 200; ratio 7.0 instead of 8.0; base rates \[0.5\] instead of \[0.25\]"
    with pytest.warns(SmartWarning, match=message) as caught:
        scheduler.load_state_dict(saved)
    assert caught[0].filename == __file__
    assert take(optimizer, scheduler, 10) == whole


def test_an_equal_state_is_no_warning() -> None:
    scheduler = SlantedTriangularLR(optimizer_of(0.5), 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.load_state_dict(SlantedTriangularLR(optimizer_of(0.5), 20).state_dict())
    assert not caught


def test_loading_leaves_the_state_alone() -> None:
    optimizer = optimizer_of(0.5)
    saved = SlantedTriangularLR(optimizer, 20).state_dict()
    before = copy.deepcopy(saved)
    other = optimizer_of(0.5)
    scheduler = SlantedTriangularLR(other, 20)
    scheduler.load_state_dict(saved)
    take(other, scheduler, 3)
    assert saved == before


def test_a_state_of_something_else_is_refused_whole() -> None:
    optimizer = optimizer_of(0.5)
    scheduler = SlantedTriangularLR(optimizer, 20)
    before = scheduler.state_dict()
    foreign = LambdaLR(optimizer_of(0.5), lambda step: 0.1).state_dict()
    with pytest.raises(ValueError, match=r"SlantedTriangularLR, with the multiplier's .*; got \[None\]"):
        scheduler.load_state_dict(foreign)
    with pytest.raises(ValueError, match=r"the multiplier's settings under 'lr_lambdas'; got None"):
        scheduler.load_state_dict({})
    two_groups = SlantedTriangularLR(optimizer_of(0.5, 2.0), 20).state_dict()
    with pytest.raises(ValueError, match=r"of 1 parameter groups, as the optimizer has, got 2"):
        scheduler.load_state_dict(two_groups)
    assert scheduler.state_dict() == before


def test_last_epoch_starts_in_the_middle() -> None:
    optimizer = optimizer_of(0.5)
    scheduler = SlantedTriangularLR(optimizer, 20)
    take(optimizer, scheduler, 8)
    again = optimizer_of(0.5)
    again.param_groups[0]["initial_lr"] = 0.5
    SlantedTriangularLR(again, 20, last_epoch=7)
    assert rates_of(again) == rates_of(optimizer)


def test_numpy_numbers_become_plain_ones() -> None:
    optimizer = optimizer_of(0.5)
    scheduler = SlantedTriangularLR(optimizer, np.int64(20), cut_frac=np.float32(0.25))  # type: ignore[arg-type]  # as from len(array)
    multiplier = scheduler.state_dict()["lr_lambdas"][0]
    assert {name: type(value) for name, value in multiplier.items()} == {
        "total_steps": int,
        "cut_frac": float,
        "ratio": float,
        "peak_factor": float,
    }


def test_pickle_and_deepcopy_go_on_alike() -> None:
    optimizer = optimizer_of(0.5)
    scheduler = SlantedTriangularLR(optimizer, 20, ratio=5)
    take(optimizer, scheduler, 4)
    assert pickle.loads(pickle.dumps(scheduler.lr_lambdas[0])) == scheduler.lr_lambdas[0]
    copied_optimizer, copied = copy.deepcopy((optimizer, scheduler))
    for _ in range(5):
        copied.step()
        scheduler.step()
    assert rates_of(copied_optimizer) == rates_of(optimizer) == copied.get_last_lr()
