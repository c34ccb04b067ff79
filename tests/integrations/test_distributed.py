"""Two processes under `torchrun` (gloo, on the CPU) against one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

MODES = pytest.mark.parametrize("mode", ["standard", "memory-efficient"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `distributed_checks.py` found on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("distributed_checks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def assert_equal_to_one_process(found: dict[str, float]) -> None:
    assert found["penalty"] > 1e-4
    assert found["gradient"] > 1e-3
    assert found["penalty gap"] < 1e-14
    assert found["gradient gap"] < 1e-14


@MODES
@pytest.mark.parametrize(
    "label", ["plain", "find_unused_parameters", "static_graph", "unused head", "no_sync", "step inside"]
)
def test_gradients_are_those_of_one_process_with_the_whole_batch(ranks: list[Any], mode: str, label: str) -> None:
    for rank in ranks:
        assert_equal_to_one_process(rank[f"{mode}, {label}"])


@MODES
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("label", ["plain", "find_unused_parameters", "static_graph", "fully_shard"])
def test_a_start_along_the_gradient_is_that_of_one_process(ranks: list[Any], mode: str, label: str, steps: int) -> None:
    for rank in ranks:
        assert_equal_to_one_process(rank[f"start, {mode}, {label}, {steps}"])


@MODES
def test_buffers_are_as_after_one_pass_a_step(ranks: list[Any], mode: str) -> None:
    assert [rank[f"{mode}, calls counted"] for rank in ranks] == [2.0, 2.0]


@MODES
def test_replays_read_the_buffers_that_the_wrapper_brings(ranks: list[Any], mode: str) -> None:
    for rank in ranks:
        assert rank[f"{mode}, nothing perturbed"] == [0.0, 0.0, 0.0]


@MODES
def test_dropout_masks_are_shared_on_every_rank_and_gradients_synchronised(ranks: list[Any], mode: str) -> None:
    for rank in ranks:
        assert rank[f"{mode}, zero"] == 0.0
        assert rank[f"{mode}, synchronised"] < 1e-7


@MODES
def test_reaching_around_the_wrapper_is_an_error(ranks: list[Any], mode: str) -> None:
    for rank in ranks:
        assert "1 of 1 embedding look-ups went around the wrapper" in rank[f"{mode}, around"]


@MODES
def test_calling_the_wrapper_through_a_closure_is_an_error(ranks: list[Any], mode: str) -> None:
    for rank in ranks:
        assert (
            "got a call of the DistributedDataParallel wrapper in a pass that goes around it"
            in (rank[f"{mode}, closure"])
        )


def test_compile_goes_inside_the_wrapper(ranks: list[Any]) -> None:
    for rank in ranks:
        assert_equal_to_one_process(rank["compiled inside"])
        assert "expected DistributedDataParallel(torch.compile(model))" in rank["compiled outside"]


def test_fully_shard_gives_the_gradients_of_the_whole_model(ranks: list[Any]) -> None:
    for rank in ranks:
        assert_equal_to_one_process(rank["fully_shard"])
        assert_equal_to_one_process(rank["fully_shard, memory-efficient"])
        assert rank["fully_shard, flags"]


def test_a_teacher_that_was_sharded_like_the_model_moves_as_the_whole_one(ranks: list[Any]) -> None:
    for rank in ranks:
        before, after = rank["fully_shard, teacher 0"], rank["fully_shard, teacher 1"]
        assert before["penalty"] > 3 * after["penalty"] > 1e-4  # half the distance, a quarter of the divergence
        assert before["gap"] < 1e-14
        assert after["gap"] < 1e-14


def test_a_sharded_model_cannot_be_copied_for_a_teacher(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "before sharding" in rank["fully_shard, deepcopy"]
