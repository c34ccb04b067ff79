"""The geometry of one look-up by itself: the unit of the noise, and who counts in the share of the radius."""

from typing import Any

import pytest
import torch
from torch import Tensor

from smartreg._ascent.ball import Ball
from smartreg._ascent.settings import SmartSettings


def ball(embeddings: Tensor, mask: Tensor | None = None, **changed: Any) -> Ball:
    options: dict[str, Any] = {
        "epsilon": 0.15,
        "step_size": 0.15,
        "noise_std": 0.5,
        "steps": 1,
        "norm": "2",
        "norm_over": "example",
    }
    options |= {"epsilon_scale": "rms", "ascent": "steepest", "start": "noise", "dropout": "shared"}
    options |= {"detach_reference": True, "ascent_autocast": True} | changed
    return Ball.around(embeddings, mask, SmartSettings.checked(**options))


EMBEDDINGS = torch.tensor([[[3.0, 4.0], [4.0, 3.0]], [[30.0, 40.0], [7.0, 7.0]]])
MASK = torch.tensor([[True, True], [True, False]])
RMS = torch.tensor([12.5, 1250.0]).sqrt().view(2, 1, 1)  # of the real entries: (9 + 16 + 16 + 9) / 4, (900 + 1600) / 2


@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("std", [0.5, 1.0])
def test_noise_is_in_root_mean_squares_of_its_example(norm: str, std: float) -> None:
    drawn = ball(EMBEDDINGS, MASK, norm=norm, noise_std=std).noise(torch.Generator().manual_seed(3))
    normal = torch.randn(EMBEDDINGS.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, std * RMS * normal * MASK.unsqueeze(-1))


def test_absolute_noise_has_its_size() -> None:
    drawn = ball(EMBEDDINGS, epsilon_scale="absolute").noise(torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, 0.5 * torch.randn(EMBEDDINGS.shape, generator=torch.Generator().manual_seed(3)))


def test_no_noise_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert not ball(EMBEDDINGS, noise_std=0.0).noise(generator).any()
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_an_example_without_a_radius_has_no_share(norm: str) -> None:
    """All zeros, or all padding: nothing to perturb, and the mean is that of the others."""
    embeddings = torch.cat([EMBEDDINGS, torch.zeros(1, 2, 2), EMBEDDINGS[:1]])
    mask = torch.cat([MASK, torch.tensor([[True, True], [False, False]])])
    around = ball(embeddings, mask, norm=norm)
    far = around.project(around.hide_padding(torch.full_like(embeddings, 1e6)))
    shares, count = around.share_of_radius(far)
    assert (shares.item(), count.item()) == (pytest.approx(2.0), 2)
    assert around.empty().tolist() == [False, False, False, True]
