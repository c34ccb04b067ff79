"""One training run, from its settings to its results: where it works, what it reads, how it goes on."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import InputError, checkpoint, distributed, files, resume, run_folder
from .batching import SentenceTokenizer, TokenSet, tokenize
from .data import SAMPLE, Split, read_split, split_file
from .distributed import Place
from .extras import Extras
from .model import MultitaskModel, build_model, encoder_config, model_shapes
from .optimizer import schedule_note
from .pretrained import resolve_encoder
from .report import Outlet, finish, note, print_data, print_header, say
from .settings import Settings, refuse_idle, resolve
from .tasks import TASKS
from .train import Stopped, Trainer
from .words import epoch_line


def train_run(given: dict[str, Any]) -> int:
    """Trains, or resumes, a run."""
    if "split" in given:
        raise InputError("--split: goes with --evaluate only")
    name, resume = given.pop("output_dir", None), given.pop("resume", False)
    folder = None if name is None else Path(name)
    settings = resolve(given)
    if resume and folder is None:
        raise InputError("--resume: name the run to go on with, as --output-dir")
    if resume and folder is not None:
        settings = run_folder.settings_to_resume(folder, given, settings)
    refuse_idle(given, settings)
    place = distributed.join(settings.device)
    console = Outlet(file=sys.stdout if place.first else open(os.devnull, "w"), soft_wrap=False)  # noqa: SIM115
    if resume and folder is not None and run_folder.complete(folder):
        console.print(f"{folder} is complete already; nothing to resume", highlight=False, markup=False)
        return 0
    with run_folder.Hold(folder, resume) as hold:
        train_in(hold, settings, place, console)
    return 0


def train_in(hold: run_folder.Hold, settings: Settings, place: Place, console: Console) -> None:
    """Reads everything, takes the folder, trains, and reports; wrong input leaves no folder behind."""
    found = distributed.first_decides(place, hold.open)
    saved = Path(found) if found else None
    started = time.perf_counter()

    source = encoder_source(settings) if saved is None else saved.parents[1] / "encoder"
    config = encoder_config(source, settings)
    tokenizer = SentenceTokenizer(source, settings.max_length)
    data_dir = Path(settings.data_dir) if settings.data_dir is not None else SAMPLE
    contents, sets = read_data(data_dir, settings, tokenizer)
    for data in (data for split in sets.values() for data in split.values()):
        data.require_embeddings(config.vocab_size)

    weights = None if saved is None else checkpoint.load_model(saved, model_shapes(settings, config))
    torch.manual_seed(settings.seed)
    model = build_model(settings, config, source if saved is None and settings.init_from is None else None)
    if weights is not None:
        model.load_state_dict(weights)
    elif settings.init_from is not None:
        take_weights(model, settings, Path(settings.init_from))
    model.to(place.device, getattr(torch, settings.dtype))

    folder = Path(distributed.first_decides(place, lambda: hold.take(settings, config, tokenizer)))
    print_header(console, settings, place, settings.encoder or settings.init_from or "", folder)
    print_data(console, contents, sets["train"], settings.max_length)
    told = Extras(epoch_ended=lambda trainer: say(console, epoch_line(trainer.history[-1], settings.epochs)))
    trainer = Trainer(settings, place, model, sets["train"], sets["dev"], folder, told)
    trainer.started = started
    if text := schedule_note(settings.lr_schedule, trainer.total_steps):
        note(console, text)
    if saved is not None:
        for text in resume.restore(trainer, saved):
            note(console, text)
        console.print(f"resuming after step {trainer.step} of {trainer.total_steps}", highlight=False)
    elif hold.resume:
        console.print(f"nothing saved yet in {folder}; starting from the beginning", highlight=False, markup=False)
    try:
        trainer.run()
    except Stopped:
        if place.first:
            message = f"stopped by SIGTERM after step {trainer.step} of {trainer.total_steps}; saved in {folder}, "
            files.tell(message + "--resume goes on from there")
        raise
    finish(trainer, sets, console)


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


def encoder_source(settings: Settings) -> Path:
    """The folder that the encoder's configuration, weights and tokenizer come from."""
    if settings.init_from is not None:
        run_folder.saved_settings(Path(settings.init_from), "--init-from")
        return Path(settings.init_from) / "encoder"
    return resolve_encoder(settings.encoder)


def take_weights(model: MultitaskModel, settings: Settings, run: Path) -> None:
    """Fills in the weights of another run.

    Raises:
        InputError: that run's model is another.
    """
    other = run_folder.saved_settings(run, "--init-from")
    for name in ("pooling", "head_layers", "head_activation"):
        if getattr(other, name) != getattr(settings, name):
            raise InputError(
                f"--init-from {run}: its {name} is {getattr(other, name)!r}, here it is {getattr(settings, name)!r}"
            )
    missing = [task for task in settings.tasks if task not in other.tasks]
    if missing:
        raise InputError(f"--init-from {run}: that run has no head for {', '.join(missing)}")
    # That run may have been trained on more tasks: their heads are left out.
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = checkpoint.load_model(checkpoint.last_checkpoint(run, "--init-from"), wanted, others_too=True)
    model.load_state_dict(weights)
