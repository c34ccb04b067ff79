"""The tables of the comparison follow from the committed records."""

from pathlib import Path

from minbert.study import tables

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_committed_records() -> None:
    made = tables.make(ROOT / "examples" / "minbert" / "study" / "results")
    assert (ROOT / "docs" / "study" / "tables.md").read_text("utf-8") == made
