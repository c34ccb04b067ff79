"""Measure what small perturbations, half precision and dropout do to the regularizer, ours beside smart-pytorch's.

    python examples/benchmarks/numerics.py --output-dir numerics-results

writes `numerics.json`, `numerics.md` (the tables) and `numerics.png` (the figures).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from _numerics import facts
from _numerics.figures import draw
from _numerics.subject import SAMPLE, Subject, load
from rich.console import Console
from rich.table import Table

import smartreg

Rows = list[dict[str, Any]]
TITLES = {
    "facts": "Five facts",
    "divergence": "Penalty at a small absolute epsilon, float32",
    "divergence_new_head": "The same with a new head",
    "dropout": "Divergence of two passes without any perturbation, and the penalty at the published epsilon",
    "single_logit": "Divergence of two single logits",
    "directions": "Cosine of the ascent direction with the one in float64, by the size of the noise",
    "perturbation": "Mean over tokens of the largest entry of the perturbation",
    "sweep": "Penalty over the penalty in float64, by epsilon / RMS",
    "cosines": "Cosine of the first ascent direction with the one in float64, by epsilon / RMS",
    "warned": "Smallest useful absolute epsilon: what the warning says, and where the cosine crosses 0.9",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path, default=SAMPLE, help="folder with ids-sst-train.csv (default: sample)")
    parser.add_argument("--sentences", type=int, default=8, help="batch size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the head's first weights (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=None, help="where JSON, Markdown and PNG go (default: none)")
    options = parser.parse_args(arguments)
    if not (options.data_dir / "ids-sst-train.csv").is_file():
        parser.error(f"--data-dir {options.data_dir}: no ids-sst-train.csv in it")
    console = Console()
    with console.status("loading") as status:
        subject = load(options.data_dir, options.sentences, options.seed)
        results = measure(subject, lambda text: status.update(text))
    tables = tabulated(results)
    for name, rows in tables.items():
        console.print(rich_table(TITLES[name], rows))
    if options.output_dir is not None:
        write(options.output_dir, results, tables)
    return 0


def measure(subject: Subject, progress: Any) -> dict[str, Any]:
    """Every measurement, by name."""
    progress("divergences, directions, dropout, perturbations")
    new_head = subject.with_new_head()
    return {
        "environment": {
            "torch": torch.__version__,
            "smartreg": smartreg.__version__,
            "machine": platform.machine(),
            "sentences": len(subject.mask),
            "root_mean_square": subject.root_mean_square(),
        },
        "divergence": facts.divergence_errors(subject),
        "divergence_new_head": facts.divergence_errors(new_head),
        "directions": facts.directions(subject),
        "dropout": [
            {"head": name, **facts.dropout_mismatch(measured)}
            for name, measured in (("fitted", subject), ("new", new_head))
        ],
        "perturbation": facts.effective_perturbation(subject),
        "single_logit": facts.single_logit(),
        "paper_float32": facts.paper_in_float32(subject),
        "sweep": facts.sweep(subject, progress),
        "warned": facts.warned_sizes(subject, progress),
    }


def tabulated(results: dict[str, Any]) -> dict[str, Rows]:
    """The tables of the report, from the raw results."""
    dropout, single = results["dropout"][0], {row["logits"]: row for row in results["single_logit"]}["3, -3"]
    at = {row["epsilon"]: row for row in results["divergence"]}
    entry = {row["epsilon"]: row for row in results["perturbation"]}
    bf16 = {row["noise"]: row["bfloat16 autocast"] for row in results["directions"]}
    summary = [
        _fact(
            "divergence of the float32 outputs at epsilon 1e-8",
            at[1e-8]["smartreg"],
            at[1e-8]["smart-pytorch"],
            at[1e-8]["float64 of the float32 outputs"],
        ),
        _fact("cosine of the direction, bfloat16 autocast, noise 1e-4 (smartreg warns)", bf16[1e-4], bf16[1e-4], 1.0),
        _fact("divergence without perturbation, train mode", dropout["smartreg"], dropout["smart-pytorch"], 0.0),
        _fact("largest entry at epsilon 1e-5", entry[1e-5]["smartreg"], entry[1e-5]["smart-pytorch"], 1e-5),
        _fact("single logits 3 and -3", single["smartreg"], single["smart-pytorch"], single["exact"]),
    ]
    swept, names = results["sweep"], [p.name for p in facts.SWEEP]
    truth = {row["epsilon"]: row["penalty"] for row in swept if row["precision"] == "float64"}
    ratios: Rows = [{"epsilon": epsilon, "float64": value} for epsilon, value in truth.items()]
    cosines: Rows = [{"epsilon": epsilon} for epsilon in truth]
    for name in names:
        mine = {row["epsilon"]: row for row in swept if row["precision"] == name}
        for ratio, direction in zip(ratios, cosines, strict=True):
            row = mine[ratio["epsilon"]]
            ratio[name] = row["penalty"] / ratio["float64"]
            direction[name] = row["cosine"]
            if "penalty_ascent_float32" in row:
                ratio[f"{name}, ascent float32"] = row["penalty_ascent_float32"] / ratio["float64"]
    return {
        "facts": summary,
        "divergence": results["divergence"],
        "divergence_new_head": results["divergence_new_head"],
        "dropout": results["dropout"],
        "single_logit": results["single_logit"],
        "directions": results["directions"],
        "perturbation": results["perturbation"],
        "sweep": ratios,
        "cosines": cosines,
        "warned": results["warned"],
    }


def _fact(name: str, ours: float, theirs: float, exact: float) -> dict[str, Any]:
    return {"fact": name, "smartreg": ours, "smart-pytorch": theirs, "exact": exact}


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rich_table(title: str, rows: Rows) -> Table:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def markdown(title: str, rows: Rows) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(folder: Path, results: dict[str, Any], tables: dict[str, Rows]) -> None:
    """JSON with everything, Markdown with the tables, PNG with the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "numerics.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(markdown(TITLES[name], rows) for name, rows in tables.items())
    (folder / "numerics.md").write_text(text, encoding="utf-8")
    draw(results, folder / "numerics.png")


if __name__ == "__main__":
    sys.exit(main())
