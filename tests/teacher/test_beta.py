"""The momentum β: constants, functions of the update, and the paper's."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_models import Net, shift
from torch import nn

from smartreg.bregman import MomentumBregman, paper_beta, suggested_beta


def test_beta_may_be_a_function_of_the_update() -> None:
    asked: list[int] = []
    model = nn.Linear(1, 1, bias=False)
    bregman = MomentumBregman(model, beta=lambda update: (asked.append(update), 0.5)[1])
    nn.init.zeros_(model.weight)
    start = bregman.teacher.weight.item()
    for _ in range(3):
        bregman.update()
    assert asked == [0, 1, 2]
    assert bregman.teacher.weight.item() == pytest.approx(start / 8)


@pytest.mark.parametrize(
    ("beta", "error"),
    [(1.0, ValueError), (-0.1, ValueError), (math.nan, ValueError), (2, ValueError), ("0.9", TypeError),
     (None, TypeError), (True, TypeError)],
)  # fmt: skip
def test_beta_out_of_range(beta: Any, error: type[Exception]) -> None:
    message = r"beta must be in \[0, 1\), got .*; with 1 the teacher would never move"
    if error is TypeError:
        message = r"beta must be a number in \[0, 1\), or a function that returns one, got "
    model = Net()
    with pytest.raises(error, match=message):
        MomentumBregman(model, beta=beta)
    bregman = MomentumBregman(model, beta=lambda update: beta)
    start = bregman.teacher.head.weight.detach().clone()
    shift(model)
    with pytest.raises(error, match=message):
        bregman.update()
    assert bregman.updates == 0
    assert torch.equal(bregman.teacher.head.weight, start)


def test_beta_accepts_other_numbers() -> None:
    for beta in (0, np.float64(0.5), np.float32(0.5)):
        MomentumBregman(Net(), beta=beta).update()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(total_steps=st.integers(1, 500))
def test_paper_beta(total_steps: int) -> None:
    beta = pickle.loads(pickle.dumps(paper_beta(total_steps)))
    for update in range(total_steps + 2):
        assert beta(update) == reference.paper_beta(update, total_steps)


def test_paper_beta_switches_at_the_tenth_exactly() -> None:
    for total_steps in (10, 30, 70, 1000, 5370):
        beta = paper_beta(total_steps)
        assert (beta(total_steps // 10 - 1), beta(total_steps // 10)) == (0.99, 0.999)
    model = nn.Linear(2, 2)
    bregman = MomentumBregman(model, beta=paper_beta(20))
    start = model.weight.detach().clone().double()
    nn.init.zeros_(model.weight)
    for _ in range(4):
        bregman.update()
    torch.testing.assert_close(bregman.teacher.weight.detach().double(), start * 0.99**2 * 0.999**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("total_steps", [1, 10, 11, 80, 4000])
def test_suggested_beta_halves_the_average_in_a_tenth_of_the_run(total_steps: int) -> None:
    model = Net()
    bregman = MomentumBregman(model, beta=suggested_beta(total_steps))
    start = bregman.teacher.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.zero_()
    half_life = max(1, total_steps // 10)
    for _ in range(half_life):
        bregman.update()
    share = 0.5 ** (half_life / max(1.0, total_steps / 10))
    torch.testing.assert_close(bregman.teacher.head.weight.detach(), share * start, rtol=1e-4, atol=0)


def test_suggested_beta_takes_another_half_life_and_no_other_thing() -> None:
    assert suggested_beta(100, 0.5) == pytest.approx(0.5 ** (1 / 50))
    assert suggested_beta(100, 1) == pytest.approx(0.5 ** (1 / 100))
    for wrong in (0, 10, float("nan")):
        with pytest.raises(ValueError, match=r"half_life must be in \(0, 1\], a share of the run"):
            suggested_beta(100, wrong)
    for kind in ("a", True, None):
        with pytest.raises(TypeError, match="half_life must be a number in"):
            suggested_beta(100, kind)


@pytest.mark.parametrize(
    ("total_steps", "error"), [(0, ValueError), (-1, ValueError), (10.0, TypeError), (True, TypeError)]
)
def test_a_beta_by_the_length_refuses(total_steps: Any, error: type[Exception]) -> None:
    for beta in (paper_beta, suggested_beta):
        with pytest.raises(error, match="total_steps must be"):
            beta(total_steps)
