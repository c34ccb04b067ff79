"""Reading the files of the CS224N project as they are.

They are tab-separated with a header, an unnamed index column, and quotes doubled inside quotes. Two rows of the real
Quora files lack their label. Such rows are skipped, but never silently: the caller gets file and line of each.
"""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import InputError
from .files import TEXT_LIMIT, read_bytes
from .tasks import Task

SAMPLE = Path(__file__).parent / "sample"
"""The data that ship with the example."""
MAX_UNUSABLE = 0.01
"""Share of lines that may be unusable; beyond it the file is not what it is taken for."""


@dataclass(frozen=True)
class Example:
    """One row: its id, its one or two sentences, and its label (None in the label-less files)."""

    id: str
    sentences: tuple[str, ...]
    label: float | None


@dataclass
class Split:
    """The usable rows of one file, and a note on each that is not."""

    task: Task
    file: Path
    examples: list[Example]
    skipped: list[str] = field(default_factory=list)

    @property
    def labelled(self) -> bool:
        """Whether the file has a label column."""
        return all(example.label is not None for example in self.examples)


def split_file(folder: Path, task: Task, split: str) -> Path | None:
    """The file of a split, or None; for "test" the labelled file wins over the course's label-less one."""
    names = [f"{task.stem}-{split}.csv"] + ([f"{task.stem}-test-student.csv"] if split == "test" else [])
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_split(folder: Path, task: Task, split: str, limit: int | None = None) -> Split:
    """Reads one split of one task.

    Args:
        folder: the data folder.
        task: which task.
        split: "train", "dev" or "test".
        limit: keep this many rows, drawn once for all (a smaller draw is part of a larger one; `--seed` has no say,
            so that seeds are compared on the same rows).

    Returns:
        The rows in the order of the file, and notes on those left out.

    Raises:
        InputError: folder or file is missing or not in the expected format; the message names file and line.
    """
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder}: no such folder")
    file = split_file(folder, task, split)
    if file is None:
        raise InputError(f"{folder / f'{task.stem}-{split}.csv'}: no such file (task {task.name}, split {split})")
    result = read_file(file, task)
    if split != "test" and not result.labelled:
        raise InputError(f"{file}:1: no column {task.label!r}; the {split} split needs labels")
    if limit is not None and limit < len(result.examples):
        result.examples = [result.examples[i] for i in drawn(task, len(result.examples), limit)]
    return result


def drawn(task: Task, count: int, limit: int) -> list[int]:
    """Which `limit` of `count` rows are looked at, in order: the same in every run, and part of any larger draw.

    The first rows of a file would not do: many files are sorted, by label or by source.

    Example:
        >>> from minbert.tasks import TASKS
        >>> set(drawn(TASKS["sst"], 1000, 3)) < set(drawn(TASKS["sst"], 1000, 4))
        True
    """
    order = random.Random(task.name).sample(range(count), count)
    return sorted(order[:limit])


def read_file(file: Path, task: Task) -> Split:
    """Reads one file; see `read_split`.

    A row without all its fields, or with an empty sentence or label, is skipped and noted; so is the last one of a file
    that does not end with a line break, since a label that is cut off may still be a number. A label that is there but
    no label of this task (7 stars, "nan") is an error at once: the file then holds something else than it should.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    lost_lines = 0
    rows = _rows(file)
    _, header, _ = next(rows, (1, [], True))
    twice = [name for name in ("id", *task.columns, task.label) if header.count(name) > 1]
    if twice:
        raise InputError(f"{file}:1: expected one column of each name, got {header.count(twice[0])} named {twice[0]!r}")
    missing = [name for name in ("id", *task.columns) if name not in header]
    if missing:
        raise InputError(
            f"{file}:1: expected a tab-separated header with the columns "
            f"{', '.join(('id', *task.columns, task.label))}; not found: {', '.join(missing)}"
        )
    labelled = task.label in header
    wanted = ["id", *task.columns, *([task.label] if labelled else [])]
    places = [header.index(name) for name in wanted]

    line = 1
    blank: list[int] = []
    for last_line, row, ended in rows:
        first, line = line + 1, last_line
        if not any(value.strip() for value in row):
            blank.append(first)
            continue
        # Blank lines are lost rows where rows follow, and the end of the file where none do.
        skipped += [f"{file}:{number}: the line is empty" for number in blank]
        lost_lines += len(blank)
        blank.clear()
        reason = _unusable(row, places, wanted, len(header))
        if reason:
            skipped.append(f"{file}:{first}: {reason}")
            lost_lines += last_line - first + 1
            continue
        if labelled and not ended:
            hint = "its label may be cut off; if the line is whole, end it with a line break"
            skipped.append(f"{file}:{first}: the file ends in the middle of this line and {hint}")
            continue
        values = [row[place].strip() for place in places]
        label = None
        if labelled:
            try:
                label = task.parse_label(values[-1])
            except ValueError as error:
                raise InputError(f"{file}:{first}: {error}") from None
        examples.append(Example(values[0], tuple(values[1 : 1 + len(task.columns)]), label))

    count = line - 1 - len(blank)
    if lost_lines > MAX_UNUSABLE * max(1, count):
        raise InputError(
            f"{skipped[0]}; {lost_lines} of {count} lines cannot be used, more than {MAX_UNUSABLE:.0%} of the file"
        )
    if not examples:
        raise InputError(f"{file}: no rows after the header")
    return Split(task, file, examples, skipped)


def _rows(file: Path) -> Iterator[tuple[int, list[str], bool]]:
    """Each row with the number of its last line, and whether that has an end."""
    content = read_bytes(file, TEXT_LIMIT)
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{file}:{line}: not valid UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise InputError(f"{file}: the file is empty")
    if "\0" in text:  # which Python 3.10's reader refuses, and later ones take
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{file}:{line}: holds a NUL character; remove it")
    csv.field_size_limit(max(1 << 17, len(text) + 1))
    reader = csv.reader(_lines(text), delimiter="\t")
    unended = None if text.endswith("\n") else text.count("\n") + 1
    try:
        for row in reader:
            yield reader.line_num, row, reader.line_num != unended
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: {error}") from None


def _lines(text: str) -> Iterator[str]:
    # str.splitlines would also cut at U+2028 and its like, which reviews contain.
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _unusable(row: list[str], places: list[int], wanted: list[str], width: int) -> str | None:
    """Why a row cannot be used, or None."""
    if len(row) != width:
        return f"expected {width} fields, got {len(row)}"
    if any("\t" in value and "\n" in value for value in row):
        return "a quote that is never closed swallows the lines after it"
    if "\n" in row[places[0]].strip():
        return "id holds a line break"  # the files of predictions have a line for each
    for place, name in zip(places, wanted, strict=True):
        if not row[place].strip():
            return f"{name} is empty"
    return None
