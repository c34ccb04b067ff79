"""The study: what it runs, what it computes, what it leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from example_tools import tiny_encoder
from scipy.stats import pearsonr

from minbert import InputError
from minbert.cli import build_parser
from minbert.study import cli as study
from minbert.study import summary
from minbert.study.runs import Run, command, execute
from minbert.study.statistics import compare, metric
from minbert.tasks import TASKS

FLAGS = {"all": ["--encoder", "E", "--epochs", "1"], "pretrain": [], "finetune": ["--lr", "0.1"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A study of two configurations and two seeds; its command line."""
    folder = tmp_path_factory.mktemp("study")
    encoder = tiny_encoder(folder / "encoder", layers=1, size=8)
    flags = f"--encoder {encoder} --epochs 1 --train-limit 16 --dev-limit 20"
    line = ["--output-dir", str(folder / "study"), "--configs", "t-smart,vanilla", "--modes", "finetune"]
    line += ["--seeds", "0,1", "--resamples", "50", "--flags", flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "execute", in_process)
        assert study.main(line) == 0
    return line


def in_process(line: list[str], log: Path) -> None:
    from minbert.cli import main

    assert main(line[2:]) == 0


def test_what_a_study_leaves(finished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(finished[1])
    results = json.loads((folder / "results.json").read_text())
    assert results["reference"] == "vanilla"
    assert [(run["config"], run["seed"]) for run in results["runs"]] == [
        ("vanilla", 0), ("t-smart", 0), ("vanilla", 1), ("t-smart", 1),
    ]  # fmt: skip
    cells = results["summary"]["finetune"]
    for task in ("sst", "para", "sts"):
        measured = [run["dev"][task][TASKS[task].metric] for run in results["runs"] if run["config"] == "t-smart"]
        assert cells["t-smart"][task]["mean"] == pytest.approx(np.mean(measured), abs=1e-6)
        assert cells["t-smart"][task]["std"] == pytest.approx(np.std(measured, ddof=1), abs=1e-6)
        low, high = cells["t-smart"][task]["interval"]
        assert low <= high
        assert cells["vanilla"][task]["interval"] is None
    assert results["dev_rows"] == {"sst": 20, "para": 20, "sts": 20}
    assert [len(run["epochs"]) for run in results["runs"]] == [1] * 4
    assert results["runs"][1]["settings"]["config"] == "t-smart"
    assert str(folder.parent) not in (folder / "results.json").read_text()  # it can be given away
    table = (folder / "results.md").read_text()
    assert "Seeds: 2. Dev rows: sst 20, para 20, sts 20." in table
    assert "over dev rows and seeds)" in table
    assert "| t-smart |" in table
    assert "## After finetune" in table
    for name in ("finetune.png", "t-smart-sentiment.png"):
        assert (folder / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_run_again(finished: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(study, "execute", lambda line, log: made.append(log.stem))
    assert study.main(finished) == 0
    assert made == []
    (Path(finished[1]) / "runs" / "finetune-vanilla-seed1" / "metrics.json").unlink()

    def complete(line: list[str], log: Path) -> None:
        made.append(log.stem)
        assert line[-1] == "--resume"
        in_process(line, log)

    monkeypatch.setattr(study, "execute", complete)
    assert study.main(finished) == 0
    assert made == ["finetune-vanilla-seed1"]


def test_a_study_keeps_to_its_flags(finished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main([*finished[:-1], "--epochs 2"]) == 2
    assert "holds a study with other flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "vanilla,best"], "--configs: expected any of baseline,vanilla"),
        (["--modes", "guess"], "--modes: expected any of pretrain,finetune"),
        (["--seeds", "one"], "--seeds: expected whole numbers separated by commas, got 'one'"),
        (["--flags", "--config vanilla"], "--flags: --config is what the study sets for each run; leave it out"),
        (["--flags=--seed=7"], "--flags: --seed is what the study sets"),
        (["--finetune-flags=--init-from=x"], "--finetune-flags: --init-from is what the study sets"),
        (["--pretrain-flags", "--output-dir x"], "--pretrain-flags: --output-dir is what the study sets"),
        (["--flags", "--epochs '2"], "--flags: No closing quotation"),
        (["--flags", "--colour red"], "--flags: unrecognized arguments: --colour red"),
        (["--flags=--help"], "--flags: --help: run minbert_multitask.py --help instead"),
        (["--reference", "best"], "--reference: expected any of baseline,vanilla"),
        (
            ["--configs", "baseline,vanilla", "--reference", "t-smart"],
            "--reference: expected one of --configs, baseline,vanilla, got 't-smart'",
        ),
        (["--seeds", "\u00b2"], "--seeds: expected whole numbers separated by commas"),
        (["--resamples", "0"], "--resamples: expected a whole number of at least 1, got 0"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--output-dir", str(tmp_path / "s"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    (tmp_path / "thesis.txt").write_text("x")
    assert study.main(["--output-dir", str(tmp_path)]) == 2
    assert "is not an empty folder and holds no study" in capsys.readouterr().err


def test_command_lines(tmp_path: Path) -> None:
    run = Run("finetune", "t-smart", 3)
    line = command(run, tmp_path, ["pretrain", "finetune"], FLAGS)
    text = " ".join(line)
    assert f"--init-from {tmp_path}/runs/pretrain-t-smart-seed3" in text
    assert "--encoder" not in text
    assert "--lr 0.1" in text
    assert "--seed 3" in text
    assert "--resume" not in text
    both = {**FLAGS, "all": ["--encoder=E", "--epochs", "1"]}
    assert not [word for word in command(run, tmp_path, ["pretrain", "finetune"], both) if "--encoder" in word]
    alone = " ".join(command(run, tmp_path, ["finetune"], FLAGS))
    assert "--init-from" not in alone
    assert "--encoder E" in alone
    assert "--lr" not in command(Run("pretrain", "vanilla", 0), tmp_path, ["pretrain"], FLAGS)


def test_the_quick_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def small(line: list[str], log: Path) -> None:
        made.append(log.stem)
        encoder = [] if "--init-from" in line else ["--encoder", str(tiny_encoder(tmp_path / "e", layers=1, size=8))]
        in_process([*line, *encoder], log)

    monkeypatch.setattr(study, "execute", small)
    assert study.main(["--output-dir", str(tmp_path / "study"), "--quick"]) == 0
    assert made == [f"{mode}-{config}-seed0" for config in ("vanilla", "t-smart") for mode in ("pretrain", "finetune")]
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert [run["steps"] for run in results["runs"]] == [3] * 4
    assert {path.name for path in (tmp_path / "study" / "figures").iterdir()} == {
        "pretrain.png", "finetune.png", "t-smart-sentiment.png",
    }  # fmt: skip


def test_a_cell_is_what_its_label_says(
    finished: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "execute", lambda line, log: pytest.fail("nothing is left to run"))
    folder = Path(shutil.copytree(finished[1], tmp_path / "study"))
    again = ["--output-dir", str(folder), *finished[2:]]
    cell = folder / "runs" / "finetune-t-smart-seed1"

    def refused(file: Path, content: str) -> str:
        before = file.read_text()
        file.write_text(content)
        assert study.main(again) == 2
        file.write_text(before)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        return line

    other = (folder / "runs" / "finetune-t-smart-seed0" / "metrics.json").read_text()
    assert "--seed is 0 there, but 1 is what the study has" in refused(cell / "metrics.json", other)
    vanilla = (folder / "runs" / "finetune-vanilla-seed1" / "metrics.json").read_text()
    assert "--config is 'vanilla' there, but 't-smart' is" in refused(cell / "metrics.json", vanilla)
    assert "no metrics of a run (not valid JSON" in refused(cell / "metrics.json", "")
    predictions = cell / "predictions" / "sst-dev-output.csv"
    assert "not a file of predictions" in refused(predictions, "id \t x \nnothing\n")
    rows = predictions.read_text().splitlines(keepends=True)
    assert "its rows are not those of the dev data" in refused(predictions, "".join(rows[:-1]))
    assert "study.json: not valid JSON" in refused(folder / "study.json", "{")
    assert study.main(again) == 0


def test_quick_is_what_other_flags_leave_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []

    def note(line: list[str], log: Path) -> None:
        lines.append(line)
        raise InputError("enough")

    monkeypatch.setattr(study, "execute", note)
    flags = ["--output-dir", str(tmp_path / "s"), "--quick", "--seeds", "5", "--flags", "--epochs 2"]
    assert study.main(flags) == 2
    given = vars(build_parser().parse_args(lines[0][2:]))
    assert (given["seed"], given["epochs"], given["max_steps"], given["config"]) == (5, 2, 3, "vanilla")


def test_a_failed_run_stops_the_study(tmp_path: Path) -> None:
    import sys

    with pytest.raises(InputError, match=r"bad: ended with exit code 3"):
        execute([sys.executable, "-c", "print('so far'); raise SystemExit(3)"], tmp_path / "logs" / "bad.txt")
    assert (tmp_path / "logs" / "bad.txt").read_text() == "so far\n"


def test_metrics_of_predictions() -> None:
    draw = np.random.default_rng(0)
    predictions, labels = draw.normal(size=(2, 30)), draw.normal(size=30)
    expected = [pearsonr(row, labels).statistic for row in predictions]
    np.testing.assert_allclose(metric(TASKS["sts"], predictions, labels), expected)
    assert metric(TASKS["sts"], np.ones(30), labels) == 0
    assert np.isnan(metric(TASKS["sts"], labels, np.ones(30)))
    assert metric(TASKS["sst"], np.array([1.0, 2, 3]), np.array([1.0, 2, 0])) == pytest.approx(2 / 3)


def test_intervals() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400).astype(float)
    good = np.stack([np.where(draw.random(400) < 0.9, labels, 1 - labels) for _ in range(3)])
    bad = np.stack([np.where(draw.random(400) < 0.6, labels, 1 - labels) for _ in range(3)])
    cell = compare(TASKS["para"], good, bad, labels, resamples=300)
    assert cell.interval is not None
    assert cell.difference == pytest.approx(0.3, abs=0.05)
    assert 0.2 < cell.interval[0] < cell.difference < cell.interval[1] < 0.4
    same = compare(TASKS["para"], good, good, labels, resamples=50)
    assert same.interval == (0.0, 0.0)  # paired: the same rows and seeds in both
    # The usual two-proportion interval for one seed, unpaired errors: 1.96 * sqrt(.09/400 + .24/400)
    single = compare(TASKS["para"], good[:1], bad[:1], labels, resamples=2000)
    assert single.std is None
    assert single.interval is not None
    assert (single.interval[1] - single.interval[0]) / 2 == pytest.approx(0.0563, rel=0.15)


def test_what_is_kept_of_a_run_has_no_path(finished: list[str]) -> None:
    """Of a fine-tuning run of a study of both modes, on data of the user's own."""
    metrics = json.loads((Path(finished[1]) / "runs" / "finetune-vanilla-seed0" / "metrics.json").read_text())
    paths = {name: f"/home/somebody/{name}" for name in ("init_from", "data_dir", "encoder")}
    kept = study._kept(metrics | {"settings": metrics["settings"] | paths})
    assert "somebody" not in json.dumps(kept)
    assert kept["settings"]["seed"] == 0


def test_the_figure_by_epoch_is_of_t_smart_in_the_last_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(summary, "bars", lambda *_: None)
    monkeypatch.setattr(summary, "accuracy_by_epoch", lambda histories, title, file: drawn.append((histories, title)))
    cell = {"mean": 0.5, "std": None, "seeds": 1, "difference": None, "interval": None}
    cells = {config: {"sst": cell} for config in ("vanilla", "t-smart")}
    runs = [
        {"mode": mode, "config": config, "epochs": [mode, config]}
        for mode in ("pretrain", "finetune")
        for config in ("vanilla", "t-smart")
    ]
    summary.figures({"runs": runs, "summary": {"pretrain": cells, "finetune": cells}}, tmp_path)
    assert drawn == [([["finetune", "t-smart"]], "t-smart, finetune: sentiment by epoch")]
