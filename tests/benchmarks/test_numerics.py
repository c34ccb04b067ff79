"""The pieces of the numerics study that can be wrong without a wrong table showing it."""

from pathlib import Path
from types import ModuleType

import numerics_models as models
import pytest
import torch

from smartreg import SmartLoss

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def accumulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _numerics import float32_accumulation

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


def test_every_fact_has_a_figure_and_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import numerics
    from _numerics import facts

    sizes = (1e-5, 1e-8)
    penalties = {"float64": 1e-9, "float64 of the float32 outputs": 1e-9, "smartreg": 1e-9, "smart-pytorch": 2e-8}
    swept = [
        {"epsilon": size, "precision": name, "penalty": size, "cosine": 0.5}
        for size in sizes
        for name in ("float64", *(precision.name for precision in facts.SWEEP))
    ]
    results = {
        "divergence": [{"epsilon": size, **penalties} for size in sizes],
        "divergence_new_head": [{"epsilon": size, **penalties} for size in sizes],
        "directions": [{"noise": 1e-4, "bfloat16 autocast": 0.1}],
        "dropout": [{"head": "fitted", "smartreg": 0.0, "smart-pytorch": 0.1, "penalty_at_paper": 1e-8, "ratio": 1e7}],
        "single_logit": facts.single_logit(),
        "perturbation": [
            {"epsilon": size, "smartreg": size, "smart-pytorch": 0.9, "mean_absolute_embedding": 0.04} for size in sizes
        ],
        "sweep": swept,
        "warned": [{"embeddings": 1.0, "precision": "bfloat16 autocast", "warned": 0.1, "measured": 0.1}],
    }
    tables = numerics.tabulated(results)
    numerics.write(tmp_path, results, tables)
    assert (tmp_path / "numerics.png").stat().st_size > 10_000
    text = (tmp_path / "numerics.md").read_text()
    assert all(f"### {title}" in text for title in numerics.TITLES.values())
    assert "| single logits 3 and -3 | 5.43 | 0 | 5.43 |" in text


def test_a_single_logit_has_no_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _numerics import facts

    for row in facts.single_logit():
        assert row["smartreg"] == pytest.approx(row["exact"], rel=1e-6)
        assert row["smart-pytorch"] == 0.0
        assert row["symmetric_kl"] == "ValueError"


def test_a_folder_without_sentences_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import numerics

    with pytest.raises(SystemExit, match="2"):
        numerics.main(["--data-dir", str(tmp_path)])
    assert "no ids-sst-train.csv in it" in capsys.readouterr().err
