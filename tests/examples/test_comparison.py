"""The comparison of arms: rows, stages, runs that go on, and tables that refuse what cannot be compared."""

import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from example_tools import SAMPLE, tiny_encoder

from minbert import InputError
from minbert.data import read_split
from minbert.distributed import Place
from minbert.files import write_json, write_text
from minbert.progress import hidden
from minbert.study import arms_cli, figures, matched, stages, tables, workers
from minbert.study import trial as trial_module
from minbert.study.arms import choice_of
from minbert.study.bootstrap import Difference
from minbert.study.record import JOINT, ZERO_SHOT, code_version, packed, read
from minbert.study.split import parts
from minbert.study.stages import Rung, Stage, check_budget, ranking, upcoming
from minbert.study.together import OTHER_SEED, Partner, mean_prediction
from minbert.study.trial import Trial, Watch, run
from minbert.tasks import TASKS
from minbert.train import Trainer

ESTIMATE = Stage(("sst",), 16, ("t-vanilla", "smart"), seeds=3, held_out=60)
SEARCH = Stage(("sst",), 16, ("t-vanilla", "smart"), rungs=(Rung(4, 1), Rung(2, 3)), held_out=60)
CHOSEN = replace(ESTIMATE, arms=("t-vanilla", "smart", "longer"), settings_from="search")


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"estimate": ESTIMATE, "search": SEARCH, "chosen": CHOSEN}
    for module in (stages, tables, figures, workers, arms_cli):
        monkeypatch.setattr(module, "STAGES", table)


def made_up(trial: Trial, gain: float = 0.0) -> dict[str, Any]:
    """A record as a run would leave it, with numbers drawn: `gain` is added to what its seed alone decides."""
    draw = np.random.default_rng(trial.seed)
    right = (draw.random(400) < 0.5 + gain).astype(float)
    nll = draw.gamma(1.0, 1.0, 400) - gain
    held = {
        "accuracy": float(right.mean()),
        "nll": float(nll.mean()),
        "nll_scaled": 1.0,
        "ece": 0.1,
        "ece_scaled": 0.05,
    }
    dev = {"accuracy": float(right[:100].mean()), "nll": float(nll[:100].mean())}
    by_row = {"accuracy": packed(right), "nll": packed(nll)}
    moments = {
        "last": {"sst": {"dev": dev, "held_out": {**held, "by_row": by_row}}},
        "best": {"sst": {"dev": dev, "held_out": held}},
    }
    weights = {name: trial.choice.get(name, 0.0) for name in ("lambda_s", "mu")}
    losses = {"sst": {"task_loss": 0.5, "smoothness": 0.1 * trial.seed}}
    return {
        "name": trial.name, "arm": trial.arm, "trial": trial.number, "seed": trial.seed, "choice": trial.choice,
        "settings": {"seed": trial.seed, "lr": trial.choice["lr"], **weights},
        "epochs": [{"losses": losses}], "code": "abc", "commit": "0123456789ab",
        "torch": "2", "device": "cpu", "data": f"data of seed {trial.seed}", "steps": 10,
        "cpu_seconds_a_step": 1 + gain, **moments,
    }  # fmt: skip


def fill(folder: Path, stage: Stage, gains: dict[str, float], searched: list[dict[str, Any]] | None = None) -> None:
    """Makes up all the runs of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    while todo := upcoming(stage, read(folder), searched or []):
        for trial in todo:
            gain = gains.get(trial.arm, 0.0) + gains.get(f"{trial.arm} {trial.number}", 0.0)
            write_json(folder / f"{trial.name}.json", made_up(trial, gain))


def test_the_three_parts_never_meet() -> None:
    one, other = parts(SAMPLE, "sst", 32, seed=0, held_out=60), parts(SAMPLE, "sst", 64, seed=1, held_out=60)
    ids = {name: {e.id for e in getattr(one, name).examples} for name in one._fields}
    assert (len(ids["train"]), len(ids["held_out"])) == (32, 60)
    assert not ids["train"] & ids["held_out"]
    assert [e.id for e in one.held_out.examples] == [e.id for e in other.held_out.examples]  # fixed once
    assert ids["train"] != {e.id for e in other.train.examples[:32]}  # a seed draws its own
    larger = parts(SAMPLE, "sst", 64, seed=0, held_out=60)
    assert ids["train"] == {e.id for e in larger.train.examples[:32]}
    everything = parts(SAMPLE, "sst", None, seed=0, held_out=60)
    assert len(everything.train.examples) == 160 - 60
    labels = [e.label for e in one.held_out.examples]
    assert labels != sorted(labels)  # the order is a draw, so that the first rows stand for all
    with pytest.raises(InputError, match=r"rows: expected 1 to 100 of sst, where 60 of 160 are kept, got 101"):
        parts(SAMPLE, "sst", 101, seed=0, held_out=60)


def test_a_run_leaves_numbers_and_no_text(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    choice = choice_of("smart", 0) | {"epochs": 2, "head_lr": 3e-3}
    trial = Trial("smart", 0, choice, 0, ("sst",), 16, judged=True, probed=True, held_out=60)
    record = run(trial, SAMPLE, encoder=str(encoder))
    again = run(replace(trial, probed=False), SAMPLE, encoder=str(encoder))
    assert again["last"] == record["last"]  # a run made again has the same numbers
    assert record["steps"] == 2
    assert len(record["dev"]) == 2
    assert record["last"]["sst"]["held_out"]["n"] == 60
    assert 1 <= record["best_epoch"] <= 2
    assert set(record["probes"]["sst"]) == {
        "clean", "typos", "dropped", "swapped", "upper", "embeddings 0.1", "embeddings 0.3", "embeddings 1",
    }  # fmt: skip
    assert record["probes"]["cfimdb"]["transfer"]["n"] == 22
    text = json.dumps(record)
    assert "by_row" not in record["best"]["sst"]["held_out"]
    assert len(text) < 6000
    everything = parts(SAMPLE, "sst", None, 0, 60)
    rows = [row for part in everything for row in part.examples]
    pairs = {f"{a} {b}" for row in rows for a, b in itertools.pairwise(row.sentences[0].split())}
    assert len(pairs) > 1000
    assert not any(pair in text for pair in pairs)
    assert not any(row.id in text for row in rows)
    assert str(tmp_path) not in text


def test_two_runs_answer_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the run of `t-vanilla`, and one with another seed on the same rows, at the end of each epoch."""
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    choice = choice_of("two-runs", 0) | {"epochs": 2, "head_lr": 3e-3}
    seen: dict[str, list[torch.Tensor]] = {}
    see = Watch.__call__

    def watched(watch: Watch, trainer: Trainer) -> None:
        see(watch, trainer)
        seen.setdefault(key, []).append(watch.last_outputs["sst"])

    monkeypatch.setattr(Watch, "__call__", watched)
    trial = Trial("two-runs", 0, choice, 0, ("sst",), 16, judged=True, held_out=60)
    drawn = parts(SAMPLE, "sst", 16, seed=0, held_out=60)
    monkeypatch.setattr(trial_module, "parts", lambda *_: drawn)
    made = {}
    for key, arm, seed in (("two", "two-runs", 0), ("one", "t-vanilla", 0), ("other", "t-vanilla", OTHER_SEED)):
        made[key] = run(replace(trial, arm=arm, seed=seed), SAMPLE, encoder=str(encoder))
    assert len(seen["two"]) == 2
    for two, one, other in zip(*seen.values(), strict=True):
        assert not torch.allclose(one, other)
        torch.testing.assert_close(two.softmax(-1), (one.softmax(-1) + other.softmax(-1)) / 2)
    assert made["two"]["epochs"][-1]["losses"] == made["one"]["epochs"][-1]["losses"]
    assert made["two"]["steps"] == made["one"]["steps"]
    init = Partner.__init__

    def lasting(partner: Partner, trainer: Trainer) -> None:
        init(partner, trainer)
        assert partner.seconds > 0
        partner.seconds = 1e6

    monkeypatch.setattr(Partner, "__init__", lasting)
    assert run(trial, SAMPLE, encoder=str(encoder))["cpu_seconds_a_step"] > 1e6 / made["two"]["steps"]


@pytest.mark.parametrize(
    ("task", "outputs", "mean"),
    [
        ("sst", [[[0.0, 1, 2, 3, 4]], [[5.0, 0, 0, 0, 0]]], lambda outputs: outputs.softmax(-1)),
        ("para", [[-3.0, 200.0], [1.0, 150.0]], lambda outputs: outputs.sigmoid()),
        ("sts", [[1.0, 6.0], [2.0, 4.0]], lambda outputs: outputs),
    ],
)
def test_the_mean_of_predictions(task: str, outputs: list[Any], mean: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made = mean_prediction(TASKS[task], torch.tensor(outputs))
    assert bool(made.isfinite().all())
    torch.testing.assert_close(mean(made), mean(torch.tensor(outputs)).mean(0))


def test_two_models_have_no_one_embedding_to_move(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    trial = Trial("two-runs", 0, choice_of("two-runs", 0), 0, ("sst",), 16, judged=True, probed=True, held_out=60)
    with pytest.raises(TypeError, match="expected one model, got two that answer together"):
        run(trial, SAMPLE, encoder=str(encoder))


@pytest.mark.parametrize("better", [1, -1])
def test_the_best_epoch_is_measured_with_its_own_weights(
    better: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dev getting better all the time, and worse: best is the last epoch then, and the first."""
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    choice = choice_of("t-vanilla", 0) | {"epochs": 3, "lr": 0.03, "head_lr": 0.03}
    monkeypatch.setattr(Watch, "_quality", lambda watch, epoch: better * (epoch % len(watch.epochs)))
    trial = Trial("t-vanilla", 0, choice, 0, ("sst",), 16, judged=True, held_out=60)
    record = run(trial, SAMPLE, encoder=str(encoder))
    assert record["best_epoch"] == (3 if better > 0 else 1)
    assert record["best"]["sst"]["dev"] == record["dev"][record["best_epoch"] - 1]["sst"]
    last = record["last"]["sst"]["held_out"]
    same = record["best"]["sst"]["held_out"] == {key: value for key, value in last.items() if key != "by_row"}
    assert same == (better > 0)


def test_a_run_that_comes_apart_is_recorded(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    choice = choice_of("t-vanilla", 0) | {"lr": 1e30, "head_lr": 1e30, "epochs": 3}
    record = run(Trial("t-vanilla", 0, choice, 0, ("sst",), 16, judged=True, held_out=60), SAMPLE, encoder=str(encoder))
    assert record["last"]["sst"]["held_out"]["nll"] == pytest.approx(np.log(5))  # it says nothing
    json.dumps(record, allow_nan=False)


def test_a_search_does_not_see_the_rows_held_out(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    trial = upcoming(SEARCH, [])[1]
    assert trial.seed >= stages.SEARCH_SEEDS
    record = run(trial, SAMPLE, encoder=str(encoder))
    assert "held_out" not in record["last"]["sst"]
    assert len(record["dev"]) == 1
    assert "best" not in record


def test_a_stage_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    """With two worker processes, on the sample, from the command line's own function."""
    encoder = tiny_encoder(tmp_path / "encoder", layers=1, size=8)
    folder = tmp_path / "results" / "estimate"
    options = {"workers": 2, "encoder": str(encoder)}
    workers.complete("estimate", tmp_path / "results", SAMPLE, **options)
    assert len(list(folder.glob("*.json"))) == 6
    kept, lost = folder / "smart.0.seed1.json", folder / "t-vanilla.0.seed2.json"
    before, stamp = json.loads(lost.read_text()), kept.stat().st_mtime_ns
    lost.unlink()
    workers.complete("estimate", tmp_path / "results", SAMPLE, **options)
    after = json.loads(lost.read_text())
    assert kept.stat().st_mtime_ns == stamp
    assert after["last"] == before["last"]
    assert before["code"] == code_version()
    assert arms_cli.main(["report", "--results", str(tmp_path / "results"), "--output-dir", str(tmp_path / "out")]) == 0
    assert "| smart |" in (tmp_path / "out" / "tables.md").read_text()
    assert (tmp_path / "out" / "gain-sst.png").read_bytes().startswith(b"\x89PNG")
    lost.unlink()
    other = folder / "smart.0.seed2.json"
    write_json(other, json.loads(other.read_text()) | {"data": "other"})
    with pytest.raises(InputError, match=r"has data 'other', t-vanilla\.0\.seed2 has '"):
        workers.complete("estimate", tmp_path / "results", SAMPLE, **options)
    assert not lost.exists()  # what cannot be compared is not left there


def test_records_of_another_code_are_refused_before_a_run_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "estimate" / "x.json", made_up(upcoming(ESTIMATE, [])[0]) | {"code": "0123456789abcdef"})
    monkeypatch.setattr(workers, "make", lambda *_: pytest.fail("a run was made"))
    with pytest.raises(InputError, match=r"has code '0123456789abcdef'.*--results another.*out commit 0123456789"):
        workers.complete("estimate", tmp_path, SAMPLE, workers=1)
    write_json(tmp_path / "estimate" / "x.json", made_up(upcoming(ESTIMATE, [])[0]) | {"code": code_version()})
    with pytest.raises(InputError, match=r"has torch '2', a run made here would have.*to make the stage anew$"):
        workers.complete("estimate", tmp_path, SAMPLE, workers=1)


@pytest.mark.parametrize("content", ["[]", '{"name": "x"}', "{"])
def test_what_is_no_record_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "estimate" / "x.json"
    write_text(file, content)
    assert arms_cli.main(["status", "--results", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert line.endswith("remove it to have the run made again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "estimate", "--data-dir", str(SAMPLE), "--results", "{file}"], "{file}/estimate: cannot be written"),
        (["untrained", "--data-dir", str(SAMPLE), "--results", "{folder}"], "rows: expected 1 to 0 of sst"),
        (["report", "--results", "{folder}", "--output-dir", "{file}"], "{file}/tables.md: cannot be written"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tables, "make", lambda _: "")
    (tmp_path / "file").write_text("years of work")
    places = {"file": str(tmp_path / "file"), "folder": str(tmp_path / "results")}
    assert arms_cli.main([word.format(**places) for word in arguments]) in (2, 3)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith(f"error: {message.format(**places)}")


def test_one_worker_makes_any_number_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's pool can wait for ever where it replaces a process after so many tasks, so that one is not asked to."""
    monkeypatch.setattr(workers, "run", str)  # a run of no time, whose record is none
    monkeypatch.setattr(workers, "read", lambda _: [])
    monkeypatch.setattr(workers, "refuse_mixed", lambda *_: None)
    workers.make([SimpleNamespace(name=f"run{i}") for i in range(50)], tmp_path, {}, 1, "estimate")  # type: ignore[misc]
    assert len(list(tmp_path.iterdir())) == 50


def test_workers_draw_no_bars_and_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(torch.device("cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before = dict(os.environ)
    assert hidden(place) is None
    with workers.environment(workers.ALONE):
        assert hidden(place) is True
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert dict(os.environ) == before


def test_an_interrupted_stage_does_not_wait_for_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(running: Any) -> Any:
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "run", time.sleep)  # a run of an hour
    monkeypatch.setattr(workers, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workers.make([3600.0], tmp_path, {}, 1, "estimate")  # type: ignore[list-item]
    deadline = time.monotonic() + 120  # a process killed while it maps torch from a cold disk takes its time
    # Not `join`: where the pool's own thread has just reaped the process, it returns before that is noted.
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


KILLED = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from minbert.study.workers import alone

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=alone) as pool:
        pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        print("at work", flush=True)
"""


def test_no_worker_outlives_a_killed_study(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], env=os.environ | path, stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        assert study.stdout.readline() == "at work\n"
        study.kill()
        study.communicate(timeout=60)  # returns when nobody is left who could write


def test_halving_gives_every_arm_the_same(tmp_path: Path) -> None:
    # Of four trials the third is made the best; half are run again on two more seeds.
    fill(tmp_path, SEARCH, {"smart 2": 0.3, "t-vanilla 1": 0.3})
    records = read(tmp_path)
    assert len(records) == 2 * (4 + 2 * 2)
    assert workers.remaining(SEARCH, records) == 0
    assert workers.remaining(SEARCH, []) == len(records)
    assert ranking(SEARCH, records, "smart", 1)[0] == 2
    assert ranking(SEARCH, records, "t-vanilla", 1)[0] == 1
    check_budget(SEARCH, records)
    fewer = [record for record in records if record["name"] != "smart.2.seed1001"]
    with pytest.raises(InputError, match=r"unequal numbers of trials: t-vanilla 4 in 8 runs, smart 4 in 7 runs"):
        check_budget(SEARCH, fewer)


def test_the_table_of_a_search_has_the_loss_of_all_its_trials(tmp_path: Path) -> None:
    fill(tmp_path, SEARCH, {f"smart {number}": 0.1 * number for number in range(4)})
    records = read(tmp_path)
    losses = sorted(r["last"]["sst"]["dev"]["nll"] for r in records if r["arm"] == "smart" and r["seed"] == 1000)
    assert len(losses) == 4
    (row,) = [
        line for line in tables.search_table("search", SEARCH, records).splitlines() if line.startswith("| smart |")
    ]
    shown = [losses[0], (losses[1] + losses[2]) / 2, losses[3]]
    assert row.split(" | ")[1:6:4] == ["3", f"{shown[2]:.4f}"]
    assert [float(cell) for cell in row.split(" | ")[3:6]] == pytest.approx(shown, abs=1e-4)


def test_an_estimate_takes_what_the_search_chose(tmp_path: Path) -> None:
    fill(tmp_path, SEARCH, {"smart 2": 0.3, "t-vanilla 1": 0.3})
    searched = read(tmp_path)
    trials = {trial.arm: trial for trial in upcoming(CHOSEN, [], searched)}
    assert trials["smart"].choice == choice_of("smart", 2)
    assert trials["longer"].choice == {**choice_of("t-vanilla", 1), "stretch": 7 / 3}
    assert all(trial.judged for trial in trials.values())
    with pytest.raises(InputError, match="search: is not complete"):
        upcoming(CHOSEN, [], searched[1:])


def test_tables_of_made_up_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "estimate", ESTIMATE, {"smart": 0.25})
    fill(tmp_path / "search", SEARCH, {"smart 2": 0.3})
    write_json(tmp_path / ZERO_SHOT, {"sst": 0.2251})
    text = tables.make(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| smart |"))
    gain = np.mean([(np.random.default_rng(s).random(400) < 0.75).mean() for s in range(3)])
    assert f"| {gain:.4f} (+" in line
    assert "\\*" in line  # a gain of 0.25 on 400 rows and three seeds that agree
    assert line.endswith("| 1.25 |")  # made up as 1.25 times the CPU time a step
    assert "adjusted by Holm for 2 comparisons" in text
    assert "| smart | 2 |" in text
    assert "| untrained | 0.2251 |" in text
    terms = text.split("### sst, terms of the loss in the last epoch")[1].split("###")[0]
    assert "| t-vanilla | 0.5000 |  |  |" in terms
    assert "| smart | 0.5000 | 0.03 |  |" in terms  # 0.3 times the mean of 0, 0.1 and 0.2
    assert arms_cli.main(["status", "--results", str(tmp_path)]) == 0
    assert "estimate: 6 done, 0 to do" in capsys.readouterr().out


def test_all_tasks_together_have_their_table_and_figures(tmp_path: Path) -> None:
    """Of the `results.json` of a study, whose own table and figures they are."""
    one = {"seeds": 1, "std": None}
    plain = {"mean": 0.4, "difference": None, "interval": None, **one}
    smart = {"mean": 0.5, "difference": 0.1, "interval": [0.05, 0.15], **one}
    line = {"epoch": 1, "train": {"sst": {"accuracy": 0.6}}, "dev": {"sst": {"accuracy": 0.5}}}
    runs = [
        {"mode": mode, "config": config, "seed": 0, "epochs": [line]}
        for mode in ("pretrain", "finetune")
        for config in ("vanilla", "t-smart")
    ]
    cells = {"vanilla": {"sst": plain}, "t-smart": {"sst": smart}}
    joint = {"reference": "vanilla", "seeds": [0], "dev_rows": {"sst": 40}, "runs": runs}
    write_json(tmp_path / JOINT, joint | {"summary": {"pretrain": cells, "finetune": cells}})
    fill(tmp_path / "estimate", ESTIMATE, {"smart": 0.25})
    text = tables.make(tmp_path)
    part = text.split("\n## all tasks together, by configuration\n")[1].split("\n## ")[0]
    assert "Seeds: 1. Dev rows: sst 40." in part
    assert part.index("### After pretrain") < part.index("### After finetune")
    assert part.count("| t-smart | 0.500 (+0.100 [+0.050, +0.150]) | 0.500 |") == 2
    assert "difference from vanilla" in part
    assert "over dev rows alone, since there is one seed)" in part
    assert text.rindex("\n## ") == text.index("\n## all stages together")  # the last, as the pages say
    names = [file.name for file in figures.make(tmp_path, tmp_path)]
    assert names == ["gain-sst.png", "joint-pretrain.png", "joint-finetune.png", "joint-t-smart-sentiment.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_faults_stand_beside_the_arm_that_they_are_faults_in(tmp_path: Path) -> None:
    stage = replace(ESTIMATE, arms=("t-vanilla", "smart+mbpp", "cause:slow-teacher"))
    fill(tmp_path, stage, {"smart+mbpp": 0.25})
    part = (
        tables.estimate_tables("faults", stage, read(tmp_path), {})[0].split("beside smart+mbpp\n")[1].split("###")[0]
    )
    (line,) = [line for line in part.splitlines() if line.startswith("| cause:slow-teacher |")]
    right = [[(np.random.default_rng(s).random(400) < 0.5 + gain).mean() for s in range(3)] for gain in (0.0, 0.25)]
    assert f"| {np.mean(right[0]) - np.mean(right[1]):+.4f} [-" in line
    assert "| +0.2500 [+" in line  # of the NLL


def test_smart_stands_beside_what_costs_as_much(tmp_path: Path) -> None:
    stage = replace(ESTIMATE, arms=stages.SIZES)
    fill(tmp_path, stage, {"smart:0.03": 0.25, "r-drop:5": 0.125})
    part = tables.estimate_tables("sizes", stage, read(tmp_path), {})[0].split("beside r-drop:5\n")[1].split("###")[0]
    (line,) = [line for line in part.splitlines() if line.startswith("| smart:0.03 |")]
    right = [[(np.random.default_rng(s).random(400) < 0.5 + gain).mean() for s in range(3)] for gain in (0.25, 0.125)]
    assert f"| {np.mean(right[0]) - np.mean(right[1]):+.4f} [+" in line
    assert "| -0.1250 [-" in line  # of the NLL


def test_faulty_arms_have_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = replace(ESTIMATE, arms=("t-vanilla", "smart+mbpp", "cause:slow-teacher"))
    for stage in (faulty, ESTIMATE):
        monkeypatch.setattr(figures, "STAGES", {"stage": stage})
        fill(tmp_path / "stage", stage, {})
        assert [file.name for file in figures.make(tmp_path, tmp_path)] == ([] if stage is faulty else ["gain-sst.png"])


def test_an_estimate_that_is_made_again_has_seeds_of_its_own() -> None:
    again = replace(ESTIMATE, first_seed=5)
    assert [trial.seed for trial in stages.upcoming(again, []) if trial.arm == "smart"] == [5, 6, 7]


def test_claims_of_two_tasks_are_told_apart() -> None:
    """The same arm and measure in both, of which one stands beside three others and one does not."""
    gaps = {"sst": (0.001, 0.9), "para": (0.02, 0.8)}
    claims = {
        tables.Claim(task, "smart", title): Difference(0.1, 0.0, 0.2, p, 5, 100)
        for task, ps in gaps.items()
        for title, p in zip(("accuracy", "NLL"), ps, strict=True)
    }
    text = tables.across({"stage": claims})
    assert "for all 4 comparisons" in text
    assert [line.split(" | ")[4:] for line in text.splitlines() if line.startswith("| stage | smart")] == [
        ["0.001", "0.004", "0.004\\* |"]
    ]


def test_gains_by_size_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arms of the sizes alone, from each stage that has them and no search's settings, smallest first."""
    large = replace(ESTIMATE, arms=stages.SIZES, rows=32)
    small = replace(ESTIMATE, arms=("t-vanilla", "smart", "smart:0.03"))
    table = {"large": large, "small": small, "of a search": replace(CHOSEN, arms=small.arms)}
    table |= {"all rows": replace(small, rows=None), "again": replace(small, first_seed=3)}
    monkeypatch.setattr(figures, "STAGES", table)
    fill(tmp_path / "large", large, {"smart:0.03": 0.25})
    fill(tmp_path / "small", small, {"smart:0.03": 0.125})
    fill(tmp_path / "of a search", small, {})
    fill(tmp_path / "all rows", small, {})
    fill(tmp_path / "again", small, {"smart:0.03": 0.5})
    drawn: list[list[str]] = []
    monkeypatch.setattr(figures, "gains", lambda task, stages, file: drawn.append(list(stages)))
    found = figures.by_size("sst", {name: read(tmp_path / name) for name in table})
    assert {arm: [gain.rows for gain in gains] for arm, gains in found.items()} == {
        "smart:0.03": [16, 32],
        "r-drop:5": [32],
    }
    assert [gain.gaps[1].mean for gain in found["smart:0.03"]] == pytest.approx([-0.125, -0.25], abs=2e-3)
    assert [file.name for file in figures.make(tmp_path, tmp_path)] == ["gain-sst.png", "gain-by-size.png"]
    assert drawn == [["small", "of a search", "again"]]  # other sizes, and the stages of them, are another figure
    monkeypatch.setattr(figures, "STAGES", {"small": small})  # one size is no picture of sizes
    assert [file.name for file in figures.make(tmp_path, tmp_path)] == ["gain-sst.png"]


def test_two_runs_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_split(SAMPLE, TASKS["sst"], "dev", 40).examples
    for name, shift in (("right", 0), ("wrong", 1)):
        lines = [f"{row.id} , {(int(row.label) + shift) % 5}" for row in rows]
        (tmp_path / name / "predictions").mkdir(parents=True)
        file = tmp_path / name / "predictions" / "sst-dev-output.csv"
        file.write_text("\n".join(["id \t Predicted_Sentiment", *lines]) + "\n", "utf-8")
        settings = {"data_dir": None, "dev_limit": 40}
        write_json(tmp_path / name / "metrics.json", {"tasks": ["sst"], "settings": settings})
    runs = [str(tmp_path / name) for name in ("right", "wrong")]
    assert arms_cli.main(["pair", *runs]) == 0
    assert capsys.readouterr().out == "sst accuracy: 1.0000 and 0.0000, +1.0000 [+1.0000, +1.0000]\n"
    assert arms_cli.main(["pair", runs[0], str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}")
    write_json(tmp_path / "fewer" / "metrics.json", {"tasks": ["sst"], "settings": settings | {"dev_limit": 10}})
    assert arms_cli.main(["pair", str(tmp_path / "fewer"), runs[0]]) == 2
    assert "fewer/predictions/sst-dev-output.csv: no such file" in capsys.readouterr().err
    shutil.copytree(tmp_path / "wrong" / "predictions", tmp_path / "fewer" / "predictions")
    assert arms_cli.main(["pair", runs[0], str(tmp_path / "fewer")]) == 0
    assert arms_cli.main(["pair", str(tmp_path / "fewer"), runs[0]]) == 2
    assert f"compare runs with the same --data-dir and --dev-limit as {tmp_path / 'fewer'}" in capsys.readouterr().err
    write_json(tmp_path / "fewer" / "metrics.json", {"accuracy": 0.9})
    assert arms_cli.main(["pair", str(tmp_path / "fewer"), runs[0]]) == 2
    assert "fewer/metrics.json: no metrics of a run of minbert_multitask.py" in capsys.readouterr().err


def test_half_made_stages_are_paired_by_what_all_arms_have(tmp_path: Path) -> None:
    fill(tmp_path, ESTIMATE, {})
    records = [record for record in read(tmp_path) if record["name"] != "smart.0.seed1"]
    by_arm, seeds = matched.paired(ESTIMATE, records)
    assert seeds == [0, 2]
    assert [[run["seed"] for run in runs] for runs in by_arm.values()] == [[0, 2], [0, 2]]
    with pytest.raises(InputError, match="expected two seeds or more with all arms"):
        matched.paired(ESTIMATE, [record for record in records if record["seed"] != 2])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("code", "def", r"smart\.0\.seed0 has code 'abc', t-vanilla\.0\.seed2 has 'def'"),
        ("torch", "3", "has torch '2'"),
        ("data", "other rows", "has data 'data of seed 2'"),
        ("settings", {"seed": 2, "lr": 1.0}, r"t-vanilla\.0\.seed0 and t-vanilla\.0\.seed2 were made with different"),
        ("choice", {}, "were made with different settings"),
    ],
)
def test_mixed_runs_are_refused(name: str, value: object, message: str, tmp_path: Path) -> None:
    fill(tmp_path, ESTIMATE, {})
    file = tmp_path / "t-vanilla.0.seed2.json"
    write_json(file, {**json.loads(file.read_text()), name: value})
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def test_what_the_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arms_cli.main(["run", "estimate", "--data-dir", str(SAMPLE), "--workers", "0"]) == 2
    assert "--workers: expected a whole number of at least 1, got 0" in capsys.readouterr().err
    assert arms_cli.main(["report", "--results", str(tmp_path)]) == 2
    assert "no records" in capsys.readouterr().err
    assert arms_cli.main(["run", "best"]) == 2
    assert "invalid choice: 'best'" in capsys.readouterr().err
    (tmp_path / "estimate").mkdir()
    (tmp_path / "estimate" / "x.json").write_text("{")
    assert arms_cli.main(["status", "--results", str(tmp_path)]) == 2
    assert "remove it to have the run made again" in capsys.readouterr().err


def test_the_code_is_known_by_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minbert.study import record

    monkeypatch.setattr(record, "PACKAGE", tmp_path)
    monkeypatch.setattr(record, "NUMBERS_FOLLOW_FROM", ())
    file = tmp_path / "a.py"
    versions = []
    for text in ("x = 1\n", '"""Says what."""\nx  =  1  # why\n', "x = 2\n"):
        file.write_text(text)
        versions.append(code_version())
    assert versions[0] == versions[1] != versions[2]
