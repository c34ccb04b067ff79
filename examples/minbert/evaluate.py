"""Running a model over a split without training it: metrics, predictions as CSV, and `--evaluate RUN_DIR`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import InputError, checkpoint, distributed, files, run_folder
from .batching import SentenceTokenizer, TokenSet, collate, tokenize
from .data import SAMPLE, drawn, read_split
from .distributed import Place, total
from .model import MultitaskModel, build_model, encoder_config, model_shapes
from .progress import hidden
from .tasks import TASKS, Metrics, predict, score

BATCH = 64
ALLOWED = ("evaluate", "split", "data_dir", "output_dir", "device", "tasks", "dev_limit")
"""The flags that have a meaning beside `--evaluate`."""


@torch.no_grad()
def outputs_of(
    model: MultitaskModel, data: TokenSet, place: Place, rows: Sequence[int] | None = None, note: str = ""
) -> Tensor:
    """The head's outputs for some rows (all if None), in float32 at least, on the CPU; train mode is put back after.

    The processes share the work, and each gets the whole result.
    """
    rows = range(len(data)) if rows is None else rows
    was_training = model.training
    model.eval()
    # Sorted by length, batches carry little padding; the results go back to their rows' places.
    order = sorted(range(len(rows)), key=lambda i: data.lengths[rows[i]])
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    shape = (len(rows), data.task.outputs) if data.task.outputs > 1 else (len(rows),)
    result = torch.zeros(shape, dtype=next(model.parameters()).dtype)
    pad = model.encoder.config.pad_token_id
    mine = batches[place.rank :: place.world]
    for part in tqdm(mine, desc=f"{note}{data.task.name}", leave=False, disable=hidden(place), unit="batch"):
        batch = collate(data, [rows[i] for i in part], pad, place.device)
        result[part] = model(data.task.name, batch.sentences, batch.masks).to("cpu", result.dtype)
    model.train(was_training)
    return total(place, result)


def evaluate(
    model: MultitaskModel,
    sets: dict[str, TokenSet],
    place: Place,
    limit: int | None = None,
    note: str = "",
) -> dict[str, Metrics]:
    """Metrics of each labelled split, on all of its rows or on `limit` of them (see `drawn`)."""
    results = {}
    for name, data in sets.items():
        rows = drawn(data.task, len(data), len(data) if limit is None else limit)
        labels = torch.tensor(data.labels)[rows]
        results[name] = score(data.task, outputs_of(model, data, place, rows, note), labels)
    return results


def write_predictions(
    model: MultitaskModel, sets: dict[str, TokenSet], place: Place, split: str, folder: Path
) -> list[Path]:
    """Writes `<task>-<split>-output.csv` for each task, in the submission format of the CS224N project.

    That is a header, and then a line `id , prediction` for each row.

    Returns:
        The files.
    """
    written = []
    for name, data in sets.items():
        predicted = predict(data.task, outputs_of(model, data, place, note=f"predicting {split}: "))
        # The paraphrase labels are floats in the data, so they are in the submission.
        values = [float(p) if data.task.kind != "classes" else int(p) for p in predicted.to(torch.float64)]
        lines = [f"id \t {data.task.prediction} "]
        lines += [f"{row} , {value} " for row, value in zip(data.ids, values, strict=True)]
        if place.first:
            files.write_text(folder / f"{name}-{split}-output.csv", "\n".join(lines) + "\n")
        written.append(folder / f"{name}-{split}-output.csv")
    return written


def read_predictions(file: Path) -> list[tuple[str, float]]:
    """Ids and predictions of a file, in its order."""
    # Not `splitlines`: an id may hold what it takes for the end of a line.
    lines = files.read_bytes(file, files.TEXT_LIMIT).decode("utf-8", "replace").split("\n")[1:-1]
    try:
        pairs = [(row.strip(), float(value)) for row, value in (line.rsplit(" , ", 1) for line in lines)]
    except ValueError as error:
        raise InputError(f"{file}: not a file of predictions ({error})") from None
    if not all(math.isfinite(value) for _, value in pairs):
        raise InputError(f"{file}: not a file of predictions (a value is not finite)")
    return pairs


def evaluate_run(given: dict[str, Any]) -> int:
    """Loads a run's last checkpoint, measures it on a split, and prints one JSON object on stdout and nothing else.

    Files without labels are predicted, not scored: their metric is null. Predictions are written only where
    `--output-dir` says, so that an evaluation leaves the run as it is.
    """
    useless = [name for name in given if name not in ALLOWED]
    if useless:
        raise InputError(f"--{useless[0].replace('_', '-')}: has no effect with --evaluate")
    run, split = Path(given["evaluate"]), given.get("split", "dev")
    if split == "test" and "dev_limit" in given:
        raise InputError("--dev-limit: has no effect with --split test, which is evaluated whole")
    settings = run_folder.saved_settings(run, "--evaluate")
    saved = checkpoint.last_checkpoint(run, "--evaluate")
    if not run_folder.complete(run):
        files.tell(f"note: {run} is not complete; these are its weights at {saved.name}")
    output = Path(given["output_dir"]) if "output_dir" in given else None
    if output is not None and output.exists():
        if (output / "settings.json").exists():
            raise InputError(f"--output-dir {output}: holds a run; name another folder for the predictions")
        run_folder.refuse_occupied(output)
    tasks = given.get("tasks", settings.tasks)
    missing = [name for name in tasks if name not in settings.tasks]
    if missing:
        raise InputError(f"--tasks: the run has no head for {', '.join(missing)}")

    place = distributed.join(given.get("device", "auto"))
    # Weights are all in the checkpoint; the run keeps its encoder's configuration and tokenizer beside it.
    config = encoder_config(run / "encoder", settings)
    weights = checkpoint.load_model(saved, model_shapes(settings, config))
    model = build_model(settings, config, None)
    model.load_state_dict(weights)
    model.to(place.device, getattr(torch, settings.dtype))
    tokenizer = SentenceTokenizer(run / "encoder", settings.max_length)

    folder = Path(given["data_dir"]) if "data_dir" in given else Path(settings.data_dir or SAMPLE)
    results, sets = {}, {}
    for name in tasks:
        content = read_split(folder, TASKS[name], split, given.get("dev_limit"))
        for note in content.skipped:
            files.tell(f"skipped {note}")
        data = sets[name] = tokenize(content, tokenizer)
        data.require_embeddings(config.vocab_size)
        if data.labels is not None:
            results[name] = score(data.task, outputs_of(model, data, place), torch.tensor(data.labels))
        else:
            results[name] = {data.task.metric: None, "n": len(data)}
            note = f"predictions written to {output}" if output else "name an --output-dir to get the predictions"
            files.tell(f"{content.file}: no labels; predicted, not scored; {note}")
    if output is not None:
        write_predictions(model, sets, place, split, output)
    if place.first:
        print(json.dumps(results, indent=2, allow_nan=False))
    return 0
