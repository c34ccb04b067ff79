"""CONTRIBUTING's worked examples, done step by step to a copy of the package."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import smartreg
from smartreg._ascent.rules import RULES
from smartreg._ascent.settings import Ascent

PACKAGE = Path(smartreg.__file__).parent
TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")
EDIT = re.compile(r"`smartreg/(\S+)`, (before|after|in place of) `([^`]+)`\s*```python\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def section(heading: str) -> str:
    return TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]


def edit(package: Path, file: str, where: str, anchor: str, code: str) -> None:
    """Put `code` before, after or in place of the one line that starts with `anchor`."""
    lines = (package / file).read_text("utf-8").splitlines(keepends=True)
    (found,) = [index for index, line in enumerate(lines) if line.startswith(anchor)]
    lines[found : found + 1] = {
        "before": [code, lines[found]],
        "after": [lines[found], code],
        "in place of": [code],
    }[where]
    (package / file).write_text("".join(lines), "utf-8")


@pytest.mark.parametrize(
    ("heading", "edits"), [("Add a divergence in five minutes", 2), ("Add an ascent rule in ten", 3)]
)
def test_the_worked_example_works(heading: str, edits: int, tmp_path: Path) -> None:
    text = section(heading)
    steps = EDIT.findall(text)
    *_, check = BLOCK.findall(text)
    assert len(steps) == edits == len(BLOCK.findall(text)) - 1
    shutil.copytree(PACKAGE, tmp_path / "smartreg", ignore=shutil.ignore_patterns("__pycache__"))

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", check]  # from the folder of the copy, which comes first on the path
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)

    assert run().returncode != 0  # before the change it does not
    for step in steps:
        edit(tmp_path / "smartreg", *step)
    done = run()
    assert done.returncode == 0, done.stderr


ENVIRONMENT = {"PATH": "", "OMP_NUM_THREADS": "1"}


def test_the_table_of_rules_has_every_name() -> None:
    assert tuple(RULES) == get_args(Ascent)
