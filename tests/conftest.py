"""What the tests of several folders share."""

import pytest

from smartreg._ascent.looks import RepeatCheck

COUNT_PASSES = {
    "test_compile",
    "test_dropout",
    "test_errors",
    "test_gradient_start",
    "test_hook",
    "test_masks",
    "test_memory_limits",
    "test_output_mask",
    "test_passes",
    "test_reference",
    "test_smoothness_penalty",
    "test_stats",
    "test_warning",
}
"""Modules that record or number the passes of a first call, or spoil one of them on purpose: they are about the passes
of every call, without the one more that looks whether the first can be repeated (`smart/test_first_call.py`)."""


@pytest.fixture(autouse=True)
def _the_passes_of_every_call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in COUNT_PASSES:
        monkeypatch.setattr(RepeatCheck, "look", lambda *_: None)
