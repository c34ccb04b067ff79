"""Every wrong input ends in one line that says what and where, exit code 2, and nothing overwritten."""

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from example_tools import SAMPLE, command, run_options, tiny_encoder

from minbert import Diverged, InputError
from minbert.cli import lines_for_warnings, main
from minbert.files import parsing
from minbert.progress import diverged
from smartreg import SmartLoss


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), layers=1, size=8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "data"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line, expects a refusal, and returns its line."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in out + err
        return lines[0]

    return run


def replace_line(file: Path, line: int, change: Callable[[str], str]) -> None:
    lines = file.read_text().splitlines(keepends=True)
    lines[line - 1] = change(lines[line - 1])
    file.write_text("".join(lines))


def no_header(data: Path) -> str:
    file = data / "ids-sst-train.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    return "ids-sst-train.csv:1: expected a tab-separated header with the columns id, sentence, sentiment"


def label_out_of_range(data: Path) -> str:
    replace_line(data / "ids-sst-dev.csv", 7, lambda line: line.rsplit("\t", 1)[0] + "\t5\n")
    return "ids-sst-dev.csv:7: sentiment: expected a whole number from 0 to 4, got '5'"


def nan_score(data: Path) -> str:
    replace_line(data / "sts-train.csv", 9, lambda line: line.rsplit("\t", 1)[0] + "\tnan\n")
    return "sts-train.csv:9: similarity: expected a number from 0 to 5, got 'nan'"


def empty_file(data: Path) -> str:
    (data / "quora-train.csv").write_text("")
    return "quora-train.csv: the file is empty"


def missing_file(data: Path) -> str:
    (data / "quora-dev.csv").unlink()
    return "quora-dev.csv: no such file"


def not_utf8(data: Path) -> str:
    file = data / "sts-dev.csv"
    content = file.read_bytes().splitlines(keepends=True)
    content[4] = content[4].replace(b"a", b"\xe9", 1)
    file.write_bytes(b"".join(content))
    return "sts-dev.csv:5: not valid UTF-8"


def too_many_unusable(data: Path) -> str:
    for line in (3, 5):
        replace_line(data / "quora-train.csv", line, lambda text: text.rsplit("\t", 1)[0] + "\t\n")
    return "quora-train.csv:3: is_duplicate is empty; 2 of 172 lines cannot be used"


def nul(data: Path) -> str:
    replace_line(data / "sts-dev.csv", 6, lambda line: line.replace(" ", "\0", 1))
    return "sts-dev.csv:6: holds a NUL character; remove it"


DEFECTS = [nul, no_header, label_out_of_range, nan_score, empty_file, missing_file, not_utf8, too_many_unusable]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_defective_data(
    defect: Callable[[Path], str], data: Path, encoder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    expected = defect(data)
    line = refused("--data-dir", data, "--encoder", encoder, "--output-dir", tmp_path / "run")
    assert f"{data}/{expected}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "--lr: expected a number above 0, got -1"),
        (["--lr", "nan"], "--lr: expected a number above 0, got nan"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast' (see --help)"),
        (["--head-lr", "0"], "--head-lr: expected a number above 0, got 0"),
        (["--epochs", "0"], "--epochs: expected a whole number from 1 to 2147483647, got 0"),
        (["--seed", "99999999999"], "--seed: expected a whole number from 0 to 2147483647, got 99999999999"),
        (["--batch-size", "0"], "--batch-size: expected a whole number from 1 to 2147483647, got 0"),
        (["--train-limit", "0"], "--train-limit: expected a whole number from 1 to 2147483647, got 0"),
        (["--max-length", "2"], "--max-length: expected a whole number from 4 to 2147483647, got 2"),
        (["--lambda-s", "-0.1"], "--lambda-s: expected a number of at least 0, got -0.1"),
        (["--epsilon", "inf"], "--epsilon: expected a number from 0 to 1e9, got inf"),
        (["--step-size", "1e30"], "--step-size: expected a number from 0 to 1e9, got 1e+30"),
        (["--noise-std", "-1"], "--noise-std: expected a number from 0 to 1e9, got -1"),
        (["--ascent-steps", "-1"], "--ascent-steps: expected a whole number from 0 to 2147483647, got -1"),
        (["--beta", "1"], "--beta: expected a number from 0 to below 1, 'paper' or 'suggested', got 1"),
        (["--dropout", "1"], "--dropout: expected a number from 0 to below 1, got 1"),
        (["--amp", "bf16", "--dtype", "float64"], "--amp bf16: expected off with --dtype float64"),
        (["--config", "smart"], "argument --config: invalid choice: 'smart'"),
        (["--tasks", "sst,nli"], "--tasks: expected any of sst,para,sts,cfimdb, got 'sst,nli'"),
        (["--config", "vanilla", "--epsilon", "0.1"], "--epsilon: has no effect with --config vanilla"),
        (["--data-dir", "no/such/folder"], "--data-dir no/such/folder: no such folder"),
        (["--encoder", "no/such/encoder"], "--encoder no/such/encoder: no such folder"),
        (["--max-length", "200"], "--max-length 200: the encoder has 128 positions"),
        (["--resume"], "--resume: name the run to go on with, as --output-dir"),
        (["--split", "test"], "--split: goes with --evaluate only"),
        (["--step-size", "0.5"], "--step-size: has no effect with --ascent-steps 0; add --ascent-steps 1"),
        (["--ascent", "steepest"], "--ascent: has no effect with --ascent-steps 0; add --ascent-steps 1"),
        (["--noise-std", "0.5"], "--noise-std: has no effect with --start towards_uniform; add --start noise"),
        (["--encoder", "~nobody-of-this-name/x"], "--encoder ~nobody-of-this-name/x: no such folder"),
        (["--init-from", "no/such/run"], "--init-from no/such/run: no such folder"),
        (["--unheard-of"], "unrecognized arguments: --unheard-of (see --help)"),
    ],
)
def test_wrong_flags(
    arguments: list[str], message: str, encoder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if arguments[0] not in ("--encoder", "--resume", "--init-from"):
        arguments = ["--encoder", str(encoder), *arguments]
    if arguments[0] != "--resume":
        arguments = ["--output-dir", str(tmp_path / "run"), *arguments]
    assert message in refused(*arguments)
    assert not (tmp_path / "run").exists()


def test_encoder_folders_without_a_checkpoint(tmp_path: Path, refused: Callable[..., str], encoder: Path) -> None:
    assert f"{tmp_path}/config.json: no such file" in refused("--encoder", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type: expected 'bert', got 'gpt2'" in refused("--encoder", tmp_path)
    shutil.copy(encoder / "config.json", tmp_path)
    assert "the checkpoint has no tokenizer" in refused("--encoder", tmp_path)


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_no_place_for_the_runs(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if what == "file":
        Path("runs").write_text("years of work")
    else:
        Path("runs").symlink_to("nowhere/x")
    assert main(["--encoder", str(encoder), "--tasks", "sst", "--train-limit", "8", "--dev-limit", "8"]) == 3
    assert "error: runs: cannot be written (File exists)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number in the environment, got 'two'; torchrun sets it"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set: start with torchrun, or unset it"),
    ],
)
def test_half_of_what_torchrun_sets(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in refused("--tasks", "sst")


def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(given: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    monkeypatch.setattr("minbert.cli.train_run", full)
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Tried to allocate 2.00 GiB" in line
    assert "a smaller --batch-size with --grad-accum gives the same updates" in line


def test_folders_that_hold_something_are_left_alone(tmp_path: Path, refused: Callable[..., str], encoder: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("years of work")
    assert "is not empty; name another folder" in refused("--encoder", encoder, "--output-dir", run)
    assert "is not empty" in refused("--encoder", encoder, "--output-dir", run, "--resume")
    (run / "settings.json").write_text("{}")
    line = refused("--encoder", encoder, "--output-dir", run)
    assert "holds another run; go on with --resume, or name another folder" in line
    assert "is a file" in refused("--encoder", encoder, "--output-dir", run / "thesis.txt")
    assert sorted(p.name for p in run.iterdir()) == ["settings.json", "thesis.txt"]
    assert (run / "thesis.txt").read_text() == "years of work"


def test_evaluating_what_is_no_run(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert f"--evaluate {tmp_path}/x: no such folder" in refused("--evaluate", tmp_path / "x")
    assert f"--evaluate {tmp_path}: is not a run: no settings.json in it" in refused("--evaluate", tmp_path)
    (tmp_path / "settings.json").write_text("[]")
    assert "settings.json: expected a JSON object, got list" in refused("--evaluate", tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"config": "vanilla", "tasks": ["sst"], "colour": "red"}))
    assert "unknown setting 'colour'" in refused("--evaluate", tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"config": "vanilla", "tasks": ["sst"]}))
    assert "the run has no checkpoint yet" in refused("--evaluate", tmp_path)
    assert "--lr: has no effect with --evaluate" in refused("--evaluate", tmp_path, "--lr", "1")
    limited = refused("--evaluate", tmp_path, "--split", "test", "--dev-limit", "3")
    assert "--dev-limit: has no effect with --split test, which is evaluated whole" in limited
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


def test_the_script_itself_prints_no_traceback(tmp_path: Path) -> None:
    found = subprocess.run(command("--data-dir", tmp_path / "none"), **run_options())  # type: ignore[call-overload]
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr == f"error: --data-dir {tmp_path / 'none'}: no such folder\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "fast"}, "settings.json: setting 'lr': expected float, got 'fast'"),
        ({"batch_size": 2.5}, "setting 'batch_size': expected int, got 2.5"),
        ({"compile": 1}, "setting 'compile': expected bool, got 1"),
        ({"norm": "3"}, "setting 'norm': expected one of inf, 2, got '3'"),
        ({"tasks": "sst"}, "setting 'tasks': expected a list of names, got 'sst'"),
        ({"epochs": 10**30}, "--epochs: expected a whole number from 1 to 2147483647, got 1000"),
        ({"data_dir": "a\0b"}, "setting 'data_dir': expected a name without NUL"),
    ],
)
def test_settings_of_another_type(
    change: dict[str, object], message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"config": "vanilla", "tasks": ["sst"], **change}))
    assert message in refused("--evaluate", tmp_path)


def test_encoder_files_of_another_form(tmp_path: Path, refused: Callable[..., str], encoder: Path) -> None:
    def changed(name: str, content: str) -> str:
        folder = Path(shutil.copytree(encoder, tmp_path / "e", dirs_exist_ok=True))
        (folder / name).write_text(content)
        line = refused("--encoder", folder, "--output-dir", tmp_path / "run")
        shutil.rmtree(folder)
        return line

    config = json.loads((encoder / "config.json").read_text())
    assert "not valid JSON (nested too deeply)" in changed("config.json", "[" * 100_000)
    assert "hidden_size: expected an integer of at most 65536" in changed(
        "config.json", json.dumps({**config, "hidden_size": 2 * 10**9})
    )
    assert "the weights do not fit" in changed("config.json", json.dumps({**config, "num_hidden_layers": 500}))
    assert "not a readable safetensors file" in changed("model.safetensors", "x")
    assert "not a readable tokenizer" in changed("tokenizer.json", "{}")
    shutil.copytree(encoder, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for index in ({}, {"weight_map": 3}, {"weight_map": {"a": "../elsewhere.safetensors"}}, {"weight_map": {"a": 1}}):
        (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "index.json: weight_map: expected an object" in refused("--encoder", tmp_path / "sharded")


def test_a_parser_that_panics_is_one_line() -> None:
    class PanicException(BaseException):
        """As pyo3's: no Exception."""

    with pytest.raises(InputError, match="file: not a readable tokenizer"), parsing(Path("file"), "tokenizer"):
        raise PanicException("index out of bounds\nat line 3")
    with pytest.raises(KeyboardInterrupt), parsing(Path("file"), "tokenizer"):
        raise KeyboardInterrupt


def test_odd_names(tmp_path: Path, refused: Callable[..., str], encoder: Path) -> None:
    assert "name too long" in refused("--encoder", encoder, "--output-dir", tmp_path / ("x" * 256)).lower()
    assert "no such folder" in refused("--data-dir", tmp_path / "two\nlines", "--encoder", encoder)
    os.mkfifo(tmp_path / "settings.json")  # would be waited for
    assert "settings.json: expected a file" in refused("--evaluate", tmp_path)


def test_outputs_that_are_no_numbers_are_told_where_no_error_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    torch.nn.init.constant_(model[2].bias, torch.nan)

    def call() -> None:
        SmartLoss(model, embedding="0")(lambda m: m(torch.tensor([[1], [2]])))

    def diverge() -> None:
        call()
        raise diverged("at step 1 the loss is nan")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with lines_for_warnings():
            call()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: the clean output of the model is not finite, before any perturbation")
        with pytest.raises(Diverged, match="at step 1"), lines_for_warnings():
            diverge()
        assert capsys.readouterr().err == ""
        before = warnings.showwarning
        with pytest.warns(DeprecationWarning, match="of Python"), lines_for_warnings():
            warnings.warn("of Python", DeprecationWarning, stacklevel=1)  # others go where they went before
        assert capsys.readouterr().err == ""
        assert warnings.showwarning is before
