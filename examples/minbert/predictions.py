"""Predictions as CSV, in the submission format of the CS224N project."""

from pathlib import Path

import torch

from .batching import TokenSet
from .checkpoint import write_text
from .distributed import Place
from .evaluation import outputs_of
from .model import MultitaskModel
from .tasks import predict


def write_predictions(
    model: MultitaskModel, sets: dict[str, TokenSet], place: Place, split: str, folder: Path
) -> list[Path]:
    """Writes `<task>-<split>-output.csv` for each task: a header, then a line `id , prediction` for each row.

    Returns:
        The files.
    """
    files = []
    for name, data in sets.items():
        predicted = predict(data.task, outputs_of(model, data, place, note=f"predicting {split}: "))
        # The paraphrase labels are floats in the data, so they are in the submission.
        values = [float(p) if data.task.kind != "classes" else int(p) for p in predicted.to(torch.float64)]
        lines = [f"id \t {data.task.prediction} "]
        lines += [f"{row} , {value} " for row, value in zip(data.ids, values, strict=True)]
        if place.first:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / f"{name}-{split}-output.csv", "\n".join(lines) + "\n")
        files.append(folder / f"{name}-{split}-output.csv")
    return files


def read_predictions(file: Path) -> list[tuple[str, float]]:
    """Ids and predictions of a file, in its order."""
    pairs = (line.rsplit(" , ", 1) for line in file.read_text(encoding="utf-8").splitlines()[1:])
    return [(row.strip(), float(value)) for row, value in pairs]
