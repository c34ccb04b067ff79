"""What the tests of several trainers share."""

import pytest
from trainer_tools import row_noise

from smartreg import SmartLoss


@pytest.fixture
def row_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search starts where the row alone says."""
    forward = SmartLoss.forward
    monkeypatch.setattr(SmartLoss, "forward", lambda self, *a, **k: forward(self, *a, **{"noise": row_noise, **k}))
