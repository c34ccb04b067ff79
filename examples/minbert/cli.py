"""`examples/minbert_multitask.py`: from the command line to a finished run."""

import argparse
import os
import sys
import time
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from . import InputError, checkpoint, distributed
from .batching import SentenceTokenizer, TokenSet, tokenize
from .data import SAMPLE, Split, read_split, split_file
from .evaluate import evaluate_run
from .model import MultitaskModel, build_model, encoder_config
from .optimizer import schedule_note
from .pretrained import resolve_encoder
from .report import finish, print_data, print_header
from .settings import TABLE, Settings, flag, resolve
from .tasks import TASKS
from .train import Stopped, Trainer

EPILOG = """\
examples:
  python examples/minbert_multitask.py
  python examples/minbert_multitask.py --config vanilla --data-dir DATA --train-limit 512
  python examples/minbert_multitask.py --option pretrain --output-dir runs/first
  python examples/minbert_multitask.py --init-from runs/first --output-dir runs/second
  python examples/minbert_multitask.py --output-dir runs/second --resume
  python examples/minbert_multitask.py --evaluate runs/second --data-dir DATA --split test
  torchrun --nproc-per-node 2 examples/minbert_multitask.py
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints end like those about data: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def build_parser() -> Parser:
    """All flags. None has a default here, so that one can tell what the user gave (see `settings.resolve`)."""
    parser = Parser(
        description="Fine-tunes a BERT encoder on sentiment, paraphrase and similarity, with or without SMART.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(row.group for row in TABLE.values())}
    for field in fields(Settings):
        row = TABLE[field.name]
        shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        text = row.text if shown in (None, False) else f"{row.text} (default: {shown})"
        kinds = typing.get_args(field.type) or (field.type,)  # int | None → (int, NoneType)
        options: dict[str, Any] = {"action": "store_true"}
        if bool not in kinds:
            number = next((kind for kind in (int, float) if kind in kinds), None)
            letter = {int: "N", float: "X"}.get(number) if row.choices is None else None
            options = {"type": row.read or number, "choices": row.choices, "metavar": row.metavar or letter}
        groups[row.group].add_argument(flag(field.name), help=text, **options)

    add = groups["what to run"].add_argument
    add("--output-dir", help="folder of the run (default: a new one in runs/)", metavar="DIR")
    add("--resume", help="go on from the last checkpoint in --output-dir", action="store_true")
    add("--evaluate", help="train nothing; print this run's metrics as one JSON object", metavar="RUN_DIR")
    add("--split", help="what --evaluate evaluates (default: dev)", choices=("dev", "test"))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for wrong input, 143 when stopped by SIGTERM."""
    try:
        given = vars(build_parser().parse_args(arguments))
        if "evaluate" in given:
            return evaluate_run(given)
        return train_run(given)
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


def train_run(given: dict[str, Any]) -> int:
    """Trains, or resumes, a run."""
    if "split" in given:
        raise InputError("--split: goes with --evaluate only")
    folder_given, resume = given.pop("output_dir", None), given.pop("resume", False)
    settings = resolve(given)
    if resume and folder_given is None:
        raise InputError("--resume: name the run to go on with, as --output-dir")
    place = distributed.join(settings.device)
    console = Console(file=sys.stdout if place.first else open(os.devnull, "w"), soft_wrap=False)  # noqa: SIM115
    folder = Path(distributed.agree_on(place, folder_given or checkpoint.default_name(settings)))
    if resume:
        settings = checkpoint.settings_to_resume(folder, given, settings)
        if (folder / "metrics.json").exists():
            console.print(f"{folder} is complete already; nothing to resume", highlight=False)
            return 0
    elif place.first:
        checkpoint.refuse_occupied(folder)
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
            checkpoint.prepare(folder, settings, config, tokenizer)
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


def encoder_source(settings: Settings) -> Path:
    """The folder that the encoder's configuration, weights and tokenizer come from."""
    if settings.init_from is not None:
        checkpoint.saved_settings(Path(settings.init_from), "--init-from")
        return Path(settings.init_from) / "encoder"
    return resolve_encoder(settings.encoder)


def take_weights(model: MultitaskModel, settings: Settings, run: Path) -> None:
    """Fills in the weights of another run.

    Raises:
        InputError: that run's model is another.
    """
    other = checkpoint.saved_settings(run, "--init-from")
    for name in ("pooling", "head_layers", "head_activation"):
        if getattr(other, name) != getattr(settings, name):
            raise InputError(
                f"--init-from {run}: its {name} is {getattr(other, name)!r}, here it is {getattr(settings, name)!r}"
            )
    missing = [task for task in settings.tasks if task not in other.tasks]
    if missing:
        raise InputError(f"--init-from {run}: that run has no head for {', '.join(missing)}")
    weights = checkpoint.load_model(checkpoint.last_checkpoint(run, "--init-from"))
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
