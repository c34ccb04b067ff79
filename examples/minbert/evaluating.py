"""`--evaluate RUN_DIR`: one JSON object on stdout, and nothing else."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, distributed
from .batching import tokenize
from .data import read_split
from .errors import InputError
from .evaluation import outputs_of
from .metrics import score
from .predictions import write_predictions
from .run_folder import build_model, encoder_config, last_checkpoint, refuse_occupied, saved_settings
from .tasks import TASKS
from .tokenizer import SentenceTokenizer

ALLOWED = ("evaluate", "split", "data_dir", "output_dir", "device", "tasks", "dev_limit")


def evaluate_run(given: dict[str, Any], default_data: Path) -> int:
    """Loads a run's last checkpoint and measures it on a split.

    Files without labels are predicted, not scored: their metric is null. Predictions are written only where
    `--output-dir` says, so that an evaluation leaves the run as it is.
    """
    useless = [name for name in given if name not in ALLOWED]
    if useless:
        raise InputError(f"--{useless[0].replace('_', '-')}: has no effect with --evaluate")
    run, split = Path(given["evaluate"]), given.get("split", "dev")
    settings = saved_settings(run, "--evaluate")
    saved = last_checkpoint(run, "--evaluate")
    output = Path(given["output_dir"]) if "output_dir" in given else None
    if output is not None:
        refuse_occupied(output)
    tasks = given.get("tasks", settings.tasks)
    missing = [name for name in tasks if name not in settings.tasks]
    if missing:
        raise InputError(f"--tasks: the run has no head for {', '.join(missing)}")

    place = distributed.join(given.get("device", "auto"))
    # Weights are all in the checkpoint; the run keeps its encoder's configuration and tokenizer beside it.
    config = encoder_config(run / "encoder", settings)
    model = build_model(replace(settings, init_from=None), config, None)
    model.load_state_dict(checkpoint.load_model(saved))
    model.to(place.device, getattr(torch, settings.dtype))
    tokenizer = SentenceTokenizer(run / "encoder", settings.max_length)

    folder = Path(given.get("data_dir") or settings.data_dir or default_data)
    results, sets = {}, {}
    for name in tasks:
        content = read_split(folder, TASKS[name], split, given.get("dev_limit"))
        for note in content.skipped:
            print(f"skipped {note}", file=sys.stderr)
        data = sets[name] = tokenize(content, tokenizer)
        if data.labels is not None:
            results[name] = score(data.task, outputs_of(model, data, place), torch.tensor(data.labels))
        else:
            results[name] = {data.task.metric: None, "n": len(data)}
            note = f"predictions written to {output}" if output else "name an --output-dir to get the predictions"
            print(f"{content.file}: no labels; predicted, not scored; {note}", file=sys.stderr)
    if output is not None:
        write_predictions(model, sets, place, split, output)
    if place.first:
        print(json.dumps(results, indent=2, allow_nan=False))
    return 0
