"""`docs/errors.md` has a row for every error and warning of the library, and no row for one that is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import smartreg

PACKAGE = Path(smartreg.__file__).parent
PAGE = (Path(__file__).parent.parent / "docs" / "errors.md").read_text("utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
INSIDE_OTHERS = ("the saved ", "saved averages")  # handed to torch, which raises them in `load_state_dict`


def template(node: ast.expr, known: dict[str, list[ast.expr]]) -> list[str]:
    """What a message can be, with … for each field."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
    if isinstance(node, ast.BinOp):
        return [first + "…" for first in template(node.left, known)]
    name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    return [text for value in known.get(name, []) for text in template(value, known)]


def messages(text: str, known: dict[str, list[ast.expr]]) -> Iterator[str]:
    """Every message that a source raises or warns with."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warn":
            call = node
        else:
            continue
        if ast.unparse(call.func) == "KeyError":  # of a mapping, which names the key alone
            continue
        found = template(call.args[0], known)
        assert found, f"cannot read the message of: {ast.unparse(node)}"
        yield from found


def definitions(texts: list[str]) -> dict[str, list[ast.expr]]:
    """Constants, and what functions return, by name."""
    known: dict[str, list[ast.expr]] = {}
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value]
            known.setdefault(node.name, []).extend(value for value in returned if not isinstance(value, ast.Name))
    return known


def raised() -> set[str]:
    # The integrations speak of their frameworks' classes and settings, in messages that the page leaves to them.
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if "integrations" not in path.parts]
    texts = [path.read_text("utf-8") for path in paths]
    known = definitions(texts)
    return {message for text in texts for message in messages(text, known)}


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
    assert [row for row in gone if not row.startswith(INSIDE_OTHERS)] == []


def test_rows_are_not_so_short_that_they_fit_everything() -> None:
    vague = [row for row, _, _ in ROWS if len(row.replace("…", "").strip()) < 15]
    assert vague == [VAGUE]
    assert len(ROWS) == len({row for row, _, _ in ROWS}) > 100


def test_a_message_that_is_no_row_is_noticed() -> None:
    texts = ['WHY = f"nothing of {1} kind"\ndef f():\n    raise ValueError(WHY)\n    warn("a new " f"{f} warning")\n']
    found = set(messages(texts[0], definitions(texts)))
    assert found == {"nothing of … kind", "a new … warning"}
    assert not any(pattern(row).match(message) for row, _, _ in ROWS for message in found)
