"""Fails unless mypy and pyright accept `tests/typing/right.py`, and refuse the marked lines alone of `wrong.py`."""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "tests" / "typing"
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"],
    "pyright": [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
}


def marked(file: Path) -> set[int]:
    return {n for n, line in enumerate(file.read_text("utf-8").splitlines(), start=1) if "# refused: " in line}


def reported(output: str, file: Path) -> set[int]:
    """The numbers of the lines of this file that a checker has an error in."""
    return {int(n) for n in re.findall(rf"{re.escape(file.name)}:(\d+)(?::\d+)?[: -]+error", output)}


def main() -> int:
    wrong = 0
    for name, command in CHECKERS.items():
        for file in (FOLDER / "right.py", FOLDER / "wrong.py"):
            done = subprocess.run([*command, str(file)], capture_output=True, text=True, cwd=FOLDER.parent.parent)
            expected, found = marked(file), reported(done.stdout, file)
            if found != expected or bool(done.returncode) != bool(expected):
                wrong += 1
                print(f"{name}, {file.name}: expected errors in {sorted(expected)}, got {sorted(found)}")
                print(done.stdout, done.stderr)
            else:
                print(f"{name}, {file.name}: {len(expected)} lines refused")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
