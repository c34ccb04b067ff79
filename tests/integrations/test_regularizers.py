"""What the integrations share: one run's two regularizers, and the model that they follow."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from trainer_tools import CASES, LAMBDA, MU

from smartreg.integrations._regularizers import Regularizers, Strength

OPTIONS: Mapping[str, Any] = {"divergence": "mse"}


def test_a_wrapper_that_changes_in_a_run_keeps_the_teacher() -> None:
    """As where a framework hands over the model compiled after a first step without."""
    model = CASES["one label"].model()
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    both = Regularizers(Strength(LAMBDA, MU), {}, {})
    both.follow(compiled, OPTIONS, total_steps=lambda: 10)
    search, teacher = both.smart, both.bregman
    assert search is not None
    assert search.model is compiled
    both.follow(compiled, OPTIONS, total_steps=lambda: 10)
    assert both.smart is search
    both.follow(model, OPTIONS, total_steps=lambda: 10)
    assert both.bregman is teacher
    assert both.smart is not None
    assert both.smart.model is model


def test_another_model_in_a_run_is_an_error() -> None:
    both = Regularizers(Strength(LAMBDA, MU), {}, {})
    both.follow(CASES["one label"].model(), OPTIONS, total_steps=lambda: 10)
    with pytest.raises(RuntimeError, match=r"one run regularizes one model, got Bert\w+ after Bert"):
        both.follow(torch.compile(CASES["one label"].model(), backend="eager"), OPTIONS, total_steps=lambda: 10)  # type: ignore[arg-type]
