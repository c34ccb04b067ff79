"""The example on a GPU; `pytest -m cuda` collects these."""

import json
from pathlib import Path

import pytest
import torch
from example_tools import script, tiny_encoder

from minbert.cli import main

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
FLAGS = ["--train-limit", "32", "--dev-limit", "20", "--epochs", "1", "--tasks", "sst,para,sts"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), size=32)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("flags", [["--amp", "off"], ["--amp", "bf16"], ["--amp", "fp16"], ["--memory-efficient"]])
def test_trains_on_the_device(flags: list[str], encoder: Path, tmp_path: Path) -> None:
    line = ["--encoder", str(encoder), "--output-dir", str(tmp_path / "run"), "--device", "cuda", *FLAGS, *flags]
    assert main(line) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["device"] == "cuda"
    assert metrics["peak_memory_bytes"] > 0
    for values in metrics["epochs"][0]["losses"].values():
        assert values["loss"] is not None
        assert values["smoothness"] > 0


@pytest.mark.cuda
@needs_cuda
def test_resumes_on_the_device(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--encoder", str(encoder), "--output-dir", str(tmp_path / "run"), "--device", "cuda", *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr("minbert.run.finish", lambda *_: None)
        assert main([*line, "--save-every", "2"]) == 0
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main([*line, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["device"] == "cuda"


@pytest.mark.cuda
@needs_cuda
def test_all_devices_train_together(encoder: Path, tmp_path: Path) -> None:
    line = ["--encoder", encoder, "--output-dir", tmp_path / "run", "--device", "cuda", "--amp", "bf16", *FLAGS]
    found = script(*line, processes=torch.cuda.device_count())
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda: this PyTorch sees no CUDA device; choose --device cpu" in capsys.readouterr().err
