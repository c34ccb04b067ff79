"""The picture of costs loses no measurement, and its curves can be told apart."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
GRID = json.loads((ROOT / "docs" / "assets" / "cost.json").read_text("utf-8"))["grid"]
# Machado, Oliveira and Fernandes 2009, table 1: deuteranopia (severity 1), for linear RGB.
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
# IEC 61966-2-1: linear RGB to XYZ, white D65.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.fixture
def figure(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("_cost.figure")


def test_every_measurement_lies_inside_its_panel(figure: ModuleType) -> None:
    """With limits set while panels that share an axis were still being filled, three steps fell outside."""
    drawn, seen = figure.draw(GRID), 0
    for panel in drawn.axes:
        low, high = panel.get_ylim()
        assert low == 0
        for container in panel.containers:
            line, _, bars = container.lines
            heights = [*line.get_ydata(), *(y for bar in bars for path in bar.get_segments() for y in path[:, 1])]
            assert all(low < height < high for height in heights)
            seen += len(line.get_ydata())
    assert seen == 2 * sum(row["axis"] in figure.FOLLOWED for row in GRID)


def test_times_have_their_quartiles(figure: ModuleType) -> None:
    panel = figure.draw(GRID).axes[0]
    drawn = {c.get_label(): c.lines[2][0].get_segments() for c in panel.containers}
    for name, segments in drawn.items():
        rows = [row for row in GRID if row["axis"] == "batch" and row["variant"] == name]
        expected = [(row["times_low"], row["times_high"]) for row in rows]
        np.testing.assert_allclose([segment[:, 1] for segment in segments], expected, atol=1e-12)
    assert len(drawn) == 4


def lab(colour: str, matrix: Any = None) -> np.ndarray:
    """CIE L*a*b* of a colour such as #ff0000, as seen through a matrix on linear RGB."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear if matrix is None else np.array(matrix) @ linear, 0, 1)
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ linear / TO_XYZ.sum(axis=1), 1e-3))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_curves_can_be_told_apart(figure: ModuleType) -> None:
    colours, markers = zip(*figure.STYLES.values(), strict=True)
    assert len(set(markers)) == len(markers)
    for one, other in itertools.combinations(colours, 2):
        for eye in (None, DEUTERANOPIA):
            assert np.linalg.norm(lab(one, eye) - lab(other, eye)) > 20, (one, other)
    lightness = sorted(lab(colour)[0] for colour in colours)  # what is left in grey
    assert min(np.diff(lightness)) > 3
