"""`docs/errors.md` has a row for every error and warning of the library, and no row for one that is gone."""

import re
from pathlib import Path

from messages import definitions, messages, raised

PAGE = (Path(__file__).parent.parent / "docs" / "errors.md").read_text("utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
VAGUE = "… must …, got …"  # the shape of a mask, said in words by each caller


def pattern(row: str) -> re.Pattern[str]:
    """The row as the beginning of a message; fields stand where the row has them."""
    if row == VAGUE:
        return re.compile(re.escape(row) + "$")
    return re.compile(".+?".join(map(re.escape, row.removesuffix(" …").split("…"))), re.DOTALL)


def test_every_message_has_a_row() -> None:
    missing = [message for message in raised() if not any(pattern(row).match(message) for row, _, _ in ROWS)]
    assert missing == []


def test_every_row_has_a_message() -> None:
    found = raised()
    gone = [row for row, _, _ in ROWS if not any(pattern(row).match(message) for message in found)]
    assert gone == []


def test_rows_are_not_so_short_that_they_fit_everything() -> None:
    vague = [row for row, _, _ in ROWS if len(row.replace("…", "").strip()) < 15]
    assert vague == [VAGUE]
    assert len(ROWS) == len({row for row, _, _ in ROWS}) > 100


def test_a_message_that_is_no_row_is_noticed() -> None:
    texts = ['WHY = f"nothing of {1} kind"\ndef f():\n    raise ValueError(WHY)\n    warn("a new " f"{f} warning")\n']
    found = set(messages(texts[0], definitions(texts)))
    assert found == {"nothing of … kind", "a new … warning"}
    assert not any(pattern(row).match(message) for row, _, _ in ROWS for message in found)
