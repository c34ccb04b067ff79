"""What there is before any training: the most frequent class, and the cosine of two sentences.

MiniLM was trained to place sentences of like meaning together, on Quora's pairs among others, so that its cosine is an
answer already. A trained arm has to be better than that to have learnt anything.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batching import SentenceTokenizer, TokenSet, collate, tokenize
from ..model import MultitaskModel, build_model, encoder_config
from ..pretrained import resolve_encoder
from ..settings import resolve
from ..tasks import TASKS, baseline, pearson
from .split import parts

BATCH = 64


def measure(folder: Path, *, encoder: str | None = None, held_out: int | None = None) -> dict[str, float | None]:
    """The main metric of each task on the rows held out, without training.

    For SST it is that of the most frequent class of the other rows; for Quora the accuracy of the threshold on the
    cosine that is best on dev; for STS the correlation of cosine and label.
    """
    settings = resolve({"config": "vanilla"})
    source = resolve_encoder(encoder)
    tokenizer = SentenceTokenizer(source, settings.max_length)
    model = build_model(settings, encoder_config(source, settings), source).eval()
    result: dict[str, float | None] = {}
    for name in ("sst", "para", "sts"):
        found = parts(folder, name, None, 0, held_out)
        held, dev = tokenize(found.held_out, tokenizer), tokenize(found.dev, tokenizer)
        labels = torch.tensor(held.labels)
        if name == "sst":
            train = torch.tensor([row.label for row in found.train.examples])
            result[name] = baseline(TASKS[name], train, labels)["accuracy"]
        elif name == "para":
            threshold = best_threshold(cosines(model, dev), torch.tensor(dev.labels))
            result[name] = float(((cosines(model, held) > threshold) == (labels > 0.5)).double().mean())
        else:
            result[name] = pearson(cosines(model, held).double(), labels.double())
    return result


@torch.no_grad()
def cosines(model: MultitaskModel, data: TokenSet) -> Tensor:
    """The cosine of each pair's sentence vectors, (n,)."""
    pad, device = model.encoder.config.pad_token_id, next(model.parameters()).device
    found = []
    for start in range(0, len(data), BATCH):
        batch = collate(data, range(start, min(start + BATCH, len(data))), pad, device)
        u, v = (model.sentence(ids, mask) for ids, mask in zip(batch.sentences, batch.masks, strict=True))
        found.append(F.cosine_similarity(u, v, dim=-1))
    return torch.cat(found)


def best_threshold(values: Tensor, labels: Tensor) -> float:
    """The value above which to say yes, so that most answers are right.

    Example:
        >>> round(best_threshold(torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0.0, 0.0, 1.0, 1.0])), 3)
        0.4
    """
    right = ((values[None, :] > values[:, None]) == (labels[None, :] > 0.5)).sum(1)
    return float(values[right.argmax()])
