"""`examples/minbert_multitask.py`: from the command line to a finished run."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import checkpoint, distributed
from .batching import TokenSet, tokenize
from .data import Split, read_split, split_file
from .errors import InputError
from .evaluating import evaluate_run
from .figures import training_curves
from .metrics import baseline
from .model import MultitaskModel
from .options import parse
from .predictions import write_predictions
from .report import closing_table, print_data, print_header
from .run_folder import (
    build_model,
    default_name,
    encoder_config,
    encoder_source,
    last_checkpoint,
    prepare,
    refuse_occupied,
    saved_settings,
    settings_to_resume,
)
from .schedule import schedule_note
from .settings import Settings, resolve
from .tasks import TASKS
from .tokenizer import SentenceTokenizer
from .trainer import Stopped, Trainer

SAMPLE = Path(__file__).parent / "sample"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for wrong input, 143 when stopped by SIGTERM."""
    try:
        given = parse(sys.argv[1:] if arguments is None else arguments)
        if "evaluate" in given:
            return evaluate_run(given, SAMPLE)
        return train(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped:
        return 143
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        distributed.leave()


def train(given: dict[str, Any]) -> int:
    """Trains, or resumes, a run."""
    if "split" in given:
        raise InputError("--split: goes with --evaluate only")
    folder_given, resume = given.pop("output_dir", None), given.pop("resume", False)
    settings = resolve(given)
    if resume and folder_given is None:
        raise InputError("--resume: name the run to go on with, as --output-dir")
    place = distributed.join(settings.device)
    console = Console(file=sys.stdout if place.first else open(os.devnull, "w"), soft_wrap=False)  # noqa: SIM115
    folder = Path(distributed.agree_on(place, folder_given or default_name(settings)))
    if resume:
        settings = settings_to_resume(folder, given, settings)
        if (folder / "metrics.json").exists():
            console.print(f"{folder} is complete already; nothing to resume", highlight=False)
            return 0
    elif place.first:
        refuse_occupied(folder)
    distributed.barrier(place)
    started = time.perf_counter()

    saved = checkpoint.latest(folder) if resume else None
    source = folder / "encoder" if saved else encoder_source(settings)
    config = encoder_config(source, settings)
    tokenizer = SentenceTokenizer(source, settings.max_length)
    data_dir = Path(settings.data_dir) if settings.data_dir is not None else SAMPLE
    files, sets = read_data(data_dir, settings, tokenizer)

    torch.manual_seed(settings.seed)
    fresh_from_run = settings.init_from is not None
    model = build_model(settings, config, None if saved or fresh_from_run else source)
    if saved:
        model.load_state_dict(checkpoint.load_model(saved))
    elif settings.init_from is not None:
        take_weights(model, settings, Path(settings.init_from))
    model.to(place.device, getattr(torch, settings.dtype))

    print_header(console, settings, place, settings.encoder or settings.init_from or "", folder)
    print_data(console, files, sets["train"], settings.max_length)
    trainer = Trainer(settings, place, model, sets["train"], sets["dev"], folder)
    if note := schedule_note(settings.lr_schedule, trainer.total_steps):
        console.print(f"[yellow]note[/] {note}", highlight=False)
    if saved:
        trainer.restore(saved)
        console.print(f"resuming after step {trainer.step} of {trainer.total_steps}", highlight=False)
    else:
        if resume:
            console.print(f"nothing saved yet in {folder}; starting from the beginning", highlight=False)
        if place.first:
            prepare(folder, settings, config, tokenizer)
    try:
        trainer.run()
    except Stopped:
        if place.first:
            message = f"stopped by SIGTERM after step {trainer.step} of {trainer.total_steps}; saved in {folder}, "
            print(message + "--resume goes on from there", file=sys.stderr)
        raise
    finish(trainer, sets, time.perf_counter() - started, console)
    return 0


def read_data(
    folder: Path, settings: Settings, tokenizer: SentenceTokenizer
) -> tuple[dict[str, list[Split]], dict[str, dict[str, TokenSet]]]:
    """Reads and tokenizes train, dev and, where it is there, test.

    Returns:
        The files by task, and the token sets by split and task.
    """
    files: dict[str, list[Split]] = {}
    sets: dict[str, dict[str, TokenSet]] = {"train": {}, "dev": {}, "test": {}}
    for name in settings.tasks:
        task = TASKS[name]
        limits = {"train": settings.train_limit, "dev": settings.dev_limit}
        splits = {split: read_split(folder, task, split, limit) for split, limit in limits.items()}
        if split_file(folder, task, "test") is not None:
            splits["test"] = read_split(folder, task, "test")
        files[name] = list(splits.values())
        for split, content in splits.items():
            sets[split][name] = tokenize(content, tokenizer)
    return files, sets


def take_weights(model: MultitaskModel, settings: Settings, run: Path) -> None:
    """Fills in the weights of another run.

    Raises:
        InputError: that run's model is another.
    """
    other = saved_settings(run, "--init-from")
    for name in ("pooling", "head_layers", "head_activation"):
        if getattr(other, name) != getattr(settings, name):
            raise InputError(
                f"--init-from {run}: its {name} is {getattr(other, name)!r}, here it is {getattr(settings, name)!r}"
            )
    missing = [task for task in settings.tasks if task not in other.tasks]
    if missing:
        raise InputError(f"--init-from {run}: that run has no head for {', '.join(missing)}")
    weights = checkpoint.load_model(last_checkpoint(run, "--init-from"))
    model.load_state_dict({key: weights[key] for key in model.state_dict()})


def finish(trainer: Trainer, sets: dict[str, dict[str, TokenSet]], seconds: float, console: Console) -> None:
    """Predictions, figure, `metrics.json`, and the closing table."""
    settings, place, folder = trainer.settings, trainer.place, trainer.folder
    for split in ("dev", "test"):
        write_predictions(trainer.model, sets[split], place, split, folder / "predictions")
    if not place.first:
        return
    history = trainer.history
    title = f"{settings.config}, {settings.option}, seed {settings.seed}"
    training_curves(history, title, folder / "figures" / "curves.png")
    metrics = {
        "config": settings.config,
        "option": settings.option,
        "seed": settings.seed,
        "tasks": list(settings.tasks),
        "train_tasks": list(settings.train_tasks),
        "steps": trainer.step,
        "dev": history[-1]["dev"],
        "train": history[-1]["train"],
        "gap": history[-1]["gap"],
        "baseline": {
            name: baseline(data.task, torch.tensor(sets["train"][name].labels), torch.tensor(data.labels))
            for name, data in sets["dev"].items()
        },
        "untrained": trainer.before,
        "epochs": history,
        "step_seconds_median": trainer.step_seconds_median,
        "peak_memory_bytes": trainer.memory.peak,
        "seconds": round(seconds, 1),
        "processes": place.world,
        "device": place.device.type,
        "torch": torch.__version__,
        "settings": settings.to_dict(),
    }
    checkpoint.write_json(folder / "metrics.json", metrics)
    console.print(closing_table(metrics, settings))
    console.print(
        f"{seconds:.0f} s, {trainer.step} steps, peak memory {trainer.memory.peak / 2**20:.0f} MiB; "
        f"metrics.json, predictions and figures/curves.png are in {folder}",
        highlight=False,
    )
