"""The numbers of the results page are those of the tables that the committed records make."""

import re
from pathlib import Path

import pytest

from minbert.study.tables import REFERENCE

DOCS = Path(__file__).parents[2] / "docs"
NUMBER = re.compile(r"[+-]?\d+\.\d+")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(cell.replace("−", "-"))]


def last_epoch() -> dict[str, list[list[float]]]:
    """By arm: accuracy, NLL, NLL scaled, ECE, ECE scaled, cost; in each the mean, the difference and its interval."""
    part = (DOCS / "study" / "tables.md").read_text("utf-8").split("### sst, last epoch")[1].split("###")[0]
    rows = [cells(line) for line in part.splitlines() if line.startswith("| ")][1:]
    return {arm: [numbers(cell) for cell in rest] for arm, *rest in rows}


ROWS = [cells(line) for line in (DOCS / "results.md").read_text("utf-8").splitlines() if line.startswith("| `")]


def test_no_arm_is_left_out() -> None:
    assert {row[0].split("`")[1] for row in ROWS} == last_epoch().keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split("`")[1])
def test_a_row_is_that_of_the_tables(row: list[str]) -> None:
    arm = row[0].split("`")[1]
    accuracy, nll, scaled, ece, _, cost = last_epoch()[arm]
    shown = slice(0, 1) if arm == REFERENCE else slice(1, 4)
    wanted = [accuracy[shown], nll[shown], ece[:1], scaled[:1], cost]
    found = [numbers(cell) for cell in row[1:]]
    assert [len(cell) for cell in found] == [len(cell) for cell in wanted]
    for own, other in zip(found, wanted, strict=True):
        assert own == pytest.approx(other, abs=0.00056)
