"""A run that was killed, at any moment, ends with the very weights of one that was not."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from example_tools import ROOT, SAMPLE, command, run_options, tiny_encoder
from fault_tools import assert_same_end

from minbert import checkpoint
from minbert.checkpoint import latest
from minbert.cli import main
from minbert.distributed import Place, random_states, set_random_state
from minbert.files import UNFINISHED
from minbert.run_folder import settings_to_resume
from minbert.settings import Settings

# Runs the example, but sends itself a signal at a chosen moment, so that "in the middle of saving" is where it says.
KILLED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
from minbert import checkpoint, cli, train

def die_after(module, name, calls, before=lambda *a: None):
    original, count = getattr(module, name), [0]
    def wrapped(*arguments, **options):
        count[0] += 1
        if count[0] == calls:
            before(*arguments)
            os.kill(os.getpid(), signal.SIGTERM if moment == "asked" else signal.SIGKILL)
        return original(*arguments, **options)
    setattr(module, name, wrapped)

def half_a_file(tensors, path):
    with open(path, "wb") as file:
        file.write(b"x" * 1000)

moment, calls = sys.argv[1], int(sys.argv[2])
if moment in ("step", "asked"):
    die_after(train.Trainer, "_train_step", calls)
elif moment == "writing":
    die_after(checkpoint, "save_file", calls, half_a_file)
elif moment == "renamed":
    die_after(checkpoint, "_remove", calls)
sys.exit(cli.main(sys.argv[3:]))
"""
FLAGS = ["--tasks", "sst,sts", "--train-limit", "24", "--dev-limit", "10", "--batch-size", "8"]
FLAGS += ["--epochs", "3", "--save-every", "2", "--inner-steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads round differently, and the child processes have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), dropout=0.1)


@pytest.fixture(scope="module")
def uninterrupted(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert main(["--encoder", str(encoder), "--output-dir", str(folder), *FLAGS]) == 0
    return folder


def start(encoder: Path, folder: Path, script: Path, *moment: object) -> "subprocess.CompletedProcess[str]":
    """Runs the script that kills itself."""
    script.write_text(KILLED.format(examples=str(ROOT / "examples")))
    arguments = [*moment, "--encoder", encoder, "--output-dir", folder, *FLAGS]
    return subprocess.run(command(*arguments, file=script), **run_options())  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("moment", "calls", "left"),
    [
        ("step", 2, None),  # nothing saved yet
        ("step", 10, 8),  # in the middle of the second epoch, between two checkpoints
        ("writing", 5, 4),  # half of a file is written
        ("renamed", 1, 6),  # the new checkpoint is there, the old one not yet removed
    ],
)
def test_killed_and_resumed(
    moment: str, calls: int, left: int | None, encoder: Path, uninterrupted: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    assert start(encoder, folder, tmp_path / "killed.py", moment, calls).returncode == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    saved = latest(folder)
    assert (None if saved is None else int(saved.name.removeprefix("step-"))) == left
    if moment == "writing":
        assert list((folder / "checkpoints").glob(f"*{UNFINISHED}"))
    assert main(["--output-dir", str(folder), "--resume", "--encoder", str(encoder), *FLAGS]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (f"resuming after step {left} of 18" if left else "nothing saved yet in") in out
    assert_same_end(folder, uninterrupted, epochs=3)
    assert len(list((folder / "checkpoints").iterdir())) == 1


def test_a_run_goes_on_where_it_was_and_with_the_dev_data_it_had(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    flags = ["--data-dir", str(data), "--device", "cpu"]
    script = tmp_path / "killed.py"
    assert start(encoder, folder, script, "step", 10, *flags).returncode == -signal.SIGKILL
    assert settings_to_resume(folder, {}, Settings()).device == "cpu"
    file = data / "sts-dev.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:5]), encoding="utf-8")
    assert main(["--output-dir", str(folder), "--resume"]) == 2
    assert f"--resume {folder}: the dev data is not what the run began with" in capsys.readouterr().err
    assert main(["--evaluate", str(folder), "--data-dir", str(SAMPLE)]) == 0
    assert f"note: {folder} is not complete; these are its weights at step-00000008" in capsys.readouterr().err
    assert main(["--evaluate", str(folder), "--data-dir", ""]) == 2  # the sample is what comes without the flag
    capsys.readouterr()
    arguments = ["--evaluate", str(folder), "--data-dir", str(SAMPLE), "--output-dir", str(folder)]
    assert main(arguments) == 2
    assert "holds a run; name another folder for the predictions" in capsys.readouterr().err


def test_times_are_those_of_the_whole_run(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while its results were written, so that nothing is left to train."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").unlink()
    load = checkpoint.load_state
    saved = load(latest(folder))["seconds"]
    assert 0 < saved <= before["seconds"] + 0.05
    monkeypatch.setattr(checkpoint, "load_state", lambda path: {**load(path), "seconds": 1000.0})
    assert main(["--output-dir", str(folder), "--resume"]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 1000 < metrics["seconds"] < 1100
    assert metrics["step_seconds_median"] == before["step_seconds_median"] > 0


def test_a_random_state_of_another_kind_of_device_is_told_of() -> None:
    place = Place(torch.device("cpu"))
    (own,) = random_states(place)
    assert set_random_state(place, own)
    assert not set_random_state(place, torch.cat([own, own[:16]]))  # as a GPU's run leaves it


def test_sigterm_saves_and_leaves(encoder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = start(encoder, folder, tmp_path / "asked.py", "asked", 10)
    assert ended.returncode == 143, ended
    assert "stopped by SIGTERM after step 10" in ended.stderr
    assert "--resume goes on from there" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert main(["--output-dir", str(folder), "--resume"]) == 0  # the run knows its own settings
    assert_same_end(folder, uninterrupted, epochs=3)


def test_resuming_is_for_the_same_run(
    encoder: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--output-dir", str(uninterrupted)]
    assert main([*folder, "--resume"]) == 0
    assert "is complete already" in capsys.readouterr().out
    assert main([*folder, "--resume", "--lr", "0.5"]) == 2
    assert "--lr is 3e-05 in the run, 0.5 here" in capsys.readouterr().err
    assert main([*folder, "--encoder", str(encoder)]) == 2
    assert "holds another run; go on with --resume" in capsys.readouterr().err


def test_resuming_notices_other_data(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(SAMPLE, tmp_path / "data"))
    arguments = ["--output-dir", str(tmp_path / "run"), "--data-dir", str(data)]
    with monkeypatch.context() as patch:
        patch.setattr("minbert.run.finish", lambda *_: None)
        assert main(["--encoder", str(encoder), *arguments, *FLAGS]) == 0
    lines = (data / "ids-sst-train.csv").read_text().replace(" film", " picture")
    (data / "ids-sst-train.csv").write_text(lines)
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    assert "the training data is not what the run began with" in capsys.readouterr().err
