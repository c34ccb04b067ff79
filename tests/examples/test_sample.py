"""The sample that ships with the examples: layout, sizes, balance, and no text that stands twice."""

import csv
import re
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
from example_tools import ROOT, SAMPLE

REAL = ROOT.parent / "shared" / "data" / "minbert"


class Task(NamedTuple):
    """One data set: its file stem, text and label columns, and the fewest rows each split may have."""

    stem: str
    text: tuple[str, ...]
    label: str
    train: int
    dev: int


class Row(NamedTuple):
    where: str
    task: str
    split: str
    id: str
    text: tuple[str, ...]
    label: str


TASKS = (
    Task("ids-sst", ("sentence",), "sentiment", 150, 60),
    Task("quora", ("sentence1", "sentence2"), "is_duplicate", 150, 60),
    Task("sts", ("sentence1", "sentence2"), "similarity", 150, 60),
    Task("ids-cfimdb", ("sentence",), "sentiment", 40, 20),
)
SPLITS = ("train", "dev")
EACH_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.stem)
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS)


def table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines, dialect="excel-tab"))


@cache
def rows(stem: str) -> tuple[Row, ...]:
    found = []
    for split in SPLITS:
        path = SAMPLE / f"{stem}-{split}.csv"
        for number, cells in enumerate(table(path)[1:], start=2):
            found.append(Row(f"{path.name}:{number}", stem, split, cells[1], tuple(cells[2:-1]), cells[-1]))
    return tuple(found)


def all_rows() -> list[Row]:
    return [row for task in TASKS for row in rows(task.stem)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def plain(text: str) -> str:
    """The text as its lower-case words, so that case, quotes and punctuation hide nothing."""
    return " ".join(words(text))


def sentences(row: Row) -> list[str]:
    """Every sentence of a row (a review and some questions have several), as plain words."""
    return [plain(part) for cell in row.text for part in re.split(r"(?<=[.!?])[\"']?\s+", cell)]


def trigrams(row: Row) -> set[tuple[str, ...]]:
    tokens = words(" ".join(row.text))
    return {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}


@EACH_SPLIT
@EACH_TASK
def test_layout(task: Task, split: str) -> None:
    header, *body = table(SAMPLE / f"{task.stem}-{split}.csv")
    assert header == ["", "id", *task.text, task.label]
    assert {len(cells) for cells in body} == {len(header)}
    assert [cells[0] for cells in body] == [str(i) for i in range(len(body))]
    assert [cells for cells in body if not all(cell and cell == cell.strip() for cell in cells)] == []


@EACH_TASK
def test_row_counts_and_what_the_readme_says(task: Task) -> None:
    count = Counter(row.split for row in rows(task.stem))
    assert count["train"] >= task.train
    assert count["dev"] >= task.dev
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{task.stem}` .*\| {count['train']} \| {count['dev']} \|", readme, re.MULTILINE)


def test_ids_are_25_hex_digits_and_unique() -> None:
    ids = [row.id for row in all_rows()]
    assert [i for i in ids if not re.fullmatch(r"[0-9a-f]{25}", i)] == []
    assert [i for i, n in Counter(ids).items() if n > 1] == []


@EACH_SPLIT
@pytest.mark.parametrize(
    ("stem", "labels", "low", "high"),
    [
        ("ids-sst", "0 1 2 3 4", 0.15, 0.25),
        ("quora", "0.0 1.0", 0.45, 0.55),
        ("ids-cfimdb", "0 1", 0.45, 0.55),
    ],
)
def test_classes_are_balanced(stem: str, labels: str, low: float, high: float, split: str) -> None:
    count = Counter(row.label for row in rows(stem) if row.split == split)
    assert sorted(count) == labels.split()
    assert {label: n for label, n in count.items() if not low <= n / count.total() <= high} == {}


@EACH_SPLIT
def test_similarities_cover_the_range(split: str) -> None:
    scores = [float(row.label) for row in rows("sts") if row.split == split]
    assert min(scores) == 0.0
    assert max(scores) == 5.0
    per_unit = Counter(min(4, int(score)) for score in scores)  # 5 belongs to the last interval
    assert [unit for unit in range(5) if per_unit[unit] < 0.1 * len(scores)] == []
    assert any(score % 1 for score in scores)


@EACH_TASK
def test_no_two_rows_share_half_their_trigrams(task: Task) -> None:
    grams = [(row, trigrams(row)) for row in rows(task.stem)]
    assert all(g for _, g in grams)
    close = [(a.where, b.where) for (a, g), (b, h) in combinations(grams, 2) if len(g & h) >= 0.5 * min(len(g), len(h))]
    assert close == []


def test_no_sentence_stands_twice() -> None:
    """Across tasks and splits, so that no dev sentence stands in train either."""
    seen: dict[str, str] = {}
    twice = []
    for row in all_rows():
        for sentence in sentences(row):
            if sentence in seen:
                twice.append((sentence, seen[sentence], row.where))
            seen[sentence] = row.where
    assert twice == []


def test_no_sentence_is_part_of_another_row() -> None:
    texts = [(row.where, " | ".join(f" {plain(cell)} " for cell in row.text)) for row in all_rows()]
    inside = [
        (sentence, row.where, where)
        for row in all_rows()
        for sentence in sentences(row)
        for where, text in texts
        if f" {sentence} " in text and where != row.where
    ]
    assert inside == []


def test_sentences_have_a_reasonable_length() -> None:
    lengths = [len(words(cell)) for row in all_rows() if row.task != "ids-cfimdb" for cell in row.text]
    assert min(lengths) >= 3
    assert max(lengths) <= 30
    reviews = [len(sentences(row)) for row in rows("ids-cfimdb")]
    assert min(reviews) >= 3
    assert max(reviews) <= 6


def test_some_rows_have_embedded_quotes() -> None:
    """Written as csv doubles them, so that a reader which splits on tabs alone is found out."""
    quoted = [row for row in all_rows() if any('"' in cell for cell in row.text)]
    assert len(quoted) >= 5
    assert {"train", "dev"} == {row.split for row in quoted}
    raw = "".join(path.read_text(encoding="utf-8") for path in sorted(SAMPLE.glob("*.csv")))
    assert '""' in raw


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared missing: no real data to compare the sample with")
def test_no_sentence_stands_in_the_real_data() -> None:
    known: set[str] = set()
    texts = []
    for path in sorted(REAL.glob("*.csv")):
        for cells in table(path)[1:]:
            for cell in cells[2:-1]:
                texts.append(plain(cell))
                known.update(plain(part) for part in re.split(r"(?<=[.!?])[\"']?\s+", cell))
    assert len(texts) > 1000
    known.update(texts)
    haystack = " | ".join(texts)
    ours = {sentence for row in all_rows() for sentence in sentences(row)}
    assert sorted(ours & known) == []
    # the real reviews run sentences together; five words and more are no chance meeting
    assert [s for s in sorted(ours) if len(s.split()) >= 5 and f" {s} " in haystack] == []
