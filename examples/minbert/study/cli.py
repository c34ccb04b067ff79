"""`examples/minbert_study.py`: runs, statistics and report of a study, from its command line."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import InputError
from ..checkpoint import write_json, write_text
from ..cli import Parser
from ..data import SAMPLE, read_split
from ..evaluate import read_predictions
from ..settings import CONFIGS
from ..tasks import TASKS
from .runs import Run, command, execute, plan, result
from .statistics import Array, compare
from .summary import Summary, accuracy_by_epoch, bars, markdown

QUICK = {
    "configs": "vanilla,t-smart",
    "seeds": "0",
    "resamples": 100,
    "flags": "--train-limit 12 --dev-limit 16 --batch-size 4 --epochs 1 --max-steps 3",
}
"""What `--quick` sets; it is there to see the machinery work."""


def build_parser() -> Parser:
    """The flags of a study."""
    parser = Parser(description="Runs configurations × modes × seeds of minbert_multitask.py and compares them.")
    add = parser.add_argument
    add("--output-dir", required=True, metavar="DIR", help="folder of the study; a study in it goes on")
    add("--configs", default=",".join(CONFIGS), metavar="LIST", help="default: all five")
    add("--modes", default="pretrain,finetune", metavar="LIST", help="with both, finetune starts from pretrain")
    add("--seeds", default="0,1,2", metavar="LIST", help="default: 0,1,2")
    add(
        "--quick", action="store_true", help="a trial: two configurations, one seed, three steps a run; shows no result"
    )
    add("--reference", default="vanilla", metavar="CONFIG", help="what the others are compared with")
    add("--resamples", type=int, default=2000, metavar="N", help="bootstrap samples (default: 2000)")
    add("--data-dir", metavar="DIR", help="folder in the CS224N layout (default: the sample that comes along)")
    add("--flags", default="", help="passed on to every run, as one string: --flags='--epochs 6 --train-limit 512'")
    add("--pretrain-flags", default="", help="passed on to pretrain runs only")
    add("--finetune-flags", default="", help="passed on to finetune runs only")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Makes or completes a study and returns the exit code."""
    try:
        study(vars(build_parser().parse_args(sys.argv[1:] if arguments is None else arguments)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def study(options: dict[str, Any]) -> None:
    """Makes the runs that are missing, then writes `results.json`, `results.md` and the figures."""
    options = {**options, **QUICK} if options["quick"] else options
    folder = Path(options["output_dir"])
    configs = _names(options["configs"], list(CONFIGS), "--configs")
    modes = _names(options["modes"], ["pretrain", "finetune"], "--modes")
    seeds = _seeds(options["seeds"])
    reference = options["reference"] if options["reference"] in configs else configs[0]
    if options["resamples"] < 1:
        raise InputError(f"--resamples: expected a whole number of at least 1, got {options['resamples']}")
    flags = {"all": shlex.split(options["flags"])}
    flags |= {mode: shlex.split(options[f"{mode}_flags"]) for mode in ("pretrain", "finetune")}
    if options["data_dir"] is not None:
        flags["all"] += ["--data-dir", options["data_dir"]]
    _remember(folder, {"flags": flags, "chained": len(modes) == 2})

    runs = plan(configs, modes, seeds)
    for run in tqdm(runs, desc="study", unit="run"):
        if result(run, folder) is None:
            execute(command(run, folder, modes, flags), folder / "logs" / f"{run.name}.txt")
    report(folder, runs, reference, options["resamples"])
    print((folder / "results.md").read_text(encoding="utf-8"))
    print(f"results.json, results.md and figures/ are in {folder}")


def report(folder: Path, runs: list[Run], reference: str, resamples: int) -> None:
    """Everything that is made of the runs' results."""
    results: dict[Run, dict[str, Any]] = {}
    for run in runs:
        found = result(run, folder)
        if found is None:
            raise InputError(f"{folder / 'runs' / run.name}: the run is not complete")
        results[run] = found
    modes, configs = list(dict.fromkeys(r.mode for r in runs)), list(dict.fromkeys(r.config for r in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    tasks = results[runs[0]]["tasks"]
    labels = {task: _labels(results[runs[0]], task) for task in tasks}

    summary: Summary = {mode: {config: {} for config in configs} for mode in modes}
    for mode in modes:
        for task in tasks:
            made = {config: _predictions(folder, mode, config, seeds, task) for config in configs}
            for config in configs:
                other = None if config == reference else made[reference]
                summary[mode][config][task] = compare(
                    TASKS[task], made[config], other, labels[task], resamples=resamples
                )
    content = {
        "reference": reference,
        "resamples": resamples,
        "runs": [
            {**asdict(run), **{k: metrics[k] for k in ("dev", "train", "gap", "steps", "seconds")}}
            for run, metrics in results.items()
        ],
        "summary": {
            mode: {config: {task: cell.to_dict() for task, cell in cells.items()} for config, cells in rows.items()}
            for mode, rows in summary.items()
        },
    }
    write_json(folder / "results.json", content)
    counts = ", ".join(f"{task} {len(values)}" for task, values in labels.items())
    write_text(folder / "results.md", markdown(summary, reference, f"Seeds: {len(seeds)}. Dev rows: {counts}."))
    for mode in modes:
        bars(summary[mode], f"dev metrics after {mode}", folder / "figures" / f"{mode}.png")
    if "t-smart" in configs and "sst" in tasks:
        histories = [results[Run(modes[-1], "t-smart", seed)]["epochs"] for seed in seeds]
        title = f"t-smart, {modes[-1]}: sentiment by epoch"
        accuracy_by_epoch(histories, title, folder / "figures" / "t-smart-sentiment.png")


def _predictions(folder: Path, mode: str, config: str, seeds: list[int], task: str) -> Array:
    """Dev predictions of all seeds, (seeds, n)."""
    files = [folder / "runs" / Run(mode, config, s).name / "predictions" / f"{task}-dev-output.csv" for s in seeds]
    return np.array([[value for _, value in read_predictions(file)] for file in files])


def _labels(metrics: dict[str, Any], task: str) -> Array:
    """The dev labels that a run was measured on."""
    settings = metrics["settings"]
    data = Path(settings["data_dir"]) if settings["data_dir"] is not None else SAMPLE
    split = read_split(data, TASKS[task], "dev", settings["dev_limit"])
    return np.array([row.label for row in split.examples], dtype=np.float64)


def _remember(folder: Path, setup: dict[str, Any]) -> None:
    """Notes what all runs of the study have in common; a study goes on only with the same."""
    file = folder / "study.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != setup:
            raise InputError(f"--output-dir {folder}: holds a study with other flags (see {file}); name another folder")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output-dir {folder}: is not an empty folder and holds no study; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, setup)


def _names(text: str, allowed: list[str], flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or any(name not in allowed for name in names):
        raise InputError(f"{flag}: expected any of {','.join(allowed)}, got {text!r}")
    return [name for name in allowed if name in names]


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise InputError(f"--seeds: expected whole numbers separated by commas, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))
