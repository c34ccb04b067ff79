"""What stands around the integrations: imports, extras, examples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "integrations"
FRAMEWORKS = {
    "transformers": "transformers",
    "lightning": "lightning",
    "sentence_transformers": "sentence-transformers",
    "trl": "trl",
}
MOST_LINES = 60


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_library_imports_no_framework() -> None:
    code = f"import sys, smartreg; print([name for name in {list(FRAMEWORKS)} if name in sys.modules])"
    done = run("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_error_of_a_missing_framework_names_the_extra(name: str) -> None:
    code = f"import sys; sys.modules['{name}'] = None; import smartreg.integrations.{name}"
    done = run("-c", code)
    assert done.returncode == 1
    assert f"ImportError: smartreg.integrations.{name} needs " in done.stderr
    assert f"pip install 'smartreg[{FRAMEWORKS[name]}]'" in done.stderr


def encoder() -> str:
    from minbert.pretrained import embedded_folder

    return str(embedded_folder())


def causal(folder: Path) -> str:
    import sft_tools
    from trainer_tools import CASES

    sft_tools.tokenizer().save_pretrained(folder)
    CASES[sft_tools.NAME].model().save_pretrained(folder)
    return str(folder)


def test_the_example_of_trl_runs(tmp_path: Path) -> None:
    done = run(EXAMPLES / "sft.py", "--model", causal(tmp_path / "model"), "--output-dir", tmp_path, "--limit", "16")
    assert done.returncode == 0, done.stderr
    assert "'smart_penalty'" in done.stdout
    assert "'mean_token_accuracy'" in done.stdout


@pytest.mark.parametrize("name", ["glue.py", "lightning_module.py", "sentence_pairs.py"])
def test_the_examples_run(tmp_path: Path, name: str) -> None:
    options = [] if name == "lightning_module.py" else ["--model", encoder(), "--output-dir", str(tmp_path)]
    done = run(EXAMPLES / name, *options, *(["--limit", "16"] if options else []))
    assert done.returncode == 0, done.stderr
    words = {"glue.py": "'smart_penalty'", "lightning_module.py": "smart_penalty", "sentence_pairs.py": "'smart_term'"}
    assert words[name] in done.stdout


def test_the_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 4
    assert max(lengths.values()) <= MOST_LINES
