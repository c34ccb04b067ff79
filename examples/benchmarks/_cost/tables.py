"""How each table reads: its heading, what to know about it, and its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .cases.variants import ALL

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of one section.

    Attributes:
        section: where its rows stand in the results.
        title: its heading.
        note: what is measured.
        columns: heading and how a cell is written.
        keep: which rows belong to it.
    """

    section: str
    title: str
    note: str
    columns: tuple[tuple[str, Callable[[Row], str]], ...]
    keep: Callable[[Row], bool] = lambda row: True

    def cells(self, rows: list[Row]) -> list[list[str]]:
        """The text of every cell."""
        return [[write(row) for _, write in self.columns] for row in rows if self.keep(row)]


def text(key: str) -> Callable[[Row], str]:
    """A cell as it is."""
    return lambda row: str(row[key])


def times(key: str) -> Callable[[Row], str]:
    """A multiple of the yardstick; empty where it was not measured."""
    return lambda row: f"{row[key]:.2f}×" if key in row else ""


def times_and_quartiles(key: str) -> Callable[[Row], str]:
    """A multiple of the yardstick with its quartiles over the rounds."""

    def write(row: Row) -> str:
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return f"{row[key]:.2f}×" if low == high else f"{row[key]:.2f}× ({low:.2f} to {high:.2f})"

    return write


def milliseconds(key: str) -> Callable[[Row], str]:
    """Seconds written as milliseconds."""
    return lambda row: f"{row[key] * 1e3:,.1f}" if row[key] < 1 else f"{row[key] * 1e3:,.0f}"


def megabytes(key: str) -> Callable[[Row], str]:
    """Bytes written as megabytes."""
    return lambda row: f"{row[key] / 1e6:,.0f}"


_MEASURED = (
    ("ms", milliseconds("seconds")),
    ("time", times("times")),
    ("arithmetic", times("times_flops")),
    ("peak MB", megabytes("bytes")),
    ("memory", times("times_bytes")),
)


def _axis(name: str, *columns: tuple[str, Callable[[Row], str]]) -> dict[str, Any]:
    return {"section": "grid", "columns": columns, "keep": lambda row: row["axis"] == name}


_VARIANT, _BATCH, _LENGTH = ("variant", text("variant")), ("batch", text("batch")), ("length", text("length"))
_STEPS = ("steps", text("steps"))
_WITH_QUARTILES = ("time", times_and_quartiles("times"))
_CLAIMED = (_BATCH, _LENGTH, _VARIANT, _MEASURED[0], _WITH_QUARTILES, *_MEASURED[2:])

TABLES = (
    Table(
        title="One step of training",
        note="Forward and backward; multiples are of the plain step, with the quartiles over the rounds. Arithmetic "
        "counts floating-point operations.",
        **_axis("main", *_CLAIMED),
    ),
    Table(
        "searches",
        "One step of training, by the way to search",
        "Forward and backward at the main shape, all in one comparison: Algorithm 1 with one step, and the library's "
        "start towards the uniform prediction without a further step (the default) and with one.",
        (_VARIANT, ("search", text("search")), _STEPS, _MEASURED[0], _WITH_QUARTILES, *_MEASURED[2:]),
    ),
    Table(
        "kept",
        "The same step where freed memory is kept",
        "`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776` in the environment of every variant: the C library "
        "then reuses the memory of the step before, and the system need not hand out and clear pages again.",
        (_VARIANT, ("ms", milliseconds("seconds")), _WITH_QUARTILES),
    ),
    Table(
        "fit",
        "Largest batch in a fixed amount of memory",
        "Found by bisection, a process for each try. On a CPU the limit is the address space of the whole process "
        "(`RLIMIT_AS`), on a GPU its share of the device.",
        (
            ("limit MB", megabytes("limit")),
            _LENGTH,
            _VARIANT,
            ("largest batch", text("batch")),
            ("of smart-pytorch's", times("times")),
        ),
    ),
    Table(
        title="Growth with the batch", note="Short sentences.", **_axis("batch", _BATCH, _LENGTH, _VARIANT, *_MEASURED)
    ),
    Table(
        title="Growth with the length", note="A small batch.", **_axis("length", _BATCH, _LENGTH, _VARIANT, *_MEASURED)
    ),
    Table(
        title="Growth with the ascent steps",
        note="Plain takes none.",
        **_axis("steps", _STEPS, _BATCH, _LENGTH, _VARIANT, *_MEASURED),
    ),
    Table(
        "amortised",
        "The penalty on every k-th step",
        "One step of standard SMART and k − 1 plain ones, the penalty times k: time of a step, on average.",
        (
            ("k", lambda row: str(row["every"] or "never")),
            ("ms a step", milliseconds("seconds")),
            ("time", times("times")),
        ),
    ),
    Table(
        "compiled",
        "Under torch.compile",
        "Speed is eager time over compiled time; the last column is a multiple of the compiled plain step.",
        (
            _VARIANT,
            ("eager ms", milliseconds("eager")),
            ("compiled ms", milliseconds("compiled")),
            ("speed", times("speedup")),
            ("time", times("times")),
        ),
    ),
    Table(
        "half",
        "Ascent with autocast off",
        "A step under bfloat16 autocast, the ascent under it too or with `ascent_autocast=False`, which adds a clean "
        "pass in float32. Half precision is slow on a CPU that has no instructions for it.",
        (_VARIANT, ("ascent in", text("ascent")), ("ms", milliseconds("seconds")), ("time", times("times"))),
    ),
    Table(
        "divergences",
        "Symmetric divergence of large outputs",
        "Forward and backward for both arguments in float32; memory is above the logits and counts their gradients.",
        (
            ("rows", text("rows")),
            ("classes", text("classes")),
            ("form", text("form")),
            ("ms", milliseconds("seconds")),
            ("speed", times("speedup")),
            ("peak MB", megabytes("bytes")),
            ("memory", times("times_bytes")),
        ),
    ),
    Table(
        "averages",
        "One update of the teacher",
        "All parameters of the model. Memory is what making the average adds at its peak; the flat tensor's counts "
        "the copy of the parameters that it needs.",
        (
            ("average", text("average")),
            ("ms", milliseconds("seconds")),
            ("time", times("times")),
            ("peak MB", megabytes("bytes")),
        ),
    ),
    Table(
        "where",
        "Where the time goes",
        "Milliseconds of self time in one step, from the profiler, by kind of operation. The look-up is part of the "
        "embedding row.",
        (("kind", text("kind")), *((name, milliseconds(name)) for name in ALL)),
    ),
    Table(
        "agreement",
        "The modes agree",
        "Largest difference between the gradients of all parameters, relative to the largest entry; checked before "
        "anything was timed.",
        (("compared", text("compared")), ("difference", lambda row: f"{row['difference']:.0e}")),
    ),
)
