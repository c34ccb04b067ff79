"""A run is never lost, whatever happens to it: it ends with one line, and goes on to the very weights.

`pytest -m slow tests/examples/test_faults.py` tries everything many times and prints a table.
"""

import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from example_tools import command, run_options, tiny_encoder
from fault_tools import Ended, Fault, Runs, assert_same_end

from minbert import InputError, checkpoint, run_folder
from minbert.files import UNFINISHED

FLAGS = ["--tasks", "sst", "--train-limit", 12, "--dev-limit", 4, "--batch-size", 4, "--epochs", 2, "--save-every", 2]
FLAGS += ["--train-eval-limit", 5]
MOMENTS = {"training": 6, "saving": 36, "preparing": 10, "finishing": 8}
"""How often each is counted in a run of these flags, at least."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Runs(tmp_path_factory.mktemp("stderr")) as runs:
        yield runs


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    encoder = tiny_encoder(tmp_path_factory.mktemp("encoder"), dropout=0.1, layers=1, size=8)
    return ["--encoder", encoder, *FLAGS]


@pytest.fixture(scope="module")
def whole(runs: Runs, flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runs.run("--output-dir", folder, *flags) == Ended(0, [])
    return folder


@pytest.fixture(scope="module")
def halved(runs: Runs, flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 5; its checkpoints are those of steps 3 and 5."""
    folder = tmp_path_factory.mktemp("halved") / "run"
    assert runs.run("--output-dir", folder, *flags, fault=Fault("SIGKILL", "training", 6)).code == -signal.SIGKILL
    assert len(checkpoint.found(folder)) == 2
    return folder


@pytest.fixture
def row(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """A row of the table that slow tests print."""
    cells: list[str] = []
    yield cells
    with capsys.disabled():
        print(f"\n| {' | '.join(cells)} |" if cells else "")


def assert_recovers(runs: Runs, folder: Path, flags: list[object], whole: Path) -> None:
    """The run goes on and ends as if nothing had happened; nothing unfinished is left."""
    ended = runs.run("--output-dir", folder, *flags, "--resume")
    assert ended.code == 0, ended
    assert_same_end(folder, whole)
    assert not list(folder.rglob(f"*{UNFINISHED}"))


def expected_code(fault: Fault, *, late: bool) -> set[int]:
    if fault.signal == "SIGKILL":
        return {-signal.SIGKILL}
    if fault.signal == "SIGINT":
        return {130}
    if fault.inside in ("preparing", "finishing"):
        return {-signal.SIGTERM}  # nothing is lost by leaving at once
    return {143, 0} if late else {143}  # 0: it arrived in the last step, and what was left to do was done


def strike(runs: Runs, fault: Fault, folder: Path, flags: list[object], whole: Path, *, late: bool = False) -> None:
    ended = runs.run("--output-dir", folder, *flags, fault=fault)
    assert ended.code in expected_code(fault, late=late), (fault, ended)
    assert len(ended.errors) <= 1, (fault, ended)
    assert_recovers(runs, folder, flags, whole)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("SIGKILL", "preparing", 5),
        Fault("SIGKILL", "saving", 13),
        Fault("SIGKILL", "finishing", 3),
        Fault("SIGINT", "saving", 20),
        Fault("SIGTERM", "saving", 5),
    ],
    ids=lambda fault: "-".join(map(str, fault)),
)
def test_signals(fault: Fault, runs: Runs, flags: list[object], whole: Path, tmp_path: Path) -> None:
    strike(runs, fault, tmp_path / "run", flags, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inside", "times"),
    [
        ("SIGKILL", "training", 25), ("SIGKILL", "saving", 10), ("SIGKILL", "preparing", 10),
        ("SIGKILL", "finishing", 5), ("SIGTERM", "training", 4), ("SIGTERM", "saving", 6), ("SIGINT", "training", 3),
        ("SIGINT", "saving", 5), ("SIGINT", "preparing", 2),
    ],
)  # fmt: skip
def test_signals_at_many_moments(
    name: str, inside: str, times: int, runs: Runs, flags: list[object], whole: Path, tmp_path: Path, row: list[str]
) -> None:
    draw = random.Random(f"{name} {inside}")
    for i in range(times):
        strike(runs, Fault(name, inside, draw.randint(1, MOMENTS[inside])), tmp_path / f"{i}", flags, whole, late=True)
    row += [f"{name} in {inside}", str(times), "the same weights after --resume"]


def fill_the_disk(runs: Runs, folder: Path, room: int, flags: list[object], whole: Path) -> None:
    ended = runs.run("--output-dir", folder, *flags, room=room)
    assert ended.code == 3, ended
    (line,) = ended.errors
    assert line.startswith(f"error: {folder}/")
    assert "cannot be written" in line
    assert "File too large" in line
    for saved in checkpoint.found(folder):
        checkpoint.verify(saved)
    assert_recovers(runs, folder, flags, whole)


def test_no_room_for_a_checkpoint(runs: Runs, flags: list[object], whole: Path, tmp_path: Path) -> None:
    largest = max(file.stat().st_size for file in whole.rglob("*.safetensors"))
    fill_the_disk(runs, tmp_path / "run", largest - 1000, flags, whole)


def full_file_system(folder: Path, size: int, action: str = "") -> bool:
    """Mounts a file system of so many bytes, or gives one another size; whether this user may."""
    options = ["-o", f"{action}size={size}"]
    folder.mkdir(exist_ok=True)
    line = ["mount", *options, "-t", "tmpfs", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(line, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_full_disk_many_times(
    runs: Runs, flags: list[object], whole: Path, tmp_path: Path, row: list[str]
) -> None:  # fmt: skip
    used = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    draw = random.Random(0)
    disk, kind = tmp_path / "disk", "full disk"
    for i in range(10):
        share = draw.uniform(0.05, 1.2)
        if full_file_system(disk, int(used * share)):
            try:
                ended = runs.run("--output-dir", disk / "run", *flags)
                assert ended.code == 3, ended
                (line,) = ended.errors
                assert "cannot be written" in line
                assert "No space left on device" in line
                for saved in checkpoint.found(disk / "run"):
                    checkpoint.verify(saved)
                assert full_file_system(disk, 100 * used, "remount,")
                assert_recovers(runs, disk / "run", flags, whole)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
        else:  # without the right to mount: a limit to the size of a file
            kind = "no room for a file"
            largest = max(file.stat().st_size for file in whole.rglob("*.safetensors"))
            fill_the_disk(runs, tmp_path / f"{i}", draw.randint(1000, largest - 1000), flags, whole)
    row += [kind, "10", "exit code 3, one line, the same weights after --resume"]


def two_at_once(runs: Runs, folder: Path, flags: list[object], whole: Path) -> None:
    line = ["--output-dir", folder, *flags]
    first, second = sorted(runs.together(line, line), key=lambda ended: ended.code)
    assert (first.code, second.code) == (0, 2), (first, second)
    (message,) = second.errors
    assert "another process is at work in it" in message or "holds another run" in message
    assert_same_end(folder, whole)


def test_two_runs_in_one_folder(runs: Runs, flags: list[object], whole: Path, tmp_path: Path) -> None:
    two_at_once(runs, tmp_path / "run", flags, whole)


def test_a_run_that_begins_while_another_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = run_folder._half_made

    def begin_and_look(folder: Path) -> bool:
        for name in ("settings.json", "metrics.jsonl"):
            (folder / name).write_text("{}")
        return look(folder)

    (tmp_path / run_folder.LOCK).touch()
    run_folder.refuse_occupied(tmp_path)  # left by a run that was killed
    monkeypatch.setattr(run_folder, "_half_made", begin_and_look)
    with pytest.raises(InputError, match="holds another run"):
        run_folder.refuse_occupied(tmp_path)


@pytest.mark.slow
def test_two_runs_in_one_folder_many_times(
    runs: Runs, flags: list[object], whole: Path, tmp_path: Path, row: list[str]
) -> None:
    for i in range(10):
        two_at_once(runs, tmp_path / f"{i}", flags, whole)
    row += ["two runs in one folder", "10", "one runs as if alone, the other ends with one line"]


def damage(folder: Path, draw: random.Random) -> None:
    """Changes one bit of a file of the last checkpoint, cuts it off, or removes it."""
    files = sorted(checkpoint.found(folder)[0].iterdir())
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    kind = draw.choice(["bit", "bit", "cut", "gone"])
    if kind == "bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif file.name != "manifest.json":  # a checkpoint without one is of an earlier version
        file.unlink()


def repairs(runs: Runs, halved: Path, folder: Path, draw: random.Random, whole: Path) -> None:
    shutil.copytree(halved, folder)
    while not _damaged(folder):
        damage(folder, draw)
    ended = runs.run("--output-dir", folder, "--resume")
    assert ended.code == 0, ended
    (message,) = ended.errors
    assert "it is set aside as step-0000000" in message
    assert_same_end(folder, whole)


def _damaged(folder: Path) -> bool:
    try:
        checkpoint.verify(checkpoint.found(folder)[0])
    except InputError:
        return True
    return False


def test_a_damaged_checkpoint(runs: Runs, halved: Path, whole: Path, tmp_path: Path) -> None:
    repairs(runs, halved, tmp_path / "run", random.Random(0), whole)
    # A second one: there is none before it to go back to.
    shutil.copytree(halved, tmp_path / "both")
    for saved in checkpoint.found(tmp_path / "both"):
        (saved / "model.safetensors").write_bytes(b"")
    ended = runs.run("--output-dir", tmp_path / "both", "--resume")
    assert ended.code == 2
    assert "there is no checkpoint before it" in ended.errors[-1]


@pytest.mark.slow
def test_damaged_checkpoints_many_times(
    runs: Runs, halved: Path, whole: Path, tmp_path: Path, row: list[str]
) -> None:  # fmt: skip
    for i in range(20):
        repairs(runs, halved, tmp_path / f"{i}", random.Random(i), whole)
    row += ["damaged file in the last checkpoint", "20", "said so; the same weights from the checkpoint before"]


RANK = """
import os, sys
sys.path[:0] = [{tests!r}, {examples!r}]
import torch
torch.set_num_threads(1)
from fault_tools import Fault, install
from minbert import cli
if os.environ["RANK"] == "1" and "--resume" not in sys.argv:
    install(Fault("SIGKILL", "training", {calls}))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_a_rank_is_killed(flags: list[object], tmp_path: Path, row: list[str]) -> None:
    from fault_tools import ROOT

    names = {"tests": str(ROOT / "tests"), "examples": str(ROOT / "examples")}

    def two(folder: Path, calls: int, *more: str) -> int:
        (tmp_path / "rank.py").write_text(RANK.format(**names, calls=calls))
        line = command("--output-dir", folder, *flags, *more, processes=2, file=tmp_path / "rank.py")
        return subprocess.run(line, **run_options()).returncode  # type: ignore[call-overload,no-any-return]

    assert two(tmp_path / "whole", 1000) == 0
    for i in range(10):
        assert two(tmp_path / f"{i}", i % 6 + 1) != 0
        assert two(tmp_path / f"{i}", 0, "--resume") == 0
        assert_same_end(tmp_path / f"{i}", tmp_path / "whole")
    row += ["a rank killed under torchrun", "10", "the same weights after --resume"]


def test_strangers_in_the_folder_are_left_alone(
    runs: Runs, flags: list[object], halved: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(halved, folder)
    place = folder / "checkpoints"
    (place / "notes.txt").write_text("mine")
    (place / "step-best").mkdir()
    (place / "step-best" / "model.safetensors").write_text("mine")
    (place / "step-00000001").mkdir()
    (place / "step-00000001" / "report.pdf").write_text("mine")
    oldest = checkpoint.found(folder)[-1]
    (oldest / "notes.txt").write_text("mine")
    assert_same = runs.run("--output-dir", folder, *flags, "--resume")
    assert assert_same == Ended(0, [])
    kept = sorted(file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file())
    assert [name for name in kept if "step-00000006" not in name] == [
        "notes.txt", "step-00000001/report.pdf", f"{oldest.name}{UNFINISHED}/notes.txt", "step-best/model.safetensors",
    ]  # fmt: skip


def test_a_run_that_diverged_says_so(runs: Runs, flags: list[object], tmp_path: Path) -> None:
    ended = runs.run("--output-dir", tmp_path / "run", *flags, "--lr", "1e20")
    assert ended.code == 4
    (line,) = ended.errors
    assert line.startswith("error: the run has diverged: at step 2 the loss of sst is nan; begin again with a smaller")
    assert checkpoint.latest(tmp_path / "run") is None  # no weights that are no numbers are kept


def test_a_warning_of_the_library_is_one_line(runs: Runs, flags: list[object], tmp_path: Path) -> None:
    few = ["--max-steps", 1, "--amp", "bf16", "--epsilon", "1e-6"]
    ended = runs.run("--output-dir", tmp_path / "run", *flags, *few)
    assert ended.code == 0
    (line,) = ended.errors
    assert re.fullmatch(r"warning: .*: too small for bfloat16 autocast, .*", line)


def test_metrics_that_were_cut_off_do_not_make_a_run_complete(
    runs: Runs, flags: list[object], halved: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(halved, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("")
    assert_recovers(runs, tmp_path / "run", flags, whole)
