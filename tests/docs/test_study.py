"""The tables of the comparison follow from the committed records."""

from pathlib import Path

import pytest

from minbert.study import tables

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "examples" / "minbert" / "study" / "results"


@pytest.mark.skipif(not RECORDS.is_dir(), reason="the records are in the repository, not in the sdist")
def test_the_tables_are_those_of_the_committed_records() -> None:
    made = tables.make(RECORDS)
    assert (ROOT / "docs" / "study" / "tables.md").read_text("utf-8") == made
