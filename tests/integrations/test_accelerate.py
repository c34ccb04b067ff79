"""The recipe for Accelerate on two processes of `accelerate launch`, and interrupted, against one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate_tools import STEPS, FromTheRow, found, interrupted, train
from trainer_tools import CASES, ROWS, farthest, weights

# What accelerate's own data loader does with a recent torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:accelerate.*")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `accelerate_tools.py` left on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = Path(__file__).parent.parent / "accelerate_tools.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, script, folder], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_are_one_process_with_every_row(ranks: list[dict[str, Any]]) -> None:
    one = found(*train("loop.py", range(STEPS), ROWS, FromTheRow))
    assert farthest(one["weights"], weights(CASES["one label"].model())) > 1e-3
    for rank in ranks:
        assert rank["ranks"] == 2
        assert farthest(rank["three steps"]["weights"], one["weights"]) < 1e-9
        assert farthest(rank["three steps"]["averages"], one["averages"]) < 1e-9
    for name in ("penalty", "proximal"):
        mean = sum(rank["three steps"][name] for rank in ranks) / 2
        assert mean == pytest.approx(one[name], rel=1e-9)
        assert mean > 1e-9


def assert_resumed(runs: dict[str, Any]) -> None:
    whole, second = runs["whole"], runs["second"]
    assert farthest(whole["weights"], second["weights"]) == farthest(whole["averages"], second["averages"]) == 0.0
    assert (whole["penalty"], whole["proximal"]) == (second["penalty"], second["proximal"])
    assert whole["proximal"] > 1e-6
    assert farthest(runs["first"]["weights"], second["weights"]) > 1e-3


def test_two_ranks_resume_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    """Each draws from the random state of its process, which Accelerate keeps."""
    for rank in ranks:
        assert_resumed(rank["resumed"])
    assert ranks[0]["resumed"]["whole"]["penalty"] != ranks[1]["resumed"]["whole"]["penalty"]


@pytest.mark.parametrize("generator", [False, True])
def test_one_process_resumes_bit_for_bit(tmp_path: Path, generator: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        assert_resumed(interrupted(tmp_path, ROWS, generator=generator))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
