"""Whole runs of the example on small encoders: configurations, outputs, evaluation, starting from another run."""

import csv
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from example_tools import SAMPLE, command, run_options, tiny_encoder
from safetensors.torch import load_file
from scipy.stats import pearsonr

from minbert.cli import main
from minbert.evaluate import read_predictions

CONFIGS = ("baseline", "vanilla", "t-vanilla", "t-bregman", "t-smart")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), layers=1, size=8)


def run(folder: Path, encoder: Path, *arguments: object, epochs: int = 1) -> dict:  # type: ignore[type-arg]
    base = ["--encoder", encoder, "--output-dir", folder, "--train-limit", 16, "--epochs", epochs, "--dev-limit", 20]
    assert main([str(argument) for argument in [*base, *arguments]]) == 0
    return json.loads((folder / "metrics.json").read_text())  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (folder / "checkpoints").iterdir()
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("option", ["pretrain", "finetune"])
def test_every_configuration_and_option(config: str, option: str, encoder: Path, tmp_path: Path) -> None:
    tasks = "sst,para,sts,cfimdb"
    metrics = run(tmp_path / "run", encoder, "--config", config, "--option", option, "--tasks", tasks)
    assert metrics["config"] == config
    assert list(metrics["dev"]) == tasks.split(",")
    assert set(metrics["dev"]["sst"]) == {"accuracy", "nll", "n"}
    assert set(metrics["dev"]["sts"]) == {"pearson", "mse", "n"}
    trained = ["sst", "cfimdb"] if config == "baseline" else tasks.split(",")
    losses = metrics["epochs"][0]["losses"]
    assert sorted(losses) == sorted(trained)
    for line in losses.values():
        assert ("smoothness" in line) == (config == "t-smart")
        assert ("ascent_gain" in line) == (config == "t-smart")
        assert ("proximal" in line) == (config in ("t-bregman", "t-smart"))
        if config == "t-smart":
            assert line["smoothness"] > 0
            assert line["bad_examples"] == 0

    before, after = load_file(encoder / "model.safetensors"), weights(tmp_path / "run")
    same = all(torch.equal(value, after[f"encoder.{key}"]) for key, value in before.items())
    assert same == (option == "pretrain")


def test_baseline_is_evaluated_on_all_three_tasks(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(tmp_path / "run", encoder, "--config", "baseline")
    out = capsys.readouterr().out
    assert "sst (n=20)" in out
    assert "para* (n=20)" in out
    assert "*: not trained on." in out
    assert list(metrics["dev"]) == ["sst", "para", "sts"]
    assert list(metrics["epochs"][0]["losses"]) == ["sst"]
    assert metrics["dev"]["para"]["n"] == 20


@pytest.mark.parametrize("flags", [(), ("--beta", "paper"), ("--mu", 0)])
def test_a_run_shorter_than_the_teacher_s_interval(flags: tuple[object, ...], encoder: Path, tmp_path: Path) -> None:
    """Its teacher stays where it began."""
    metrics = run(tmp_path / "run", encoder, "--config", "t-smart", "--tasks", "sst", "--inner-steps", 100, *flags)
    assert metrics["steps"] == 1


def test_what_a_run_leaves(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    metrics = run(folder, encoder, epochs=2)
    out = capsys.readouterr().out
    for word in ("majority", "untrained", "trained", "sst (n=20)", "pearson"):
        assert word in out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == metrics["epochs"]
    assert [line["epoch"] for line in lines] == [1, 2]
    last = lines[-1]
    assert last["dev"] == metrics["dev"]
    assert last["gap"]["sst"] == pytest.approx(last["train"]["sst"]["accuracy"] - last["dev"]["sst"]["accuracy"])
    for name in ("step_seconds_median", "peak_memory_bytes"):
        assert metrics[name] > 0
    assert (folder / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.pkl")) + list(folder.rglob("*.unfinished"))

    # The submission files hold what the metrics say, in the order of the data.
    with (SAMPLE / "sts-dev.csv").open() as file:
        gold = {row["id"]: float(row["similarity"]) for row in csv.DictReader(file, delimiter="\t")}
    predicted = read_predictions(folder / "predictions" / "sts-dev-output.csv")
    assert len(predicted) == 20
    assert [row for row, _ in predicted] == [row for row in gold if row in dict(predicted)]
    text = (folder / "predictions" / "sst-dev-output.csv").read_text().splitlines()
    assert text[0] == "id \t Predicted_Sentiment "
    assert text[1].split(" , ")[1].strip() in "01234"
    correlation = pearsonr([value for _, value in predicted], [gold[row] for row, _ in predicted]).statistic
    assert correlation == pytest.approx(metrics["dev"]["sts"]["pearson"], abs=1e-5)


def test_evaluate_prints_one_json_object(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    metrics = run(folder, encoder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(["--evaluate", str(folder), "--dev-limit", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    for task, values in metrics["dev"].items():
        assert found[task] == pytest.approx(values)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_label_less_files_are_predicted_and_not_scored(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(SAMPLE, tmp_path / "data"))
    for stem in ("ids-sst", "quora"):
        rows = (data / f"{stem}-dev.csv").read_text().splitlines()[:9]
        (data / f"{stem}-test-student.csv").write_text("\n".join(row.rsplit("\t", 1)[0] for row in rows))
    shutil.copy(data / "sts-dev.csv", data / "sts-test.csv")
    run(tmp_path / "run", encoder, "--data-dir", data)
    written = {path.name for path in (tmp_path / "run" / "predictions").iterdir()}
    splits = {f"{task}-{split}-output.csv" for task in ("sst", "para", "sts") for split in ("dev", "test")}
    assert written == splits
    assert len(read_predictions(tmp_path / "run" / "predictions" / "sst-test-output.csv")) == 8
    capsys.readouterr()
    arguments = [
        "--evaluate",
        tmp_path / "run",
        "--data-dir",
        data,
        "--split",
        "test",
        "--output-dir",
        tmp_path / "out",
    ]
    assert main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["sst"] == {"accuracy": None, "n": 8}
    assert found["sts"]["n"] == 70
    assert "predicted, not scored" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {n for n in splits if "test" in n}


def test_finetuning_starts_from_a_pretrain_run(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "pretrain", tmp_path / "finetune"
    pretrained = run(first, encoder, "--option", "pretrain")
    arguments = ["--init-from", first, "--output-dir", second, "--train-limit", 16, "--dev-limit", 20, "--epochs", 1]
    assert main([str(argument) for argument in arguments]) == 0
    finetuned = json.loads((second / "metrics.json").read_text())
    assert finetuned["untrained"]["sst"]["nll"] == pytest.approx(pretrained["dev"]["sst"]["nll"])
    capsys.readouterr()
    for extra, message in (
        (["--pooling", "cls"], "its pooling is 'mean', here it is 'cls'"),
        (["--tasks", "sst,cfimdb"], "that run has no head for cfimdb"),
    ):
        assert main([str(a) for a in [*arguments[:2], "--output-dir", tmp_path / "third", *extra]]) == 2
        assert message in capsys.readouterr().err
    assert main(["--init-from", str(first), "--encoder", "x", "--output-dir", str(tmp_path / "third")]) == 2
    assert "--encoder: has no effect with --init-from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grad-accum", "3"],
        ["--memory-efficient"],
        ["--gradient-checkpointing"],
        ["--dtype", "float64", "--dropout", "0"],
        ["--interleave", "round-robin", "--lr-schedule", "howard-ruder"],
        ["--pooling", "cls", "--head-layers", "3", "--head-activation", "none"],
        ["--preset", "report", "--lr-schedule", "equation3"],
        ["--amp", "bf16", "--epsilon", "0.5"],
        ["--norm", "2", "--norm-over", "token", "--ascent-steps", "2", "--beta", "paper", "--inner-steps", "2"],
        ["--smart-dropout", "independent", "--detach-reference", "--ascent", "normalized", "--ascent-steps", "1"],
        ["--start", "noise", "--noise-std", "1", "--ascent", "normalized"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_flags_that_change_how_it_trains(arguments: list[str], encoder: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", encoder, *arguments)
    assert metrics["epochs"][0]["losses"]["sst"]["smoothness"] > 0
    assert all(values["n"] == 20 for values in metrics["dev"].values())


def test_closed_streams_and_a_reader_of_both_that_goes_away(encoder: Path, tmp_path: Path) -> None:
    """As under a daemon, and as with `2>&1 | head`; the exit code is that of the work."""
    flags = ["--encoder", encoder, "--tasks", "sst", "--train-limit", 8, "--dev-limit", 6, "--epochs", 1]
    line = shlex.join(command("--output-dir", tmp_path / "closed", *flags))
    assert subprocess.run(["sh", "-c", f"{line} >&- 2>&-"], env=run_options()["env"], check=False).returncode == 0
    assert (tmp_path / "closed" / "metrics.json").exists()
    (tmp_path / "closed" / "metrics.json").unlink()  # an evaluation notes on stderr that it is not complete
    wrong = [*flags, "--output-dir", tmp_path / "diverged", "--lr", 1e30, "--epochs", 2]
    evaluation = ["--evaluate", tmp_path / "closed", "--output-dir", tmp_path / "predictions"]
    for arguments, code in ((wrong, 4), (evaluation, 0)):
        reader, writer = os.pipe()
        os.close(reader)
        found = subprocess.run(command(*arguments), stdout=writer, stderr=writer, env=run_options()["env"], check=False)
        os.close(writer)
        assert found.returncode == code
    assert (tmp_path / "predictions" / "sst-dev-output.csv").exists()


@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_goes_away_ends_nothing(lines: int, encoder: Path, tmp_path: Path) -> None:
    """As `head` does."""
    flags = ["--encoder", encoder, "--tasks", "sst", "--train-limit", 24, "--dev-limit", 10, "--batch-size", 4]
    whole = ["--output-dir", tmp_path / "run", *flags, "--epochs", 2]
    ended = []
    for arguments in (whole, ["--evaluate", tmp_path / "run"]):
        options = {key: value for key, value in run_options().items() if key in ("text", "env")}
        with subprocess.Popen(command(*arguments), stdout=-1, stderr=-1, **options) as started:  # type: ignore[call-overload]
            for _ in range(lines):
                started.stdout.readline()
            started.stdout.close()
            said = started.stderr.read()
        ended.append((said, started.returncode))
    assert ended == [("", 0), ("", 0)]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 12


def test_a_compiled_run_trains_alike(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend that traces and does not generate code, which would take a minute here."""
    compiled = []

    def traced(model: torch.nn.Module, **options: object) -> object:
        compiled.append(options)
        return original(model, backend="eager", **options)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    exact = ["--dtype", "float64", "--dropout", "0", "--max-steps", 2, "--tasks", "sst"]
    run(tmp_path / "a", encoder, *exact)
    run(tmp_path / "b", encoder, *exact, "--compile")
    assert compiled == [{"dynamic": True}]
    reference = weights(tmp_path / "a")
    for key, value in weights(tmp_path / "b").items():
        assert (value - reference[key]).abs().max() <= 1e-9, key


def test_memory_efficient_and_accumulated_runs_train_alike(encoder: Path, tmp_path: Path) -> None:
    exact = ["--dtype", "float64", "--dropout", "0"]
    run(tmp_path / "a", encoder, *exact, "--batch-size", 8)
    run(tmp_path / "b", encoder, *exact, "--batch-size", 8, "--memory-efficient")
    run(tmp_path / "c", encoder, *exact, "--batch-size", 4, "--grad-accum", 2)
    run(tmp_path / "d", encoder, *exact, "--batch-size", 8, "--gradient-checkpointing")
    reference = weights(tmp_path / "a")
    for other in "bcd":
        for key, value in weights(tmp_path / other).items():
            assert (value - reference[key]).abs().max() <= 1e-9, (other, key)


def test_seeds_decide_the_run(encoder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, encoder, "--seed", seed)
    first, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    assert not torch.equal(first["heads.sst.1.weight"], other["heads.sst.1.weight"])


def test_steps_can_be_bounded(encoder: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", encoder, "--max-steps", 2, epochs=3)
    assert metrics["steps"] == 2
    assert len(metrics["epochs"]) == 1


def test_unusable_rows_are_reported(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(shutil.copytree(SAMPLE, tmp_path / "data"))
    lines = (data / "quora-train.csv").read_text().splitlines(keepends=True)
    lines[3] = lines[3].rsplit("\t", 1)[0] + "\t\n"
    (data / "quora-train.csv").write_text("".join(lines))
    run(tmp_path / "run", encoder, "--data-dir", data)
    assert "quora-train.csv:4: is_duplicate is empty" in capsys.readouterr().out.replace("\n", "")


def test_the_default_run_beats_the_baselines(tmp_path: Path) -> None:
    """The real encoder, the sample, no flags but the folder."""
    assert main(["--output-dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"] == "t-smart"
    assert metrics["dev"]["sst"]["accuracy"] > metrics["baseline"]["sst"]["accuracy"] + 0.15
    assert metrics["dev"]["para"]["accuracy"] > metrics["baseline"]["para"]["accuracy"] + 0.15
    assert metrics["dev"]["sts"]["pearson"] > metrics["baseline"]["sts"]["pearson"] + 0.5
    for task, measure in (("sst", "nll"), ("para", "nll")):
        assert metrics["dev"][task][measure] < metrics["untrained"][task][measure]
