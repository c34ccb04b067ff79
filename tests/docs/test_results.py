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


def last_epoch(stage: str) -> dict[str, list[list[float]]]:
    """By arm and column of a stage: the mean, and with it the difference and its interval where there is one."""
    part = (DOCS / "study" / "tables.md").read_text("utf-8").split(f"\n## {stage}\n")[1]
    part = part.split(", last epoch\n")[1].split("###")[0]
    rows = [cells(line) for line in part.splitlines() if line.startswith("| ")][1:]
    return {arm: [numbers(cell) for cell in rest] for arm, *rest in rows if arm != "untrained"}


SECTIONS = {
    "Results: does it help?": "first",
    "Scores: STS": "first-sts",
    "A weaker weight, a smaller ball": "weaker-sst",
}
"""The sections of the page that have a table, and the stage that it is of."""
ROWS = []
for section in re.split(r"^#+ ", (DOCS / "results.md").read_text("utf-8"), flags=re.MULTILINE):
    title, _, body = section.partition("\n")
    ROWS += [(title, cells(line)) for line in body.splitlines() if line.startswith("| `")]


def arm_of(row: list[str]) -> str:
    return row[0].split("`")[1]


@pytest.mark.parametrize(("title", "stage"), SECTIONS.items())
def test_no_arm_is_left_out(title: str, stage: str) -> None:
    assert {arm_of(row) for where, row in ROWS if where == title} == last_epoch(stage).keys()


@pytest.mark.parametrize(("title", "row"), ROWS, ids=lambda part: part if isinstance(part, str) else arm_of(part))
def test_a_row_is_that_of_the_tables(title: str, row: list[str]) -> None:
    arm = arm_of(row)
    metric, nll, scaled, *calibration, cost = last_epoch(SECTIONS[title])[arm]
    shown = slice(0, 1) if arm == REFERENCE else slice(1, 4)
    wanted = [metric[shown], nll[shown], *(each[:1] for each in calibration[:1]), scaled[:1], cost]
    found = [numbers(cell) for cell in row[1:]]
    assert [len(cell) for cell in found] == [len(cell) for cell in wanted]
    for own, other in zip(found, wanted, strict=True):
        assert own == pytest.approx(other, abs=0.00056)
