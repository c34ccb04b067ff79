"""The pieces of the numerics study that can be wrong without a wrong table showing it."""

from pathlib import Path
from types import ModuleType

import numerics_models as models
import pytest
import torch

from smartreg import SmartLoss

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def accumulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import float32_accumulation

    return float32_accumulation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_products_are_those_of_the_slow_kernels(accumulation: ModuleType, dtype: torch.dtype) -> None:
    """Both sum in float32 and round once: equal but for the order of the sums."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 64, generator=generator).to(dtype)
    layer = torch.nn.Linear(64, 8).to(dtype)
    slow = layer(a)
    with accumulation.Float32Accumulation():
        fast = layer(a)
    assert fast.dtype is dtype
    eps = torch.finfo(dtype).eps
    assert torch.all((fast.double() - slow.double()).abs() <= eps * slow.double().abs().clamp_min(0.1))
    assert not torch.equal(fast.double(), a.double() @ layer.weight.double().T + layer.bias.double())


def test_fast_products_leave_the_penalty_as_it_is(accumulation: ModuleType) -> None:
    """Also in the backward, and under autocast."""
    model, ids = models.build(), models.sentences()
    noise = 0.3 * torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(1))
    values = []
    for mode in (accumulation.Float32Accumulation, torch.enable_grad):
        smart = SmartLoss(model, epsilon=0.3, step_size=0.3, noise_std=0.3)
        with mode(), torch.autocast("cpu", torch.bfloat16):
            values.append(smart(lambda m: m(ids), noise=noise).penalty.item())
    assert values[0] == pytest.approx(values[1], rel=0.1)


def test_a_folder_without_sentences_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import numerics

    with pytest.raises(SystemExit, match="2"):
        numerics.main(["--data-dir", str(tmp_path)])
    assert "no ids-sst-train.csv in it" in capsys.readouterr().err
