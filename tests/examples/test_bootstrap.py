"""The intervals of the comparison, against a closed form and against simulated truth."""

import numpy as np
import pytest
from scipy import stats

from minbert.study.bootstrap import difference, holm


def simulated(draw: np.random.Generator, seeds: int, rows: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Two arms that differ by `gap` in truth, with noise of seeds, of rows and of both, shared and not."""
    shared = draw.normal(size=(seeds, 1)) + draw.normal(size=(1, rows))
    noise = 0.1 * draw.normal(size=(seeds, 1)) + draw.normal(size=(1, rows)) + 0.5 * draw.normal(size=(seeds, rows))
    return shared + noise + gap, shared


def test_one_row_is_the_paired_t_test() -> None:
    draw = np.random.default_rng(0)
    own, other = draw.normal(0.3, 1, (8, 1)), draw.normal(0, 1, (8, 1))
    found = difference(own, other, resamples=200_000)
    expected = stats.ttest_rel(own[:, 0], other[:, 0])
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.01)
    assert found.p == pytest.approx(expected.pvalue, abs=0.005)


def test_equal_seeds_leave_the_interval_of_rows() -> None:
    draw = np.random.default_rng(1)
    gaps = np.repeat(draw.normal(0.1, 1, (1, 2000)), 6, axis=0)  # every seed shows the same
    found = difference(gaps, np.zeros_like(gaps))
    half = 1.96 * gaps[0].std() / 2000**0.5
    assert found.mean - found.low == pytest.approx(half, rel=0.05)


def test_coverage() -> None:
    """The truth is in 95 of 100 intervals: 300 simulated comparisons of 5 seeds (standard error of the count: 1.3 %).

    The crossed bootstrap counts the noise of seed and row together more than once, so that it may cover more.
    """
    draw = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        own, other = simulated(draw, 5, 60, 0.2)
        found = difference(own, other, resamples=300)
        hits += found.low <= 0.2 <= found.high
    assert 0.92 <= hits / 300 <= 0.99


def test_pairing_takes_what_arms_share_out() -> None:
    draw = np.random.default_rng(3)
    own, other = simulated(draw, 6, 300, 0.2)
    paired = difference(own, other)
    mixed = difference(own, other[::-1, draw.permutation(300)])
    assert paired.high - paired.low < 0.8 * (mixed.high - mixed.low)
    same = difference(own, own)
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((3, 4), (3, 5)), r"expected one shape \(seeds, rows\), got \(3, 4\)"), (((1, 4), (1, 4)), "got 1; one seed")],
)
def test_what_cannot_be_compared(shapes: tuple[tuple[int, ...], tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        difference(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_holm_rejects_step_by_step() -> None:
    # Worked by hand: 4 × 0.005, 3 × 0.01, then 2 × 0.03 and 1 × 0.04, which may not fall below 0.06.
    assert holm({"d": 0.005, "c": 0.01, "b": 0.03, "a": 0.04}) == pytest.approx(
        {"d": 0.02, "c": 0.03, "b": 0.06, "a": 0.06}
    )
