"""Running the model over a split without training it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .batching import TokenSet, collate
from .distributed import Place, total
from .metrics import Metrics, score
from .model import MultitaskModel

BATCH = 64


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
    for part in tqdm(mine, desc=f"{note}{data.task.name}", leave=False, disable=not place.first, unit="batch"):
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
    """Metrics of each labelled split, on its first `limit` rows."""
    results = {}
    for name, data in sets.items():
        rows = range(len(data) if limit is None else min(limit, len(data)))
        labels = torch.tensor(data.labels)[: len(rows)]
        results[name] = score(data.task, outputs_of(model, data, place, rows, note), labels)
    return results
