"""Every divergence by name, `symmetric_kl` in both of its ways."""

import pytest
from divergence_cases import ALL, BLOCKS

from smartreg._divergences import blockwise, positions


@pytest.fixture(params=[*ALL, BLOCKS])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a divergence; `symmetric_kl` a second time in blocks so small that every test has several."""
    if request.param == BLOCKS:
        monkeypatch.setattr(positions, "_BLOCKWISE_FROM", 1)
        monkeypatch.setattr(blockwise, "_block_elements", lambda device: 10)
        return "symmetric_kl"
    return request.param
