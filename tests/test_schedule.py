"""The slanted triangle: its formula, its edges, and a schedule that is saved and resumed."""

import copy
import io
import math
import pickle
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR

from smartreg.errors import SmartWarning
from smartreg.schedule import SlantedTriangle, SlantedTriangularLR


def optimizer_of(*rates: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates], lr=1.0, **options)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def take(optimizer: torch.optim.Optimizer, scheduler: SlantedTriangularLR, steps: int) -> list[list[float]]:
    """The rates that `steps` optimizer steps ran at."""
    rates = []
    for _ in range(steps):
        rates.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    return rates


properties = settings(derandomize=True, deadline=None, max_examples=60)
triangles = st.builds(
    SlantedTriangle,
    total_steps=st.integers(1, 300),
    cut_frac=st.floats(0, 1),
    ratio=st.floats(1, 100),
    peak_factor=st.floats(0.01, 10),
)


@properties
@given(triangles)
def test_equals_the_reference(triangle: SlantedTriangle) -> None:
    settings = (triangle.total_steps, triangle.cut_frac, triangle.ratio, triangle.peak_factor)
    for step in range(triangle.total_steps + 3):
        assert triangle(step) == pytest.approx(reference.slanted_triangle(step, *settings), rel=1e-12)


@properties
@given(triangles)
def test_rises_to_the_peak_then_falls_and_stays_in_range(triangle: SlantedTriangle) -> None:
    factors = [triangle(step) for step in range(triangle.total_steps + 1)]
    low, high = triangle.peak_factor / triangle.ratio, triangle.peak_factor
    assert factors[triangle.cut] == pytest.approx(high)
    assert max(factors) <= high * (1 + 1e-12)
    assert min(factors) >= low * (1 - 1e-12)
    slack = 1e-12 * high
    assert all(later >= sooner - slack for sooner, later in pairwise(factors[: triangle.cut + 1]))
    assert all(later <= sooner + slack for sooner, later in pairwise(factors[triangle.cut :]))
    assert triangle(triangle.total_steps + 1) == triangle(3 * triangle.total_steps) == 0.0


@properties
@given(
    whole=st.sampled_from([(100, 0.1), (1000, 0.1), (40, 0.25), (64, 0.125), (50, 0.5), (2000, 0.2)]),
    ratio=st.floats(1, 100),
)
def test_is_howard_and_ruder_wherever_the_cut_is_an_integer(whole: tuple[int, float], ratio: float) -> None:
    total_steps, cut_frac = whole
    assert (total_steps * cut_frac).is_integer()
    triangle = SlantedTriangle(total_steps, cut_frac, ratio)
    for step in range(total_steps + 1):
        theirs = reference.howard_ruder(step, total_steps, cut_frac, ratio)
        assert triangle(step) == pytest.approx(theirs, rel=1e-9)


def test_howard_and_ruder_undershoot_elsewhere() -> None:
    triangle = SlantedTriangle(19, 0.1, 32.0)
    assert reference.howard_ruder(19, 19, 0.1, 32.0) < 0 < triangle(19) == pytest.approx(1 / 32)


def test_the_variant_of_the_report() -> None:
    triangle = SlantedTriangle(1000, cut_frac=0.25, ratio=3, peak_factor=3)
    assert [triangle(step) for step in (0, 125, 250, 625, 1000, 1001)] == pytest.approx([1, 2, 3, 2, 1, 0])


def test_edges() -> None:
    no_rise = SlantedTriangle(4, cut_frac=0.0, ratio=2)
    assert [no_rise(step) for step in range(6)] == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0])
    rounds_to_no_rise = SlantedTriangle(9, cut_frac=0.1, ratio=2)
    assert rounds_to_no_rise.cut == 0
    assert rounds_to_no_rise(0) == 1.0
    no_fall = SlantedTriangle(4, cut_frac=1.0, ratio=2)
    assert [no_fall(step) for step in range(6)] == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0, 0])
    single = SlantedTriangle(1)
    assert [single(step) for step in range(3)] == pytest.approx([1, 1 / 32, 0])


def test_defaults_and_base_rates_of_groups() -> None:
    optimizer = optimizer_of(0.5, 2.0)
    scheduler = SlantedTriangularLR(optimizer, 20)
    assert isinstance(scheduler, LambdaLR)
    rates = np.array(take(optimizer, scheduler, 22))
    factors = [reference.slanted_triangle(step, 20, 0.1, 32.0, 1.0) for step in range(22)]
    np.testing.assert_allclose(rates, np.outer(factors, [0.5, 2.0]), rtol=1e-12)
    assert scheduler.base_lrs == [0.5, 2.0]


def test_settings_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        SlantedTriangularLR(optimizer_of(0.1), 10, 0.2)  # type: ignore[misc]  # the misuse under test


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be 1 or more, got 0"),
        ({"total_steps": -3}, ValueError, "total_steps must be 1 or more, got -3"),
        ({"total_steps": 10.0}, TypeError, "total_steps must be an int, got 10.0"),
        ({"total_steps": True}, TypeError, "total_steps must be an int, got True"),
        ({"cut_frac": -0.1}, ValueError, r"cut_frac must be in \[0, 1\].* got -0.1"),
        ({"cut_frac": 1.1}, ValueError, r"cut_frac must be in \[0, 1\].* got 1.1"),
        ({"cut_frac": math.nan}, ValueError, r"cut_frac must be in \[0, 1\].* got nan"),
        ({"cut_frac": "0.1"}, TypeError, "cut_frac must be a number, got '0.1'"),
        ({"ratio": 0.5}, ValueError, "ratio must be 1 or more.* got 0.5"),
        ({"ratio": math.inf}, ValueError, "ratio must be 1 or more.* got inf"),
        ({"ratio": None}, TypeError, "ratio must be a number, got None"),
        ({"peak_factor": 0}, ValueError, "peak_factor must be positive and finite, got 0"),
        ({"peak_factor": math.nan}, ValueError, "peak_factor must be positive and finite, got nan"),
        ({"peak_factor": True}, TypeError, "peak_factor must be a number, got True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = optimizer_of(0.5)
    total_steps = options.pop("total_steps", 10)
    with pytest.raises(error, match=message):
        SlantedTriangularLR(optimizer, total_steps, **options)
    assert rates_of(optimizer) == [0.5]


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
    with pytest.raises(ValueError, match=r"state of a SlantedTriangularLR.*got \[None\]"):
        scheduler.load_state_dict(foreign)
    with pytest.raises(ValueError, match=r"state of a SlantedTriangularLR.*got None"):
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
