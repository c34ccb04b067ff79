"""What may import what inside the package, as functions of its source code.

The package stands in levels, the lowest first. A file imports from its own part (a file or a folder directly under
`smartreg/`), from others of its level and from lower levels, never upwards. The mechanisms do not know each other.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WINGS = ("_ascent", "_model", "_teacher", "_divergences")
BASE = ("_checks", "_masks")
FORMULAS = ("_divergences",)
SUPPORT = ("_loss_scale", "_outputs", "_typing", "_warnings", "_wrappers", "divergences")
MECHANISMS = ("_ascent", "_model", "_teacher")
PUBLIC = ("_picture", "bregman", "diagnosis", "functional", "results", "schedule", "smart")
ROOT = ("__init__",)
INTEGRATIONS = ("integrations",)
LEVELS = (BASE, FORMULAS, SUPPORT, MECHANISMS, PUBLIC, ROOT, INTEGRATIONS)

TORCH_ALONE = frozenset({"torch", "typing_extensions"}) | sys.stdlib_module_names
INSIDE_FUNCTIONS = {("_picture", "matplotlib")}  # asked for when a figure is drawn
MOST_LINES = 320


class Source(NamedTuple):
    """One file: its path inside the package, and its text."""

    path: Path
    text: str

    @property
    def part(self) -> str:
        return self.path.parts[0].removesuffix(".py")

    @property
    def module(self) -> str:
        """Its dotted name inside the package; the package itself is the empty one."""
        return ".".join(self.path.with_suffix("").parts).removesuffix("__init__").removesuffix(".")

    @property
    def body(self) -> list[ast.stmt]:
        return ast.parse(self.text, str(self.path)).body


class Import(NamedTuple):
    """One name that a file imports, wherever in the file: `inside` the package by module, or from `outside`."""

    line: int
    inside: str | None
    outside: str | None
    deferred: bool
    """Inside a function, so that importing the file does not need it."""


def read(package: Path) -> list[Source]:
    return [Source(path.relative_to(package), path.read_text("utf-8")) for path in sorted(package.rglob("*.py"))]


def imports(source: Source, modules: set[str]) -> Iterator[Import]:
    """Every import, those in functions and for type checkers too."""
    nodes = list(ast.walk(ast.parse(source.text, str(source.path))))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    deferred = {inner for function in functions for inner in ast.walk(function)}
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                around = ["smartreg", *source.path.parts[:-1]][: len(source.path.parts) + 1 - node.level]
                start = ".".join([*around, start]).removesuffix(".")
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first != "smartreg":
                yield Import(node.lineno, None, first, node in deferred)
                continue
            while rest and rest not in modules:  # `from smartreg.smart import SmartLoss`: the module, not the name
                rest = rest.rpartition(".")[0]
            yield Import(node.lineno, rest, None, node in deferred)


def inner_imports(sources: list[Source]) -> Iterator[tuple[Source, int, str]]:
    """Who imports what inside the package, and in which line."""
    modules = {source.module for source in sources}
    for source in sources:
        for found in imports(source, modules):
            if found.inside is not None:
                yield source, found.line, found.inside


def may_import(part: str, other: str) -> bool:
    """Whether a file of one part may import from the other; what has no level is for `every_part_has_its_level`."""
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    if part == other or part not in level or other not in level:
        return True
    if part in MECHANISMS:
        return other in (*BASE, *SUPPORT)
    return level[other] <= level[part]


# The rules: each gives one line for everything that breaks it.


def every_part_has_its_level(sources: list[Source]) -> Iterator[str]:
    parts = {source.part for source in sources}
    known = {part for level in LEVELS for part in level}
    for part in sorted(parts - known):
        yield f"{part} has no level: add it to tests/walls.py"
    for part in sorted(known - parts - set(INTEGRATIONS)):
        yield f"{part} is gone: take it out of tests/walls.py"


def nothing_imports_upwards_or_aside(sources: list[Source]) -> Iterator[str]:
    for source, line, module in inner_imports(sources):
        other = module.split(".")[0] or "__init__"
        if not may_import(source.part, other):
            yield f"{source.path}:{line} imports smartreg.{module}".removesuffix(".")


def no_cycle(sources: list[Source]) -> Iterator[str]:
    """Deferred imports and those for type checkers count: they hide a cycle and do not end it."""
    targets: dict[str, set[str]] = {source.module: set() for source in sources}
    for source, _, module in inner_imports(sources):
        targets[source.module].add(module)
    while free := {module for module, others in targets.items() if not others & targets.keys()}:
        for module in free:
            del targets[module]
    if targets:
        module, path = min(targets), []
        while module not in path:
            path.append(module)
            module = min(targets[module] & targets.keys())
        cycle = path[path.index(module) :]
        first = cycle.index(min(cycle))
        yield "cycle: " + " -> ".join(name or "smartreg" for name in [*cycle[first:], *cycle[: first + 1]])


def core_imports_torch_alone(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.part in INTEGRATIONS:
            continue
        for found in imports(source, set()):
            asked_for = found.deferred and (source.module, found.outside) in INSIDE_FUNCTIONS
            if found.outside is not None and found.outside not in TORCH_ALONE and not asked_for:
                yield f"{source.path}:{found.line} imports {found.outside}"


def the_root_holds_names_alone(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.module == "":
            for node in source.body[1:]:
                names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
                if not isinstance(node, (ast.Import, ast.ImportFrom)) and names not in (["__all__"], ["__version__"]):
                    yield f"{source.path}:{node.lineno} is code"
            yield from _without_docstring(source)


def wings_open_with_a_docstring(sources: list[Source]) -> Iterator[str]:
    found = {source.module: source for source in sources if source.path.name == "__init__.py"}
    for wing in WINGS:
        if wing not in found:
            yield f"{wing}/__init__.py is missing"
            continue
        yield from (f"{found[wing].path}:{node.lineno} is code" for node in found[wing].body[1:])
        yield from _without_docstring(found[wing])


def wings_name_their_files(sources: list[Source]) -> Iterator[str]:
    docstrings = {s.part: ast.get_docstring(ast.parse(s.text)) for s in sources if s.path.name == "__init__.py"}
    for source in sources:
        text = docstrings.get(source.part) if source.part in WINGS and source.path.name != "__init__.py" else None
        if text and f"`{source.path.name}`" not in text:
            yield f"{source.part}/__init__.py does not name {source.path.name}"


def files_stay_short(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if (lines := len(source.text.splitlines())) > MOST_LINES:
            yield f"{source.path} has {lines} lines, more than {MOST_LINES}"


RULES = (
    every_part_has_its_level,
    nothing_imports_upwards_or_aside,
    no_cycle,
    core_imports_torch_alone,
    the_root_holds_names_alone,
    wings_open_with_a_docstring,
    wings_name_their_files,
    files_stay_short,
)


def _without_docstring(source: Source) -> Iterator[str]:
    if not ast.get_docstring(ast.parse(source.text)):
        yield f"{source.path} opens without a docstring"
