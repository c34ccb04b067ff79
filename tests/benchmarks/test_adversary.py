"""The adversary study: its maximum where that is known, its rules in the ball, and its tables."""

import ast
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smartreg import SmartLoss

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SHAPE = (3, 4, 5)  # examples, tokens, features


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _adversary import reference

    return reference


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _adversary import tables

    return tables


def ball(reference: ModuleType, norm: str, over: str, epsilon: float = 0.3) -> Any:
    embeddings = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    return reference.Ball.around(embeddings, mask, norm=norm, over=over, epsilon=epsilon)


BALLS = [("inf", "example"), ("inf", "token"), ("2", "example"), ("2", "token")]


@pytest.mark.parametrize(("norm", "over"), BALLS)
def test_the_maximum_of_a_linear_function_is_that_of_the_dual_norm(reference: ModuleType, norm: str, over: str) -> None:
    """(w·δ)² is largest at ε²‖w‖₁² for norm ∞, (ε‖w‖₂)² for 2, (ε Σ_tokens ‖w_t‖₂)² for 2 over tokens."""
    around = ball(reference, norm, over)
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * around.mask
    radius = around.radius.flatten(1)[:, 0].double()
    wide = w.double()
    if norm == "inf":
        dual = wide.abs().sum((1, 2))
    elif over == "example":
        dual = wide.square().sum((1, 2)).sqrt()
    else:
        dual = wide.square().sum(2).sqrt().sum(1)
    found = reference.maximum(lambda d: (d[0] * w).sum((1, 2))[:, None], [around], "mse", seed=0, steps=3, restarts=3)
    torch.testing.assert_close(found, (radius * dual).square(), rtol=1e-5, atol=0.0)


def test_the_maximum_of_a_quadratic_form_is_its_largest_singular_value(reference: ModuleType) -> None:
    """‖W δ‖² in the 2-ball: ε² σ_max(W)²; the ascent is then a power iteration."""
    around = ball(reference, "2", "example")
    weights = torch.randn(SHAPE[0], 2, SHAPE[1] * SHAPE[2], generator=torch.Generator().manual_seed(3))
    weights = weights * around.mask.expand(SHAPE).flatten(1)[:, None, :]
    found = reference.maximum(
        lambda d: torch.einsum("bok,bk->bo", weights, d[0].flatten(1)), [around], "mse", seed=0, steps=40, restarts=3
    )
    largest = torch.linalg.matrix_norm(weights.double(), 2)
    torch.testing.assert_close(found, (around.radius.flatten().double() * largest).square(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("norm", "over"), BALLS)
def test_the_search_stays_in_the_ball_and_off_the_padding(reference: ModuleType, norm: str, over: str) -> None:
    around = ball(reference, norm, over)
    seen: list[Tensor] = []

    def run(deltas: list[Tensor]) -> Tensor:
        seen.append(deltas[0].detach())
        return torch.stack([deltas[0].sum((1, 2)), deltas[0].square().sum((1, 2)).sin()], dim=-1)

    reference.maximum(run, [around], "symmetric_kl", seed=0, steps=5, restarts=3)
    assert len(seen) > 15
    for delta in seen:
        assert torch.all(around.length(delta) <= around.radius * (1 + 1e-5))
        assert torch.all(delta[~around.mask.expand(SHAPE)] == 0)


def test_no_single_restart_beats_the_maximum_of_all(reference: ModuleType) -> None:
    around = ball(reference, "inf", "example", 1.0)
    w = torch.randn(*SHAPE, 4, generator=torch.Generator().manual_seed(4))

    def run(deltas: list[Tensor]) -> Tensor:
        return torch.einsum("btf,btfc->bc", deltas[0], w).sin() * 3

    few, many = (reference.maximum(run, [around], "symmetric_kl", seed=0, steps=20, restarts=count) for count in (1, 6))
    with torch.no_grad():
        clean = run([torch.zeros(SHAPE)])
        random = reference.divergence("symmetric_kl", run([around.noise(torch.Generator().manual_seed(5))]), clean)
    assert torch.all(many >= few)
    assert torch.all(few > random)


@pytest.mark.parametrize(
    ("kind", "moved", "clean", "expected"),
    [
        # (p - q)(log p - log q) over two classes with log-odds 2 and 0: 2 (sigma(2) - 1/2) = 0.761594...
        ("symmetric_kl", [2.0, 0.0], [0.0, 0.0], 0.7615941559557649),
        ("binary_symmetric_kl", [2.0], [0.0], 0.7615941559557649),
        ("mse", [2.0], [0.5], 2.25),
    ],
)
def test_divergences(reference: ModuleType, kind: str, moved: list[float], clean: list[float], expected: float) -> None:
    found = reference.divergence(kind, torch.tensor([moved]), torch.tensor([clean]))
    assert found.dtype is torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-7)


def test_an_unknown_divergence_is_refused(reference: ModuleType) -> None:
    with pytest.raises(ValueError, match="no divergence 'kl'"):
        reference.divergence("kl", torch.zeros(1, 2), torch.zeros(1, 2))


def test_the_reference_imports_torch_alone() -> None:
    """It must not share an error with what it judges."""
    tree = ast.parse((BENCHMARKS / "_adversary" / "reference.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))


class Encoder(nn.Module):
    """What the study needs of a BERT, small enough to try every rule on."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8)
        self.words, self.mix, self.dropout = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Dropout(0.1)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.dropout(self.mix(inputs_embeds).tanh()))


@pytest.fixture
def make_case(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _adversary.case import Case
    from _adversary.subject import TASKS, Batch, Model

    def make(task: str, *, train: bool) -> Any:
        torch.manual_seed(0)
        count = len(TASKS[task].columns)
        model = Model(Encoder(), TASKS[task].outputs, count)
        nn.init.normal_(model.head.weight, std=0.5)
        ids = torch.randint(20, (count, 4, 5))
        masks = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
        return Case(model, Batch(tuple(ids), (masks,) * count, torch.zeros(4)), task, train=train)

    return make


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize(("task", "train"), [("sentiment", True), ("paraphrase", False), ("similarity", True)])
def test_no_rule_beats_the_maximum(make_case: Callable[..., Any], task: str, train: bool, norm: str) -> None:
    from _adversary import cells

    case = make_case(task, train=train)
    found = cells.measure(case, cells.Cell(task, "end", "", norm, "example", 0.3, main=True), seed=0)
    names = {row["rule"] for row in found["rules"]}
    assert {"Algorithm 1, σ = ε", "gradient start"} <= names
    assert ("start towards uniform" in names) == (task != "similarity")
    assert ("VAT's power iteration" in names) == (norm == "2")
    for row in found["rules"]:
        for value, best in zip(row["reached"], found["maximum"], strict=True):
            assert 0 <= value <= best * 1.001, (row["rule"], row["steps"])


@pytest.mark.parametrize("task", ["sentiment", "paraphrase", "similarity"])
def test_a_rule_reaches_what_the_library_returns(make_case: Callable[..., Any], task: str) -> None:
    """In train mode too: the reference's dropout masks are those of the library's clean pass."""
    from _adversary.case import DROPOUT_SEED
    from _adversary.rules import RULES

    case = make_case(task, train=True)
    rule = next(rule for rule in RULES if rule.name == "gradient start")
    reached = case.reached(rule, "2", "example", 0.3, 1, seed=5)
    smart = SmartLoss(
        case.model,
        divergence=case.kind,
        norm="2",
        generator=torch.Generator().manual_seed(5),
        **rule.settings(0.3, 1),
    )
    torch.manual_seed(DROPOUT_SEED)
    penalty = smart(lambda m: m(case.batch), mask=case.batch.masks).penalty
    assert reached.mean().item() == pytest.approx(penalty.item(), rel=1e-4)


def test_shares(tables: ModuleType) -> None:
    assert tables.share([1.0, 1.0], [2.0, 4.0]) == pytest.approx(0.375)  # (1/2 + 1/4) / 2
    assert tables.share_of_means([1.0, 1.0], [2.0, 4.0]) == pytest.approx(1 / 3)


def test_tables_are_made_from_the_results_alone(tables: ModuleType) -> None:
    from _adversary.cells import CELLS

    rules = [
        {"rule": "gradient start", "steps": 0, "cost": 2.33, "reached": [1.0, 1.0]},
        {"rule": "MT-DNN's rule", "steps": 1, "cost": 2.67, "reached": [0.0, 0.2]},
    ]
    found = {"maximum": [2.0, 4.0], "rules": rules, "check": {"maximum": [2.0, 4.03]}}
    text = tables.markdown({"cells": {CELLS[0].key: found}})
    assert "### Sentiment, fitted, eval mode, norm ∞ over the example, ε = 0.15" in text
    assert "| gradient start | 0 | 2.33 | 0.375 | 0.333 |" in text
    assert f"| {tables.title(CELLS[0])} | 3 |  |  |  | 0.375 |  |  |  |  |" in text
    assert f"| {tables.title(CELLS[0])} | 0.0250 |  |  |" in text
    assert f"| {CELLS[0].key} | 3 | 3.015 | +0.50% |" in text


def test_the_command_measures_resumes_and_refuses_other_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import adversary
    from _adversary.cells import CELLS

    command = ["--quick", "--output-dir", str(tmp_path)]
    assert adversary.main(command) == 0
    results = json.loads((tmp_path / "adversary.json").read_text())
    assert set(results["cells"]) == {CELLS[9].key, CELLS[12].key}
    sentiment = results["cells"][CELLS[12].key]
    rules = {(row["rule"], row["steps"]): row for row in sentiment["rules"]}
    assert {"smart-pytorch", "MT-DNN's rule", "VAT's power iteration"} <= {name for name, _ in rules}
    assert all(len(row["reached"]) == len(sentiment["maximum"]) == 2 for row in rules.values())
    assert rules["start towards uniform", 0]["cost"] == 2.33
    text = (tmp_path / "adversary.md").read_text()
    ratio = sum(map(operator.truediv, rules["gradient start", 0]["reached"], sentiment["maximum"])) / 2
    assert f"| {ratio:.3f} |" in next(line for line in text.splitlines() if "norm 2" in line)
    assert (tmp_path / "adversary.png").stat().st_size > 10_000

    # A second run has nothing to measure; one that lacks a cell measures that cell alone.
    del results["cells"][CELLS[9].key]
    (tmp_path / "adversary.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert adversary.main(command) == 0
    said = capsys.readouterr().out
    assert f"[1/2] {CELLS[9].key}" in said
    assert "[2/2]" not in said
    with pytest.raises(SystemExit, match="2"):
        adversary.main([*command[1:], "--examples", "3"])
    assert "holds results of other options" in capsys.readouterr().err


def test_a_folder_without_data_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import adversary

    with pytest.raises(SystemExit, match="2"):
        adversary.main(["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)])
    assert "no ids-sst-train.csv in it" in capsys.readouterr().err
