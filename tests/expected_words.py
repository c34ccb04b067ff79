"""The words that tests expect of errors and warnings, read off their source."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

BEGIN = "\x02"
"""Stands before the first word of a text."""
_TOKEN = re.compile(
    r"\\(?P<literal>[^a-zA-Z0-9])"
    r"|(?P<field>\\[a-zA-Z0-9][*+?]*|\.[*+]\??|\[[^\]]*\][*+?]*|[|()\0])"
    r"|(?P<other>.)",
    re.DOTALL,
)
Known = dict[str, list[ast.expr]]


def expected(folder: Path) -> set[str]:
    """Every pattern and asserted text in the tests of a folder, as `literal` has it."""
    return {words for path in sorted(folder.rglob("*.py")) for words in expectations(path.read_text("utf-8"))}


def expectations(text: str) -> Iterator[str]:
    """Those of one file: in `match=` and in `assert`, and in the variables and parameters that stand there."""
    tree = ast.parse(text)
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        known = {**_assigned(tree.body), **_assigned(ast.walk(function)), **_parameters(function)}
        for node in ast.walk(function):
            if isinstance(node, ast.keyword) and node.arg == "match":
                yield from (literal(text) for text in _texts(node.value, known))
            elif isinstance(node, ast.Assert):
                yield from (BEGIN + text.replace("\0", "…") for text in _texts(node.test, known))


def literal(pattern: str) -> str:
    r"""A regular expression behind `BEGIN`, with … in the place of its fields.

    Examples:
        >>> literal(r"epsilon must be .*, got 1\.5 \(absurd\)").removeprefix(BEGIN)
        'epsilon must be …, got 1.5 (absurd)'
    """
    return BEGIN + "".join(
        "…" if token["field"] else token["literal"] or token["other"] for token in _TOKEN.finditer(pattern)
    )


def _assigned(nodes: Iterable[ast.AST]) -> Known:
    values: Known = {}
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    values.setdefault(ast.unparse(name), []).append(node.value)
    return values


def _parameters(function: ast.FunctionDef) -> Known:
    """What `pytest.mark.parametrize` gives each parameter."""
    values: Known = {}
    for mark in function.decorator_list:
        if not isinstance(mark, ast.Call) or not ast.unparse(mark.func).endswith("parametrize"):
            continue
        names, cases = ast.literal_eval(mark.args[0]), mark.args[1]
        listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        for case in cases.elts if isinstance(cases, (ast.List, ast.Tuple)) else [cases]:
            parts = case.args if isinstance(case, ast.Call) else getattr(case, "elts", [])
            if len(listed) == 1 or len(parts) != len(listed):
                parts = [case] * len(listed)  # a name or a comprehension: whatever stands in it
            for name, part in zip(listed, parts, strict=True):
                values.setdefault(name, []).append(part)
    return values


def _texts(node: ast.expr, known: Known, depth: int = 3) -> Iterator[str]:
    """The strings in an expression, and in what its names stand for; NUL for the fields of an f-string."""
    if isinstance(node, ast.JoinedStr):
        fields = "\0".join(str(part.value) if isinstance(part, ast.Constant) else "" for part in node.values)
        yield fields
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name) and depth:
        for value in known.get(node.id, []):
            yield from _texts(value, known, depth - 1)
    for part in ast.iter_child_nodes(node) if not isinstance(node, ast.JoinedStr) else ():
        if isinstance(part, (ast.expr, ast.keyword)):
            yield from _texts(part, known, depth)
