"""The slanted triangle: its formula and its edges."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_tools import optimizer_of, rates_of, take
from torch.optim.lr_scheduler import LambdaLR

from smartreg.schedule import SlantedTriangle, SlantedTriangularLR

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


@pytest.mark.parametrize("total", [90, 100, 180, 1000, 10**7])
def test_the_cut_is_that_of_exact_arithmetic(total: int) -> None:
    """0.29 of 100 steps are 29, and not the floor of 28.999999999999996."""
    for percent in range(101):
        assert SlantedTriangle(total, percent / 100).cut == total * percent // 100, percent


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
        ({"peak_factor": math.inf}, ValueError, "peak_factor must be positive and finite, got inf"),
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
