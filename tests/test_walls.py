"""The walls between the parts of the package, and that each rule notices what breaks it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import walls

import smartreg

SOUND = {
    "__init__.py": '"""D."""\nfrom smartreg.smart import A\n__version__ = "1"\n__all__ = ["A"]\n',
    "smart.py": "import torch\nfrom smartreg._model.replay import A\nfrom smartreg.results import B\n",
    "functional.py": "from smartreg._ascent import search\nfrom smartreg import divergences\n",
    "bregman.py": "from smartreg._teacher.sharing import A\nfrom smartreg import _warnings\n",
    "diagnosis.py": "from .smart import A\n",
    "results.py": "from smartreg._picture import draw\n",
    "_picture.py": "def draw():\n    import matplotlib\n",
    "schedule.py": "import math\n",
    "_checks.py": "import math\n",
    "_masks.py": "import torch\n",
    "_outputs.py": "from smartreg.divergences import kl\n",
    "_wrappers.py": "from torch import nn\n",
    "_loss_scale.py": "from typing_extensions import Self\n",
    "_typing.py": "",
    "_warnings.py": "",
    "divergences.py": "from smartreg._divergences.formulas import kl\n",
    "_ascent/__init__.py": '"""`ball.py`, `search.py`."""\n',
    "_ascent/ball.py": "from smartreg._loss_scale import A\n",
    "_ascent/search.py": "from smartreg._ascent.ball import A\nfrom .. import divergences\n",
    "_model/__init__.py": '"""`replay.py`."""\n',
    "_model/replay.py": "import smartreg._warnings\n",
    "_teacher/__init__.py": '"""`sharing.py`."""\n',
    "_teacher/sharing.py": "from smartreg._wrappers import A\n",
    "_divergences/__init__.py": '"""`formulas.py`, `blockwise.py`."""\n',
    "_divergences/formulas.py": "import torch.nn.functional as F\n",
    "_divergences/blockwise.py": "from smartreg._divergences.formulas import kl\n",
    "integrations/__init__.py": "",
    "integrations/trainer.py": "import transformers\nfrom smartreg import SmartLoss\n",
}


def complaints(folder: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    sources = walls.read(folder)
    return [complaint for rule in walls.RULES for complaint in rule(sources)]


@pytest.mark.parametrize("rule", walls.RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Callable[[list[walls.Source]], Iterator[str]]) -> None:
    sources = walls.read(Path(smartreg.__file__).parent)
    assert len(sources) > 20
    assert list(rule(sources)) == []


def test_a_sound_tree_is_no_complaint(tmp_path: Path) -> None:
    assert complaints(tmp_path, SOUND) == []


@pytest.mark.parametrize(
    "text",
    [
        "import smartreg._model.replay",
        "import smartreg._model.replay as other",
        "from smartreg import _model",
        "from smartreg._model import replay",
        "from smartreg._model.replay import A",
        "from .._model.replay import A",
        "from .. import _model",
        "def f():\n    from smartreg._model import replay",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from smartreg._model import replay",
    ],
)
def test_no_spelling_of_an_import_gets_through(text: str, tmp_path: Path) -> None:
    (found,) = complaints(tmp_path, {**SOUND, "_ascent/ball.py": text})
    assert found.startswith("_ascent/ball.py:")
    assert " imports smartreg._model" in found


MODULES = {part: f"smartreg.{part}" for level in walls.LEVELS for part in level} | {"__init__": "smartreg"}


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("_ascent", "_model _teacher _divergences bregman diagnosis functional results schedule smart __init__"),
        ("_model", "_ascent _teacher _divergences bregman diagnosis functional results schedule smart __init__"),
        ("_teacher", "_ascent _model _divergences bregman diagnosis functional results schedule smart __init__"),
        ("_divergences", "_ascent _model _teacher _loss_scale _outputs _warnings _wrappers divergences smart __init__"),
        ("_masks", "_divergences _warnings _outputs _ascent _model _teacher smart __init__"),
        ("_warnings", "_ascent _model _teacher smart results schedule __init__ integrations"),
        ("divergences", "_ascent _model _teacher smart functional __init__"),
        ("smart", "__init__ integrations"),
        ("__init__", "integrations"),
    ],
    ids=lambda value: value.split()[0],
)
def test_what_a_part_never_imports(part: str, forbidden: str, tmp_path: Path) -> None:
    name = next(n for n in SOUND if n.split("/")[0].removesuffix(".py") == part and n != f"{part}/__init__.py")
    for other in forbidden.split():
        found = complaints(tmp_path, {**SOUND, name: f"{SOUND[name]}\nimport {MODULES[other]}\n"})
        assert [c for c in found if c.startswith(f"{name}:") and c.endswith(f" imports {MODULES[other]}")], other


LONG = "\n" * 321
BROKEN = [
    ("helpers.py", "import smartreg.smart", "helpers has no level: add it to tests/walls.py"),
    ("_extra/__init__.py", '"""D."""', "_extra has no level: add it to tests/walls.py"),
    ("_ascent/ball.py", "from smartreg._ascent import search",
     "cycle: _ascent.ball -> _ascent.search -> _ascent.ball"),
    ("results.py", "def f():\n    import smartreg.smart", "cycle: results -> smart -> results"),
    ("results.py", "import smartreg.results", "cycle: results -> results"),
    ("_model/replay.py", "import torch, numpy.linalg", "_model/replay.py:1 imports numpy"),
    ("schedule.py", "try:\n    from scipy.special import erf\nexcept ImportError:\n    erf = None",
     "schedule.py:2 imports scipy"),
    ("smart.py", "def f():\n    import matplotlib", "smart.py:2 imports matplotlib"),
    ("diagnosis.py", "import matplotlib.pyplot", "diagnosis.py:1 imports matplotlib"),
    ("__init__.py", SOUND["__init__.py"] + "print(1)", "__init__.py:5 is code"),
    ("__init__.py", SOUND["__init__.py"] + "other = 1", "__init__.py:5 is code"),
    ("__init__.py", SOUND["__init__.py"] + "__all__ = other = []", "__init__.py:5 is code"),
    ("__init__.py", 'from smartreg.smart import A\n__all__ = ["A"]', "__init__.py opens without a docstring"),
    ("_teacher/__init__.py", SOUND["_teacher/__init__.py"] + "from smartreg._teacher.sharing import A",
     "_teacher/__init__.py:2 is code"),
    ("_teacher/__init__.py", "", "_teacher/__init__.py opens without a docstring"),
    ("_teacher/__init__.py", '"""D, of sharing.py."""', "_teacher/__init__.py does not name sharing.py"),
    ("_divergences/formulas.py", LONG, "_divergences/formulas.py has 321 lines, more than 320"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text", "complaint"), BROKEN, ids=[complaint for *_, complaint in BROKEN])
def test_every_other_rule_notices(file: str, text: str, complaint: str, tmp_path: Path) -> None:
    assert complaints(tmp_path, {**SOUND, file: text}) == [complaint]


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("_model/__init__.py", "_model/__init__.py is missing"),
        ("schedule.py", "schedule is gone: take it out of tests/walls.py"),
    ],
)
def test_what_is_missing_is_noticed(file: str, complaint: str, tmp_path: Path) -> None:
    assert complaints(tmp_path, {name: text for name, text in SOUND.items() if name != file}) == [complaint]


def test_320_lines_are_not_too_many(tmp_path: Path) -> None:
    assert complaints(tmp_path, {**SOUND, "schedule.py": LONG[1:]}) == []
