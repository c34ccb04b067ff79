"""The figures of the numerics study, from its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, THEIRS = "tab:blue", "tab:red"


def draw(results: Mapping[str, Any], file: Path) -> None:
    """One panel for each thing that goes wrong, and two for the sweep."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, ((penalty, direction, rounding), (dropout, logit, size)) = pyplot.subplots(2, 3, figsize=(13.0, 7.6))
    _sweep(penalty, direction, results["sweep"])
    _rounding(rounding, results)
    _dropout(dropout, results["dropout"])
    _single_logit(logit, results["single_logit"])
    _size(size, results["perturbation"])
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _sweep(penalty: Any, direction: Any, swept: list[Mapping[str, Any]]) -> None:
    for name in dict.fromkeys(row["precision"] for row in swept):
        rows = [row for row in swept if row["precision"] == name]
        sizes = [row["epsilon"] for row in rows]
        penalty.loglog(sizes, [row["penalty"] for row in rows], ".-", label=name)
        direction.semilogx(sizes, [row["cosine"] for row in rows], ".-", label=name)
    direction.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    penalty.set(title="the penalty against ε", xlabel="ε / RMS of the embeddings", ylabel="penalty")
    direction.set(title="the ascent direction", xlabel="ε / RMS of the embeddings", ylabel="cosine with float64")
    penalty.legend(fontsize="small")


def _rounding(axes: Any, results: Mapping[str, Any]) -> None:
    for key, head, style in (("divergence", "fitted head", "o-"), ("divergence_new_head", "new head", "s--")):
        rows = results[key]
        for name, label, colour in (("smartreg", "symmetric_kl", OURS), ("smart-pytorch", "two kl_div calls", THEIRS)):
            ratios = [row[name] / row["float64 of the float32 outputs"] for row in rows]
            axes.loglog([row["epsilon"] for row in rows], ratios, style, color=colour, label=f"{label}, {head}")
    axes.set(title="a divergence that rounds", xlabel="ε, absolute", ylabel="penalty / exact, same float32 outputs")
    axes.legend(fontsize="small")


def _dropout(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    for offset, key, label, colour in (
        (-0.2, "penalty_at_paper", "penalty at ε = 1e-5, same masks", OURS),
        (0.2, "smart-pytorch", "no perturbation, other masks", THEIRS),
    ):
        axes.bar([i + offset for i in range(len(rows))], [row[key] for row in rows], 0.4, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_ylim(top=30 * max(row["smart-pytorch"] for row in rows))
    axes.set_xticks(range(len(rows)), [f"{row['head']} head" for row in rows])
    axes.set(title="other dropout masks", ylabel="divergence")
    axes.legend(fontsize="small")


def _single_logit(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    positions = range(len(rows))
    axes.plot(positions, [row["exact"] for row in rows], "k-", linewidth=0.8, label="exact")
    axes.plot(positions, [row["smartreg"] for row in rows], "o", color=OURS, label="binary_symmetric_kl")
    axes.plot(positions, [row["smart-pytorch"] for row in rows], "s-", color=THEIRS, label="softmax over one logit")
    axes.set_xticks(positions, [row["logits"] for row in rows])
    axes.set(title="a single logit", xlabel="the two logits", ylabel="divergence")
    axes.legend(fontsize="small")


def _size(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    asked = [row["epsilon"] for row in rows]
    axes.loglog(asked, [row["smartreg"] for row in rows], "o-", color=OURS, label="smartreg (projected)")
    axes.loglog(asked, [row["smart-pytorch"] for row in rows], "s-", color=THEIRS, label="smart-pytorch")
    axes.axhline(
        rows[0]["mean_absolute_embedding"], color="gray", linewidth=0.8, linestyle=":", label="embedding entry"
    )
    axes.set(title="the size of the perturbation", xlabel="ε asked for", ylabel="largest entry of a token, mean")
    axes.legend(fontsize="small")
