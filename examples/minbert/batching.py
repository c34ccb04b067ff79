"""From sentences to the tensors of a step: token ids, which rows train together, padding.

An epoch is a list of steps; a step is a task and the rows it trains on. The list is a pure function of (seed, epoch),
so a resumed run rebuilds it and skips to its position, and every process of a distributed run knows all of it.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import Tensor

from . import InputError
from .data import Split
from .files import parsing, read_bytes, read_json
from .tasks import Task

LIMIT = 64 << 20
"""Bytes of the largest tokenizer file that is read."""
POOL = 32
"""Steps' worth of rows that are sorted by length together: enough to save padding, few enough to stay random."""


class SentenceTokenizer:
    """`[CLS] words [SEP]`, cut to a length, without padding (batches are padded to their own longest sentence).

    Args:
        folder: holds `tokenizer.json`, or an older checkpoint's `vocab.txt` (then read as an uncased word-piece
            vocabulary unless `tokenizer_config.json` says `"do_lower_case": false`).
        max_length: tokens a sentence may have, `[CLS]` and `[SEP]` included.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        self.folder, self.tokenizer = folder, _read(folder)
        # The embedded checkpoint's file pads everything to 128 tokens; batches here are padded dynamically.
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        self.max_length = max_length

    def __call__(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence."""
        return [ids for ids, _ in self.encode(sentences)]

    def encode(self, sentences: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Token ids of each sentence, and whether some were cut off."""
        with parsing(self.folder, "tokenizer"):  # one without [UNK] is found out by the first unknown word
            found = self.tokenizer.encode_batch(list(sentences))
        return [(encoding.ids, bool(encoding.overflowing)) for encoding in found]

    def to_json(self) -> str:
        """The content of a `tokenizer.json`, from which the same tokenizer can be built again."""
        return str(self.tokenizer.to_str(pretty=True))


def _read(folder: Path) -> Tokenizer:
    file, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    if not file.exists() and not vocabulary.exists():
        raise InputError(f"{file}: no such file, and no vocab.txt beside it; the checkpoint has no tokenizer")
    with parsing(folder, "tokenizer"):
        if file.exists():
            return Tokenizer.from_buffer(read_bytes(file, LIMIT))
        words = read_bytes(vocabulary, LIMIT).decode("utf-8").split("\n")
        ids = {word.rstrip(): i for i, word in enumerate(words[:-1] if words[-1] == "" else words)}
        return BertWordPieceTokenizer(ids, lowercase=_lowercase(folder))._tokenizer


def _lowercase(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return bool(read_json(file).get("do_lower_case", True)) if file.exists() else True


@dataclass(frozen=True)
class TokenSet:
    """A split as token ids, ready to be batched."""

    task: Task
    ids: list[str]
    tokens: list[tuple[list[int], ...]]
    labels: list[float] | None
    truncated: int

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row's longest sentence."""
        return [max(map(len, row)) for row in self.tokens]

    def require_embeddings(self, count: int) -> None:
        """Raises InputError where a sentence has no token, or one beyond the encoder's vocabulary."""
        for row, sentences in zip(self.ids, self.tokens, strict=True):
            for tokens in sentences:
                if not tokens or max(tokens) >= count:
                    what = f"token {max(tokens)} of {count} that the encoder has" if tokens else "no token at all"
                    raise InputError(
                        f"tokenizer: makes {what} of task {self.task.name}, id {row}; "
                        f"its files are not those of the encoder, or its post-processor adds no [CLS] and [SEP]"
                    )


def tokenize(split: Split, tokenizer: SentenceTokenizer) -> TokenSet:
    """Token ids of a split."""
    columns = [tokenizer.encode([row.sentences[i] for row in split.examples]) for i in range(len(split.task.columns))]
    rows = list(zip(*columns, strict=True))
    tokens = [tuple(ids for ids, _ in row) for row in rows]
    cut = sum(any(shortened for _, shortened in row) for row in rows)
    labels = [row.label for row in split.examples if row.label is not None]
    ids = [row.id for row in split.examples]
    return TokenSet(split.task, ids, tokens, labels if split.labelled else None, cut)


def fingerprint(sets: Mapping[str, TokenSet]) -> str:
    """A hash of sets, by which a resumed run knows its data."""
    digest = hashlib.sha256()
    for name, data in sets.items():
        digest.update(repr((name, data.ids, data.tokens, data.labels)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some rows; `sentences` and `masks` have one entry a sentence of the task (one or two)."""

    task: Task
    rows: list[int]
    sentences: tuple[Tensor, ...]  # each (batch, length)
    masks: tuple[Tensor, ...]  # each (batch, length), True for real tokens
    labels: Tensor | None  # (batch,)


def collate(data: TokenSet, rows: Sequence[int], pad_id: int, device: torch.device) -> Batch:
    """Pads rows to their own longest sentence and moves them to the device."""
    pinned = device.type == "cuda"

    def place(tensor: Tensor) -> Tensor:
        # A copy out of pinned memory runs beside the computation.
        return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)

    sentences, masks = [], []
    for column in range(len(data.task.columns)):
        tokens = [data.tokens[row][column] for row in rows]
        length = max(map(len, tokens))
        padded = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in tokens])
        sizes = torch.tensor([len(ids) for ids in tokens])
        sentences.append(place(padded))
        masks.append(place(torch.arange(length) < sizes[:, None]))
    labels = None if data.labels is None else place(torch.tensor([data.labels[row] for row in rows]))
    return Batch(data.task, list(rows), tuple(sentences), tuple(masks), labels)


class Step(NamedTuple):
    """One optimizer step: a task and the rows of its training set."""

    task: str
    rows: list[int]


def epoch_steps(
    lengths: Mapping[str, Sequence[int]], step_rows: int, seed: int, epoch: int, interleave: str
) -> list[Step]:
    """The steps of an epoch.

    Args:
        lengths: for each task, the token count of each training row.
        step_rows: rows of a step; the last of a task may have fewer.
        seed: the run's seed.
        epoch: counted from 0; every epoch is shuffled anew.
        interleave: "proportional": every row once, tasks in random order, so a task's share of the steps is its share
            of the data. "round-robin": the tasks take turns until the largest is through, smaller ones start over,
            so every task has the same share.

    Returns:
        The steps in order.

    Example:
        >>> steps = epoch_steps({"sst": [5, 6, 7], "sts": [9]}, 2, seed=0, epoch=0, interleave="proportional")
        >>> sorted((step.task, len(step.rows)) for step in steps)
        [('sst', 1), ('sst', 2), ('sts', 1)]
    """
    shuffled = {task: _bucketed(sizes, step_rows, f"{seed}/{epoch}/{task}/0") for task, sizes in lengths.items()}
    if interleave == "proportional":
        steps = [Step(task, rows) for task, chunks in shuffled.items() for rows in chunks]
        random.Random(f"{seed}/{epoch}").shuffle(steps)
        return steps
    turns = max(len(chunks) for chunks in shuffled.values())
    for task, sizes in lengths.items():
        again = 1
        while len(shuffled[task]) < turns:
            shuffled[task] += _bucketed(sizes, step_rows, f"{seed}/{epoch}/{task}/{again}")
            again += 1
    return [Step(task, shuffled[task][turn]) for turn in range(turns) for task in lengths]


def _bucketed(lengths: Sequence[int], size: int, seed: str) -> list[list[int]]:
    """Shuffled chunks of rows of similar length."""
    draw = random.Random(seed)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    chunks = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda row: lengths[row])
        chunks += [pool[i : i + size] for i in range(0, len(pool), size)]
    draw.shuffle(chunks)
    return chunks


def micro_batches(rows: Sequence[int], count: int) -> list[list[int]]:
    """Cuts a step's rows into at most `count` micro-batches of nearly equal size."""
    count = min(count, len(rows))
    return [list(rows[i::count]) for i in range(count)]


def share(rows: Sequence[int], rank: int, world: int) -> tuple[list[int], float]:
    """A process's part of a batch, and the weight of its mean loss.

    Distributed training averages gradients over processes, as if each had the same number of rows. The weight,
    (own rows) · world / (all rows), makes the average the mean over all rows whatever the split. A process without
    any row takes one that counts nothing: it must take part in the exchange.
    """
    own = list(rows[rank::world])
    return (own, len(own) * world / len(rows)) if own else (list(rows[:1]), 0.0)
