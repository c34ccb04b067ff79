"""Every message that the library raises or warns with, read off its source; … is what differs from case to case."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import smartreg

PACKAGE = Path(smartreg.__file__).parent
Known = dict[str, list[ast.expr]]


def raised() -> set[str]:
    texts = [path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))]
    known = definitions(texts)
    return {message for text in texts for message in messages(text, known)}


def messages(text: str, known: Known) -> Iterator[str]:
    """Every message that a source raises, warns with, or hands to torch, which raises it in `load_state_dict`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            # A class takes the message; a function makes the error, message and all.
            message = node.exc if ast.unparse(node.exc.func) in known else node.exc.args[0]
            if ast.unparse(node.exc.func) == "KeyError":  # of a mapping, which names the key alone
                continue
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warn", "error_msgs.append"):
            message = node.args[0]
        else:
            continue
        found = list(template(message, known))
        assert found, f"cannot read the message of: {ast.unparse(node)}"
        yield from found


def template(node: ast.expr, known: Known) -> Iterator[str]:
    """What a message can be."""
    if isinstance(node, ast.Constant):
        yield from [node.value] if node.value and isinstance(node.value, str) else []
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp):
        yield from (first + "…" for first in template(node.left, known))
    elif isinstance(node, (ast.BoolOp, ast.IfExp)):
        for choice in node.values if isinstance(node, ast.BoolOp) else (node.body, node.orelse):
            yield from template(choice, known)
    else:
        name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        made = isinstance(node, ast.Call) and name.endswith("Error")
        for value in node.args[:1] if made else known.get(name, []):
            yield from template(value, known)


def definitions(texts: Iterable[str]) -> Known:
    """Constants, and what functions return, by name."""
    known: Known = {}
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.NamedExpr):
            known.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value]
            known.setdefault(node.name, []).extend(value for value in returned if not isinstance(value, ast.Name))
    return known
