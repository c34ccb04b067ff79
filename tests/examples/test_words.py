"""What a run says: a line an epoch in a log, beside a bar in a terminal; the closing words; the order of `--help`."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
from example_tools import command, run_options, script, tiny_encoder

from minbert.cli import FIRST, build_parser
from minbert.settings import TABLE, Settings, resolve
from minbert.words import epoch_line, meaning, without_smart

SHORT = ("--train-limit", "8", "--dev-limit", "6", "--epochs", "2")
EPOCH = re.compile(r"epoch (\d)/2 in \d+ s; ")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def log(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Output and errors of a run whose output is a file."""
    folder = tmp_path_factory.mktemp("log")
    with (folder / "log.txt").open("wb") as file:
        options = run_options(capture_output=False, stdout=file, stderr=file, text=False)
        done = subprocess.run(command("--encoder", encoder, *SHORT, "--output-dir", folder / "run"), **options)  # type: ignore[call-overload]
    text = (folder / "log.txt").read_bytes().decode()
    assert done.returncode == 0, text
    return text


def test_a_log_has_a_line_an_epoch_and_no_bars(log: str) -> None:
    assert "\r" not in log
    assert "\x1b" not in log
    assert "step/s" not in log
    assert max(map(len, log.splitlines())) < 400
    lines = [line for line in log.splitlines() if EPOCH.match(line)]
    assert [EPOCH.match(line).group(1) for line in lines] == ["1", "2"]  # type: ignore[union-attr]  # they matched
    number = r"-?[\d.e+-]+"
    for line in lines:
        for task, metric in (("sst", "accuracy"), ("para", "accuracy"), ("sts", "pearson")):
            losses = rf"loss {number}, smoothness {number}, proximal {number}, ascent gain {number}"
            assert re.search(rf"; {task}: {losses}, dev {metric} {number}(;|$)", line), line


def test_a_terminal_has_the_bar_and_the_line(encoder: Path, tmp_path: Path) -> None:
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # else it has no width, and no bar
    words = command("--encoder", encoder, *SHORT, "--config", "vanilla", "--output-dir", tmp_path / "run")
    process = subprocess.Popen(words, stdout=end, stderr=end, stdin=end, env=run_options()["env"])  # type: ignore[arg-type]
    os.close(end)
    seen = b""
    while True:
        try:
            more = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        seen += more
    os.close(main)
    assert process.wait(60) == 0, seen
    text = seen.decode()
    assert "\repoch 1/2:" in text
    assert "step/s" in text
    lines = [line for line in re.split("[\r\n]+", text) if EPOCH.match(line)]
    assert len(lines) == 2
    assert "smoothness" not in lines[0]  # which vanilla has not


def test_the_closing_words_name_the_same_run_without_smart(log: str) -> None:
    assert re.search(r"^sst: accuracy [\d.]+ on 6 rows that it was not trained on \(.+\); on training rows", log, re.M)
    assert re.search(
        r"^Share of smoothness and proximal in the loss of the last epoch: para .+%, sst .+%, sts .+%\.$", log, re.M
    )
    (line,) = re.findall(r"^  python examples/minbert_multitask\.py (.+)$", log, re.M)
    given = vars(build_parser().parse_args(shlex.split(line)))
    assert given["config"] == "t-vanilla"
    assert (given["train_limit"], given["dev_limit"]) == (8, 6)
    assert "lambda_s" not in given


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"option": "pretrain"},
        {"option": "pretrain", "lr": 0.01, "tasks": ("sst", "sts")},
        {"preset": "report", "epsilon": 0.1, "epochs": 4},
        {"preset": "report", "option": "pretrain", "batch_size": 16},
        {"lr": 1e-4},
        {"lr": 1e-4, "head_lr": 2e-4, "compile": True, "dropout": 0.0, "data_dir": "a folder"},
        {"config": "t-bregman", "mu": 3.0, "lr_schedule": "constant", "amp": "bf16"},
        {"init_from": "runs/first", "max_steps": 7, "memory_efficient": True},
    ],
    ids=str,
)
def test_that_command_makes_every_other_setting_what_it_is_here(given: dict[str, Any]) -> None:
    settings = resolve(dict(given))
    words = shlex.split(without_smart(settings))
    assert words[:2] == ["python", "examples/minbert_multitask.py"]
    other = resolve(vars(build_parser().parse_args(words[2:])))
    assert other.config == "t-vanilla"
    for name, row in TABLE.items():
        if row.term is None and name != "config":
            assert getattr(other, name) == getattr(settings, name), name
    assert without_smart(settings, 2).startswith("torchrun --nproc-per-node 2 examples/minbert_multitask.py ")


def metrics(gap: float | None, losses: dict[str, Any]) -> dict[str, Any]:
    return {
        "dev": {"sst": {"accuracy": 0.5, "n": 20}},
        "train": {"sst": {"accuracy": 0.75}},
        "untrained": {"sst": {"accuracy": 0.25}},
        "baseline": {"sst": {"accuracy": 0.3}},
        "gap": {"sst": gap},
        "epochs": [{"losses": losses}],
    }


def test_the_meaning_in_words() -> None:
    settings = Settings(tasks=("sst",), lambda_s=0.5, mu=2.0)
    losses = {"sst": {"loss": 2.0, "task_loss": 1.4, "smoothness": 0.4, "proximal": 0.2}}
    first, share, *_ = meaning(metrics(0.25, losses), settings, 1)
    assert first == (
        "sst: accuracy 0.5 on 20 rows that it was not trained on (0.25 before training; always the most frequent class "
        "gets 0.3); on training rows 0.75, 0.250 more: the gap."
    )
    assert share == "Share of smoothness and proximal in the loss of the last epoch: sst 30.0%."  # 0.5·0.4 + 2·0.2 of 2
    less, *_ = meaning(metrics(-0.25, losses), settings, 1)
    assert less.endswith("0.250 less: the gap.")
    undefined, advice, *_ = meaning(metrics(None, {"sst": {"loss": None}}), settings, 1)
    assert undefined.endswith("gets 0.3).")
    assert advice.startswith("One run does not tell whether SMART helped.")
    assert len(list(meaning(metrics(0.25, losses), Settings(config="t-vanilla", tasks=("sst",)), 1))) == 1


def test_a_number_that_is_missing_is_undefined() -> None:
    line = {"epoch": 3, "losses": {"sts": {"task_loss": None}}, "dev": {"sts": {"pearson": 0.5}}, "seconds": 61.0}
    assert epoch_line(line, 3) == "epoch 3/3 in 61 s; sts: loss undefined, dev pearson 0.5"


def test_help_begins_with_the_twelve_flags_that_people_use() -> None:
    done = script("--help")
    assert done.returncode == 0
    _, *groups = re.split(r"^(?=\S.*:$)", done.stdout, flags=re.M)
    titles = [group.split(":")[0] for group in groups]
    assert titles[:3] == ["options", "used most", "what to run"]
    flags = [set(re.findall(r"^  --([\w-]+)", group, re.M)) for group in groups]
    assert flags[1] == {name.replace("_", "-") for name in FIRST}
    assert len(flags[1]) == 12
    assert sum(map(len, flags[1:])) == len(set.union(*flags[1:])) == len(TABLE) + 4
    assert done.stdout.splitlines()[0] == "usage: minbert_multitask.py [flags]"
