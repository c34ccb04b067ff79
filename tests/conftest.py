"""What the tests of several folders share."""

import pytest

from smartreg import MomentumBregman
from smartreg._ascent.looks import RepeatCheck

COUNT_PASSES = {
    *("integrations/test_compile", "integrations/test_smart_trainer", "integrations/test_smart_trl"),
    *("numerics/test_warning", "smart/test_draws", "smart/test_dropout", "smart/test_errors"),
    *("smart/test_gradient_start", "smart/test_hook", "smart/test_masks"),
    *("smart/test_memory_efficient", "smart/test_memory_limits"),
    *("smart/test_passes", "smart/test_properties", "smart/test_reference", "smart/test_smoothness_penalty"),
    *("smart/test_state", "smart/test_stats", "teacher/test_bregman", "teacher/test_follows"),
}
"""Modules that record or number the passes of a first call, or spoil one of them on purpose: they are about the passes
of every call, without those that look whether the first can be repeated (`smart/test_first_call.py`) and whether the
model answers in eval mode as in train mode (`teacher/test_silent.py`)."""


@pytest.fixture(autouse=True)
def _the_passes_of_every_call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if f"{request.path.parent.name}/{request.path.stem}" in COUNT_PASSES:
        monkeypatch.setattr(RepeatCheck, "look", lambda *_: None)
        monkeypatch.setattr(MomentumBregman, "_look_at_modes", lambda *_: None)
