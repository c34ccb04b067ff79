"""Metrics by row, calibration, and how rows are kept in a record."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from example_tools import SAMPLE, tiny_encoder

from minbert.batching import SentenceTokenizer, tokenize
from minbert.model import build_model, encoder_config
from minbert.settings import resolve
from minbert.study.measure import calibration_error, contributions, fitted_scale, nll_rows
from minbert.study.record import packed, unpacked
from minbert.study.split import parts
from minbert.study.zero_shot import best_threshold, measure
from minbert.tasks import TASKS, score


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
def test_the_mean_over_rows_is_the_metric(name: str) -> None:
    torch.manual_seed(0)
    task = TASKS[name]
    outputs = torch.randn(200, task.outputs).squeeze(-1) if task.outputs == 1 else torch.randn(200, task.outputs)
    labels = torch.randint(0, int(task.high) + 1, (200,)).float()
    rows, expected = contributions(task, outputs, labels), score(task, outputs, labels)
    assert rows[task.metric].mean() == pytest.approx(expected[task.metric], abs=1e-12)
    if task.kind != "score":
        assert rows["nll"].mean() == pytest.approx(expected["nll"], abs=1e-12)


def test_the_rows_of_a_correlation_spread_as_its_resamples_do() -> None:
    torch.manual_seed(1)
    labels = torch.rand(400) * 5
    outputs = (labels + torch.randn(400)).clamp(0, 5)
    rows = contributions(TASKS["sts"], outputs, labels)["pearson"]
    draw = np.random.default_rng(0)
    picks = draw.integers(400, size=(2000, 400))
    resampled = [np.corrcoef(outputs.numpy()[pick], labels.numpy()[pick])[0, 1] for pick in picks]
    assert rows.std() / 400**0.5 == pytest.approx(np.std(resampled), rel=0.06)


def test_a_constant_score_correlates_with_nothing() -> None:
    assert contributions(TASKS["sts"], torch.full((5,), 2.0), torch.arange(5.0))["pearson"].tolist() == [0.0] * 5


def test_the_temperature_that_was_put_in_is_found() -> None:
    torch.manual_seed(2)
    logits = 2 * torch.randn(20_000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample().float()
    # Logits three times too sharp; sampling error of the fit is about a percent at 20,000 rows.
    assert fitted_scale(TASKS["sst"], 3 * logits, labels) == pytest.approx(3.0, rel=0.03)
    assert calibration_error(TASKS["sst"], 3 * logits, labels, 3.0) < 0.02
    assert calibration_error(TASKS["sst"], 3 * logits, labels) > 0.1


def test_the_spread_of_scores() -> None:
    outputs, labels = torch.tensor([1.0, 3.0]), torch.tensor([1.5, 2.5])
    assert fitted_scale(TASKS["sts"], outputs, labels) == pytest.approx(0.5)
    expected = 0.5 * math.log(2 * math.pi) + math.log(0.5) + 0.5
    assert nll_rows(TASKS["sts"], outputs, labels, 0.5) == pytest.approx([expected, expected])
    assert calibration_error(TASKS["sts"], outputs, labels) is None


def test_calibration_by_hand() -> None:
    # Two rows at confidence 0.8, one right: |0.5 − 0.8|; one at 0.6, right: |1 − 0.6|; weighed 2/3 and 1/3.
    outputs = torch.tensor([math.log(4), math.log(4), math.log(1.5)])
    error = calibration_error(TASKS["para"], outputs, torch.tensor([1.0, 0.0, 1.0]))
    assert error == pytest.approx((2 * 0.3 + 0.4) / 3)


def test_rows_survive_in_a_byte_each() -> None:
    values = np.random.default_rng(0).gamma(1.0, 1.0, 3000)
    text = json.dumps(packed(values))
    back = unpacked(json.loads(text))
    assert len(text) < 4500
    assert back.mean() == pytest.approx(values.mean(), abs=1e-12)
    assert np.abs(back - values).max() < 0.55 * (values.max() - values.min()) / 255
    constant = unpacked(packed(np.full(7, 0.25)))
    assert constant.tolist() == [0.25] * 7


def test_before_any_training(tmp_path: Path) -> None:
    """On the sample, against a loop over the rows one by one."""
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    found = measure(SAMPLE, encoder=str(encoder), held_out=40)
    held, train = parts(SAMPLE, "sst", None, 0, 40).held_out.examples, parts(SAMPLE, "sst", None, 0, 40).train.examples
    frequent = Counter(row.label for row in train).most_common(1)[0][0]
    assert found["sst"] == pytest.approx(sum(row.label == frequent for row in held) / 40)

    settings = resolve({"config": "vanilla"})
    model = build_model(settings, encoder_config(encoder, settings), encoder).eval()
    data = tokenize(parts(SAMPLE, "sts", None, 0, 40).held_out, SentenceTokenizer(encoder, 128))
    one_by_one = []
    for row in data.tokens:
        u, v = (model.sentence(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) for ids in row)
        one_by_one.append(float((u @ v.T).detach() / (u.norm() * v.norm()).detach()))
    assert found["sts"] == pytest.approx(np.corrcoef(one_by_one, data.labels)[0, 1], abs=1e-5)
    assert found["para"] == pytest.approx(round(40 * found["para"]) / 40)
    # By hand: above 0.1 and above 0.6 three of four answers are right, above 0.4 two; the first of equals is taken.
    assert best_threshold(torch.tensor([0.1, 0.6, 0.4, 0.9]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0.1)
