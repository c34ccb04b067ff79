"""The first file that people run: what it prints is what its models do, and the picture is optional."""

import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "examples" / "quickstart.py"


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    return runpy.run_path(str(FILE), run_name="__main__")


def measured(model: Any, points: Any, truth: Any) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood from the two logits of each point, without torch's loss."""
    right, total = 0, 0.0
    for (a, b), label in zip(model(points).double().tolist(), truth.tolist(), strict=True):
        gap = (a - b) if label else (b - a)  # the wrong logit over the right one
        right += gap < 0
        total += max(gap, 0.0) + math.log1p(math.exp(-abs(gap)))
    return right / len(truth), total / len(truth)


def test_prints_what_the_models_do_and_draws_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(tmp_path, monkeypatch)
    text = capsys.readouterr().out
    printed = re.findall(r"^(\w+ SMART): accuracy ([\d.]+), negative log-likelihood ([\d.]+)$", text, re.MULTILINE)
    assert [name for name, *_ in printed] == ["without SMART", "with SMART"]
    for name, *numbers in printed:
        found = measured(names["models"][name], names["held_out"], names["truth"])
        assert [float(number) for number in numbers] == pytest.approx(found, abs=6e-4)
        assert found[0] > 0.9  # both learn
    assert printed[0][2] != printed[1][2], "the penalty changes what is learned"

    from matplotlib import image

    picture = image.imread(tmp_path / "two_moons.png")[..., :3]
    half = picture.shape[1] // 2
    assert picture.shape[1] > 1.5 * picture.shape[0]
    assert picture.max(axis=-1) == pytest.approx(picture.min(axis=-1), abs=0.01)  # nothing in it needs colour
    for panel in (picture[:, :half], picture[:, half:]):
        assert 0.1 < (panel < 0.5).mean() < 0.9  # a dark and a light region in each


def test_without_matplotlib_there_is_no_picture_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(tmp_path, monkeypatch)
    text = capsys.readouterr().out
    assert text.count("accuracy") == 2
    assert text.endswith("no picture: matplotlib is not installed\n")
    assert not list(tmp_path.iterdir())
