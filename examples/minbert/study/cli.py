"""`examples/minbert_study.py`: runs, statistics and report of a study, from its command line."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import InputError
from ..cli import Parser, exit_code
from ..files import UNFINISHED, read_json, write_json, write_text, writing
from ..run_folder import LOCK, locked
from ..settings import CONFIGS, Settings
from ..tasks import TASKS
from .pair import dev_rows, predictions
from .record import comparable
from .runs import Run, command, execute, passed_on, plan, result
from .statistics import Array, compare
from .summary import Summary, figures, markdown

DEFAULTS = {"configs": ",".join(CONFIGS), "seeds": "0,1,2", "resamples": 2000}
QUICK = {"configs": "vanilla,t-smart", "seeds": "0", "resamples": 100}
"""The defaults under `--quick`; it is there to see the machinery work."""
QUICK_FLAGS = "--train-limit 12 --dev-limit 16 --batch-size 4 --epochs 1 --max-steps 3 "
"""What it passes on, before the user's own flags, which win."""


def build_parser() -> Parser:
    """The flags of a study."""
    parser = Parser(
        description="Runs configurations × modes × seeds of minbert_multitask.py and compares them.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--output-dir", required=True, metavar="DIR", help="folder of the study; a study in it goes on")
    add("--configs", metavar="LIST", help="default: all five")
    add("--modes", default="pretrain,finetune", metavar="LIST", help="with both, finetune starts from pretrain")
    add("--seeds", metavar="LIST", help="default: 0,1,2")
    add(
        "--quick",
        action="store_true",
        help="a trial: two configurations, one seed, three steps a run, where other flags do not say otherwise; "
        "shows no result",
    )
    add("--reference", metavar="CONFIG", help="what the others are compared with (default: vanilla, or else the first)")
    add("--resamples", type=int, metavar="N", help="bootstrap samples (default: 2000)")
    add("--data-dir", metavar="DIR", help="folder in the CS224N layout (default: the sample that comes along)")
    add("--flags", default="", help="passed on to every run, as one string: --flags='--epochs 6 --train-limit 512'")
    add("--pretrain-flags", default="", help="passed on to pretrain runs only")
    add("--finetune-flags", default="", help="passed on to finetune runs only")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Makes or completes a study and returns the exit code, as those of a run."""

    def work() -> int:
        study(vars(build_parser().parse_args(arguments)))
        return 0

    return exit_code(work, "the same command goes on")


def study(options: dict[str, Any]) -> None:
    """Makes the runs that are missing, then writes `results.json`, `results.md` and the figures."""
    quick = options["quick"]
    given = {name: value for name, value in options.items() if value is not None}
    options = {"data_dir": None} | DEFAULTS | (QUICK if quick else {}) | given
    folder = Path(options["output_dir"])
    configs = _names(options["configs"], list(CONFIGS), "--configs")
    modes = _names(options["modes"], ["pretrain", "finetune"], "--modes")
    seeds = _seeds(options["seeds"])
    reference = options.get("reference", "vanilla" if "vanilla" in configs else configs[0])
    _names(reference, list(CONFIGS), "--reference")
    if reference not in configs:
        raise InputError(f"--reference: expected one of --configs, {','.join(configs)}, got {reference!r}")
    if options["resamples"] < 1:
        raise InputError(f"--resamples: expected a whole number of at least 1, got {options['resamples']}")
    flags = {"all": passed_on((QUICK_FLAGS if quick else "") + options["flags"], "--flags")}
    flags |= {mode: passed_on(options[f"{mode}_flags"], f"--{mode}-flags") for mode in ("pretrain", "finetune")}
    if options["data_dir"] is not None:
        flags["all"] += ["--data-dir", options["data_dir"]]
    _require_study(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _remember(folder, {"flags": flags, "chained": len(modes) == 2})
        results: dict[Run, dict[str, Any]] = {}
        for run in tqdm(plan(configs, modes, seeds), desc="study", unit="run", disable=None):
            line = command(run, folder, modes, flags)
            found = result(run, folder, line)
            if found is None:
                execute(line, folder / "logs" / f"{run.name}.txt")
                found = result(run, folder, line)
            if found is None:
                raise InputError(f"{folder / 'runs' / run.name}: the run is not complete")
            results[run] = found
        report(folder, results, reference, options["resamples"])
    print((folder / "results.md").read_text(encoding="utf-8"))
    print(f"results.json, results.md and figures/ are in {folder}")


def report(folder: Path, results: dict[Run, dict[str, Any]], reference: str, resamples: int) -> None:
    """Writes `results.json`, and of that alone the table and the figures."""
    runs = list(results)
    modes, configs = list(dict.fromkeys(r.mode for r in runs)), list(dict.fromkeys(r.config for r in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    tasks = results[runs[0]]["tasks"]
    if any(metrics["tasks"] != tasks for metrics in results.values()):
        raise InputError(f"{folder}: its runs have different tasks; give --tasks in --flags, for all")

    counts: dict[str, int] = {}
    summary: Summary = {mode: {config: {} for config in configs} for mode in modes}
    for mode in modes:
        for task in tasks:
            rows = dev_rows(results[next(run for run in runs if run.mode == mode)], task)
            labels = np.array([row.label for row in rows], dtype=np.float64)
            ids = [row.id for row in rows]
            counts[task] = len(ids)
            made = {config: _predictions(folder, mode, config, seeds, task, ids) for config in configs}
            for config in configs:
                other = None if config == reference else made[reference]
                summary[mode][config][task] = compare(TASKS[task], made[config], other, labels, resamples=resamples)
    content = {
        "reference": reference,
        "resamples": resamples,
        "seeds": seeds,
        "dev_rows": counts,
        "runs": [{**asdict(run), **_kept(metrics)} for run, metrics in results.items()],
        "summary": {
            mode: {config: {task: cell.to_dict() for task, cell in cells.items()} for config, cells in rows.items()}
            for mode, rows in summary.items()
        },
    }
    write_json(folder / "results.json", content)
    write_text(folder / "results.md", markdown(content))
    figures(content, folder / "figures")


def _kept(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a run's line has of its metrics; no path among it."""
    epochs = [{name: line[name] for name in ("epoch", "losses", "train", "dev")} for line in metrics["epochs"]]
    settings = comparable(Settings.from_dict(metrics["settings"]))
    return {k: metrics[k] for k in ("dev", "train", "gap", "steps", "seconds")} | {
        "epochs": epochs,
        "settings": {name: value for name, value in settings.items() if name != "init_from"},
    }


def _predictions(folder: Path, mode: str, config: str, seeds: list[int], task: str, ids: list[str]) -> Array:
    """Dev predictions of all seeds, (seeds, n)."""
    runs = [folder / "runs" / Run(mode, config, seed).name for seed in seeds]
    return np.array([predictions(run, task, ids, "remove its run's folder to make it anew") for run in runs])


def _remember(folder: Path, setup: dict[str, Any]) -> None:
    """Notes what all runs of the study have in common; a study goes on only with the same."""
    file = folder / "study.json"
    if not file.exists():
        write_json(file, setup)
    elif read_json(file) != setup:
        raise InputError(f"--output-dir {folder}: holds a study with other flags (see {file}); name another folder")


def _require_study(folder: Path) -> None:
    """Raises InputError where the folder holds something else than a study, or one that was just beginning."""
    own = {LOCK, "study.json" + UNFINISHED}
    if not folder.exists() or (folder / "study.json").exists():
        return
    if not folder.is_dir() or any(path.name not in own for path in folder.iterdir()):
        raise InputError(f"--output-dir {folder}: is not an empty folder and holds no study; name another folder")


def _names(text: str, allowed: list[str], flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or any(name not in allowed for name in names):
        raise InputError(f"{flag}: expected any of {','.join(allowed)}, got {text!r}")
    return [name for name in allowed if name in names]


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InputError(f"--seeds: expected whole numbers separated by commas, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))
