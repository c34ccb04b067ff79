"""What the tests of several folders share."""

import pytest

from smartreg import MomentumBregman
from smartreg._ascent.looks import RepeatCheck

COUNT_PASSES = {
    "test_bregman",
    "test_compile",
    "test_draws",
    "test_dropout",
    "test_errors",
    "test_follows",
    "test_gradient_start",
    "test_hook",
    "test_masks",
    "test_memory_efficient",
    "test_memory_limits",
    "test_output_mask",
    "test_passes",
    "test_properties",
    "test_reference",
    "test_smart_trainer",
    "test_smart_trl",
    "test_smoothness_penalty",
    "test_state",
    "test_stats",
    "test_warning",
}
"""Modules that record or number the passes of a first call, or spoil one of them on purpose: they are about the passes
of every call, without those that look whether the first can be repeated (`smart/test_first_call.py`) and whether the
model answers in eval mode as in train mode (`teacher/test_silent.py`)."""


@pytest.fixture(autouse=True)
def _the_passes_of_every_call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in COUNT_PASSES:
        monkeypatch.setattr(RepeatCheck, "look", lambda *_: None)
        monkeypatch.setattr(MomentumBregman, "_look_at_modes", lambda *_: None)
