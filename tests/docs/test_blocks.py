"""Every Python block of README and docs runs as pasted, in a fresh interpreter, and prints what the page says.

The blocks of a tutorial are pasted one after the other. A block that is a part of something else is listed with its
reason.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import smartreg

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r'^```python(?: title="(?P<title>.+?)")?\n(?P<code>.*?)^```\n(?:\n```text title="output"\n(?P<output>.*?)^```\n)?',
    re.DOTALL | re.MULTILINE,
)

FRAGMENTS = {  # page: {how a block begins: why it does not stand by itself}
    "README.md": {"from smartreg import MomentumBregman, SmartLoss": "the loop of a reader's own model"},
    "docs/index.md": {"from smartreg import MomentumBregman, SmartLoss": "the same loop, in full"},
    "docs/coming-from.md": {"from smart_pytorch import sym_kl_loss": "run by tests/integrations/test_compat.py"},
    "docs/cost.md": {
        "def training_loss(batch, weight):": "a way to write one's own loop",
        "weight = k * lambda_s": "two lines of it",
    },
    "docs/example.md": {"outputs, smoothness = smart(forward": "the lines of examples/minbert/objective.py, quoted"},
    "docs/numerics.md": {
        "from smartreg import diagnose": "on the reader's own model; docs/choosing.md has a whole one"
    },
    "docs/papers.md": {
        "def start(x):": "a setting for a given model; run by tests/integrations/test_compat.py",
        "smart = SmartLoss(model, steps=0": "a setting for a given model; run by tests/integrations/test_compat.py",
        'smart = SmartLoss(model, embedding="deberta': "a setting for a given model, with values left open",
        "smart = SmartLoss(model, epsilon=0": "a setting for a given model; run by tests/integrations/test_compat.py",
    },
    "docs/recipes.md": {
        "model = DistributedDataParallel(model)": "needs processes; see tests/integrations/test_distributed.py",
        "with contextlib.nullcontext() if last": "needs processes; see tests/integrations/test_distributed.py",
        "teacher = copy.deepcopy(model)": "needs processes; see tests/integrations/test_distributed.py",
    },
}


TUTORIALS = {"docs/tutorial.md"}
"""Pages whose blocks go into one interpreter, in order. They train for so long that other machines end otherwise."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


class Block(NamedTuple):
    """A fenced block: where it stands, its file name on the page if it has one, and what the page says it prints."""

    page: str
    title: str | None
    code: str
    output: str | None

    @property
    def reason(self) -> str | None:
        """Why it does not stand by itself, where that is so."""
        if self.title is not None:
            return "executed by the recipes' tests"
        reasons = [why for start, why in FRAGMENTS.get(self.page, {}).items() if self.code.startswith(start)]
        return reasons[0] if reasons else None


BLOCKS = [
    Block(page.relative_to(ROOT).as_posix(), found["title"], found["code"], found["output"])
    for page in PAGES
    for found in BLOCK.finditer(page.read_text("utf-8"))
]
COMPLETE = [block for block in BLOCKS if block.reason is None and block.page not in TUTORIALS]
PASTED = [
    Block(page, None, "\n".join(b.code for b in BLOCKS if b.page == page),
          "".join(b.output or "" for b in BLOCKS if b.page == page))
    for page in sorted(TUTORIALS)
]  # fmt: skip


def test_no_fence_is_missed() -> None:
    fences = sum(len(re.findall(r"^ *```python", page.read_text("utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == len(BLOCKS) > 20


def run(block: Block, folder: Path, timeout: int) -> str:
    """What the block prints in a fresh interpreter."""
    search = os.pathsep.join(filter(None, (str(Path(smartreg.__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-"]
    done = subprocess.run(
        command, input=block.code, cwd=folder, capture_output=True, text=True, env=environment, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", COMPLETE, ids=lambda block: f"{block.page}: {block.code.splitlines()[0]}")
def test_it_runs_as_pasted(block: Block, tmp_path: Path) -> None:
    printed = run(block, tmp_path, 300)
    if block.output is not None:
        assert printed == block.output


@pytest.mark.parametrize("block", PASTED, ids=lambda block: block.page)
def test_a_tutorial_runs_from_top_to_bottom_and_prints_what_it_shows(block: Block, tmp_path: Path) -> None:
    """The words to the letter; of the numbers that it trains for no more than the losses, to a third."""
    printed = run(block, tmp_path, 900)
    assert block.output is not None
    shown = block.output.splitlines()
    assert [line for line in printed.splitlines() if line.startswith("lambda_s")] != []
    for line, expected in zip(printed.splitlines(), shown, strict=True):
        if not expected.startswith("lambda_s"):
            continue
        assert NUMBER.sub("#", line) == NUMBER.sub("#", expected)
        found, wanted = (list(map(float, NUMBER.findall(text))) for text in (line, expected))
        assert found == pytest.approx(wanted, rel=1 / 3, abs=0.1)
    assert (tmp_path / "diagnose.png").stat().st_size > 10_000


def test_the_quickstart_is_among_those_that_run() -> None:
    assert {"docs/quickstart.md", "docs/choosing.md"} <= {block.page for block in COMPLETE if block.output}


def test_every_listed_fragment_exists_and_only_these() -> None:
    listed = [(page, start) for page, starts in FRAGMENTS.items() for start in starts]
    unmatched = [
        (page, start) for page, start in listed if sum(b.page == page and b.code.startswith(start) for b in BLOCKS) != 1
    ]
    assert unmatched == []
    pasted = sum(block.page in TUTORIALS for block in BLOCKS)
    assert len(BLOCKS) - len(COMPLETE) - pasted == len(listed) + sum(block.title is not None for block in BLOCKS)
    assert len(listed) == 14, "a new fragment needs a reason, and a look at whether it could be whole"


def test_what_has_a_file_name_is_executed_by_a_test() -> None:
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests" / "integrations").glob("*.py"))
    titles = [block.title for block in BLOCKS if block.title is not None]
    assert len(titles) == len(set(titles)) > 5
    assert [title for title in titles if f'"{title}"' not in tests] == []
