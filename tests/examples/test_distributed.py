"""Two processes train what one process trains."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from example_tools import ROOT, command, run_options, tiny_encoder
from safetensors.torch import load_file

from minbert import files, progress
from minbert.cli import main
from minbert.distributed import Place
from minbert.objective import Losses
from smartreg.results import SmartStats

# Runs the example; each process writes down its own weights whenever the run is saved.
WATCHED = """
import sys
from pathlib import Path
sys.path.insert(0, {examples!r})
from safetensors.torch import save_file
from minbert import cli, train

original = train.Trainer.save
def save(self):
    save_file(self.model.state_dict(), Path({folder!r}) / f"rank{{self.place.rank}}.safetensors")
    original(self)
train.Trainer.save = save
sys.exit(cli.main(sys.argv[1:]))
"""
# In the second of two processes the loss of the second step is no number.
SPOILT = """
import dataclasses, os, sys
sys.path.insert(0, {examples!r})
from minbert import cli, objective

original = objective.Objective.__call__
def spoilt(self, batch, step):
    losses = original(self, batch, step)
    if (step, os.environ["RANK"]) != (1, "1"):
        return losses
    return dataclasses.replace(losses, total=losses.total * float("nan"))
objective.Objective.__call__ = spoilt
sys.exit(cli.main(sys.argv[1:]))
"""
FLAGS = ["--train-limit", 20, "--dev-limit", 10, "--epochs", 1, "--max-steps", 3]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), dropout=0.1)


def two_ranks(folder: Path, *arguments: object) -> list[dict[str, torch.Tensor]]:
    examples = str(ROOT / "examples")
    (folder / "watched.py").write_text(WATCHED.format(examples=examples, folder=str(folder)))
    line = command("--output-dir", folder / "two", *arguments, processes=2, file=folder / "watched.py")
    found = subprocess.run(line, **run_options())  # type: ignore[call-overload]
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("majority") == 1  # one process speaks for both
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_ranks_equal_one_process(encoder: Path, tmp_path: Path) -> None:
    # 5 rows a micro-batch: the ranks have 3 and 2, and their means must be weighted.
    flags = ["--encoder", encoder, *FLAGS, "--dtype", "float64", "--dropout", 0, "--batch-size", 5, "--grad-accum", 2]
    first, second = two_ranks(tmp_path, *flags)
    assert main([str(flag) for flag in ["--output-dir", tmp_path / "one", *flags]]) == 0
    (checkpoint,) = (tmp_path / "one" / "checkpoints").iterdir()
    whole, start = load_file(checkpoint / "model.safetensors"), load_file(encoder / "model.safetensors")
    for key, value in whole.items():
        assert (first[key] - value).abs().max() <= 1e-6, key
        assert torch.equal(first[key], second[key]), key
    word = "embeddings.word_embeddings.weight"
    assert (whole[f"encoder.{word}"] - start[word]).abs().max() > 1e-5  # it did train
    lines = {}
    for name in ("one", "two"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["steps"] == 3
        assert all(line["smoothness"] > 0 for line in metrics["epochs"][0]["losses"].values())
        (lines[name],) = metrics["epochs"]
    for part in ("dev", "losses"):  # the losses of all rows, not of the first process's
        for task, values in lines["one"][part].items():
            assert lines["two"][part][task] == pytest.approx(values, abs=1e-6), (part, task)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_ranks_agree_under_dropout_and_one_does_not_go_on_for_two(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--encoder", encoder, *FLAGS, "--batch-size", 6]
    first, second = two_ranks(tmp_path, *flags)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    (tmp_path / "two" / "metrics.json").unlink()
    assert main(["--output-dir", str(tmp_path / "two"), "--resume"]) == 2
    assert "the run had 2 processes, here are 1" in capsys.readouterr().err


def test_a_row_that_stands_in_for_none_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by the second of two processes where a batch has one row: it has that row too, with weight 0."""
    values = [torch.tensor(value) for value in (0.5, 0.5, 0.25, 1, 1.0)]
    losses = Losses(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(0.5), None, SmartStats(*values))
    means = {"loss": 3.0, "task_loss": 2.0, "smoothness": 0.5, "start_divergence": 0.5}
    first = torch.tensor([[1.0, *means.values(), 1.0]], dtype=torch.float64)  # what the other process adds
    monkeypatch.setattr(progress, "joined", lambda place, sums, largest: (sums + first, largest))
    ledger = progress.Ledger(Place(torch.device("cpu"), rank=1, world=2))
    ledger.add("sst", losses, 0.0, 1)
    wanted = {**means, "max_perturbation": 0.25, "bad_examples": 1.0, "ascent_gain": 1.0}
    assert ledger.line()["sst"] == pytest.approx(wanted)


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on one stream: a line and its end, written apart, would have another's line between them."""
    pieces: list[str] = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=pieces.append, flush=lambda: None))
    files.tell("error: what")
    assert pieces == ["error: what\n"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_a_loss_that_is_no_number_in_one_rank_ends_both(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "spoilt.py"
    file.write_text(SPOILT.format(examples=str(ROOT / "examples")))
    flags = ["--output-dir", tmp_path / "run", "--encoder", encoder, *FLAGS, "--batch-size", 4]
    found = subprocess.run(command(*flags, processes=2, file=file), **run_options())  # type: ignore[call-overload]
    assert found.returncode != 0
    said = [line for line in found.stderr.splitlines() if line.startswith(("error:", "[rank"))]
    assert len(said) == 2, found.stderr[-3000:]
    assert all("the run has diverged: at step 2 the loss of" in line for line in said)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
