"""`diagnose`: what each size of perturbation does to a model, before choosing one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from smartreg._ascent.adversary import Adversary, Query
from smartreg._ascent.precision import REQUIRED_COSINE
from smartreg._ascent.start import Masks, noise_start
from smartreg._ascent.sweep import Sweep, ratio
from smartreg._loss_scale import LossScale
from smartreg._model.passes import Forward, ModelPasses
from smartreg._model.replay import ModuleState, RandomState, devices_of
from smartreg._outputs import OutputMask
from smartreg._wrappers import unwrapped
from smartreg.divergences import Divergence, resolve_divergence
from smartreg.smart import SmartLoss

ROUNDING_LIMIT = 0.1
"""The largest share of rounding in the penalty that a recommended ε may have."""

FLIP_LIMIT = 0.1
"""The largest fraction of changed predictions that a recommended ε may cause."""

HALF_DECADES = tuple(10.0 ** (k / 2) for k in range(-10, 1))
"""From 1e-5 to 1, the sizes that are swept unless others are asked for."""


def diagnose(
    model: nn.Module,
    forward: Forward,
    *,
    mask: Masks = None,
    divergence: str | Divergence | None = None,
    epsilons: Sequence[float] | None = None,
    output_mask: OutputMask = None,
    **options: Any,
) -> Diagnosis:
    r"""What each size of perturbation does to this model on this batch, and which ε to choose from.

    For every ε a `SmartLoss` with ε = η = σ is run as training would run it: in the mode (train or eval), dtype and
    autocast of the caller, with the same noise direction for every ε. Beside the penalty, the divergence of the
    projected noise without ascent, and the fraction of changed predictions (argmax over two classes or more, the sign
    of Bernoulli logits, none for a regression), each row has

    - `direction_cosine`: the cosine of the first ascent direction with the exact one, from the agreement of the
      gradients at \(\pm\nu\): an estimate, which falls again where the model is curved at that size, so that what
      a smaller ε has reached counts for the larger ones;
    - `rounding_share`: with the outputs \(f_\pm\) at \(\pm\delta\) and \(f_0\), the even part \((f_+ + f_-)/2 - f_0\)
      is rounding and curvature; \(\tfrac43 \, \ell(f_0 + \mathrm{even}, f_0) / \ell(f_+, f_0)\) bounds the share of
      rounding from above (three roundings of one size; curvature adds to it, so that again the bound of a smaller ε
      holds for the larger ones). A penalty of exactly 0 is rounding altogether: 1;
    - `dropout_share`: \(D / (D + R_s)\), D the divergence of two clean passes under different dropout masks: what
      `dropout="independent"` would add. 0 without dropout or in eval mode.

    The recommended range: cosine at least 0.9 and rounding at most a tenth, up to where a tenth of the predictions
    change (for a regression: where the penalty no longer grows as fast as ε).

    Args:
        model: As in `SmartLoss`.
        forward: As in the call of `SmartLoss`.
        mask: As in the call of `SmartLoss`.
        divergence: A name or a function; None: `"symmetric_kl"`.
        output_mask: As in the call of `SmartLoss`.
        epsilons: Sizes above 0, in any order, in the unit of `epsilon_scale`. None: half decades from 1e-5 to 1.
        **options: Any other argument of `SmartLoss`, such as `embedding` or `norm`.

    Returns:
        A `Diagnosis`: tuples with an entry for each ε, a table when printed, a picture by `.plot()`. The model, its
        gradients and the random state are as before.

    Raises:
        TypeError, ValueError: As `SmartLoss`; an ε is not above 0, or there is none.
        RuntimeError: As `SmartLoss`; under `torch.inference_mode`.

    Example:
        >>> import torch
        >>> from smartreg import diagnose
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> result = diagnose(model, lambda m: m(ids), embedding="0", epsilons=[0.01, 0.1])
        >>> result.recommended
        (0.01, 0.1)

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197, for the penalty.
    """
    sizes = _checked_sizes(epsilons)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("the ascent needs gradients, which torch.inference_mode forbids: use torch.no_grad")
    swept = [name for name in ("epsilon", "step_size", "noise_std") if name in options]
    if swept:
        raise ValueError(f"diagnose sweeps epsilon = step_size = noise_std: pass epsilons, not {', '.join(swept)}")
    resolved = resolve_divergence("symmetric_kl" if divergence is None else divergence)
    smart = SmartLoss(model, divergence=resolved, epsilon=1.0, step_size=1.0, noise_std=1.0, **options)
    try:
        with _unchanged(smart):
            sweep = _swept_batch(smart, forward, Query(resolved, mask, None, output_mask))
            rows = [sweep.row(size) for size in sizes]
    finally:
        smart.remove()
    penalty, random = tuple(row.penalty for row in rows), tuple(row.random for row in rows)
    changed = tuple(row.flips for row in rows if row.flips is not None)
    flips = changed if len(changed) == len(rows) else None
    cosine = _running(max, [row.cosine for row in rows])
    rounding = _running(min, [row.rounding for row in rows])
    return Diagnosis(
        epsilons=sizes,
        penalty=penalty,
        random_divergence=random,
        ascent_gain=tuple(ratio(p, r) for p, r in zip(penalty, random, strict=True)),
        flips=flips,
        direction_cosine=cosine,
        rounding_share=rounding,
        dropout_share=tuple(row.dropout for row in rows),
        epsilon_scale=smart.settings.epsilon_scale,
        recommended=recommended_range(sizes, cosine, rounding, flips, penalty, REQUIRED_COSINE),
    )


def _swept_batch(smart: SmartLoss, forward: Forward, query: Query) -> Sweep:
    """The clean pass of a sweep, and what the passes around it need."""
    passes = ModelPasses(smart.model, smart._attached(), forward, smart.output_to_logits, shared_dropout=True)
    clean = passes.reference()
    adversary = Adversary(smart.settings, smart.generator, LossScale(), None)
    objective, balls, start = adversary.begin(passes, clean, query)
    noise = start if smart.settings.start == "noise" else noise_start(balls, None, smart.generator)
    autocast = smart.settings.ascent_autocast
    exact = objective.reference if autocast else passes.reference_without_autocast()
    # Not frozen: where nothing needs a gradient some layers take another path, with other rounding.
    penalty = replace(objective, run=passes.perturbed)
    run = partial(passes.perturbed, freeze=True, autocast=autocast)
    ascent = replace(penalty, run=run, reference=exact)
    with passes.same_dropout(False), passes.perturbed([torch.zeros_like(nu) for nu in noise.perturbations]) as outputs:
        dropout = float(penalty.value(tuple(output.detach() for output in outputs)))
    return Sweep(ascent, penalty, balls, start, noise, dropout)


@dataclass(frozen=True)
class Diagnosis:
    r"""One row for each ε, from small to large; see `diagnose` for how each is measured.

    Attributes:
        epsilons: ε, in the unit of `epsilon_scale`.
        penalty: R_s after the ascent.
        random_divergence: The same without ascent, for the projected noise: what `steps=0` gives.
        ascent_gain: Penalty over random divergence; NaN where both are 0.
        flips: Fraction of predictions that the perturbation changes; None where there is no class to predict.
        direction_cosine: Estimated cosine of the ascent direction with the exact one.
        rounding_share: Upper bound of the share of the penalty that is rounding.
        dropout_share: Share of the penalty that would come from dropout under `dropout="independent"`.
        epsilon_scale: `"rms"` or `"absolute"`.
        recommended: Smallest and largest ε to choose from, None if no swept ε qualifies.
    """

    epsilons: tuple[float, ...]
    penalty: tuple[float, ...]
    random_divergence: tuple[float, ...]
    ascent_gain: tuple[float, ...]
    flips: tuple[float, ...] | None
    direction_cosine: tuple[float, ...]
    rounding_share: tuple[float, ...]
    dropout_share: tuple[float, ...]
    epsilon_scale: str
    recommended: tuple[float, float] | None

    def __str__(self) -> str:
        """A table for a terminal."""
        unit = "x RMS" if self.epsilon_scale == "rms" else "abs."
        head = (f"epsilon ({unit})", "penalty", "random", "gain", "flips", "cosine", "rounding", "dropout")
        lines = ["  ".join(f"{name:>{max(9, len(name))}}" for name in head)]
        for row, epsilon in enumerate(self.epsilons):
            cells = (
                f"{epsilon:.3g}",
                f"{self.penalty[row]:.3g}",
                f"{self.random_divergence[row]:.3g}",
                f"{self.ascent_gain[row]:.3g}",
                "-" if self.flips is None else f"{self.flips[row]:.1%}",
                f"{self.direction_cosine[row]:.3f}",
                f"{self.rounding_share[row]:.2%}",
                f"{self.dropout_share[row]:.2%}",
            )
            lines.append("  ".join(f"{cell:>{max(9, len(name))}}" for cell, name in zip(cells, head, strict=True)))
        if self.recommended is None:
            lines.append("recommended: none of these; the perturbation is rounded away or changes too many predictions")
        else:
            low, high = self.recommended
            lines.append(f"recommended: epsilon from {low:.3g} to {high:.3g} ({unit})")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw penalty and random divergence, and on a second axis the shares and the flips.

        Args:
            ax: A matplotlib `Axes`; None makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError(
                    "plot needs matplotlib, which is not installed: pip install matplotlib, or print the result, "
                    "which is a table"
                ) from error
            ax = pyplot.figure(figsize=(7.0, 4.2)).add_subplot()
        ax.loglog(self.epsilons, self.penalty, "o-", color="tab:blue", label="penalty")
        ax.loglog(self.epsilons, self.random_divergence, "o--", color="tab:cyan", label="random noise")
        ax.set_xlabel("epsilon / RMS of the embeddings" if self.epsilon_scale == "rms" else "epsilon")
        ax.set_ylabel("divergence")
        shares = ax.twinx()
        shares.set_ylim(-0.02, 1.02)
        shares.set_ylabel("share")
        shares.semilogx(self.epsilons, self.rounding_share, "^:", color="tab:red", label="rounding (at most)")
        shares.semilogx(self.epsilons, self.dropout_share, "v:", color="tab:gray", label="independent dropout")
        if self.flips is not None:
            shares.semilogx(self.epsilons, self.flips, "s:", color="tab:orange", label="changed predictions")
        if self.recommended is not None:
            ax.axvspan(*self.recommended, color="tab:green", alpha=0.12, label="recommended")
        (lines, labels), (others, names) = ax.get_legend_handles_labels(), shares.get_legend_handles_labels()
        ax.legend(lines + others, labels + names, fontsize="small", loc="center left")
        return ax


def recommended_range(
    epsilons: tuple[float, ...],
    direction_cosine: tuple[float, ...],
    rounding_share: tuple[float, ...],
    flips: tuple[float, ...] | None,
    penalty: tuple[float, ...],
    required_cosine: float,
) -> tuple[float, float] | None:
    """The swept ε to choose from.

    From below: the direction has the required cosine, and rounding is at most `ROUNDING_LIMIT` of the penalty. From
    above: no more than `FLIP_LIMIT` of the predictions change; where there are none to change, the penalty still grows
    at least linearly with ε (it is quadratic as long as the model is smooth at that scale).

    Example:
        >>> recommended_range((0.01, 0.1, 1.0), (0.2, 0.99, 1.0), (0.9, 0.02, 0.0), (0.0, 0.05, 0.5), (1, 2, 3), 0.9)
        (0.1, 0.1)
    """
    chosen = []
    for row, epsilon in enumerate(epsilons):
        if direction_cosine[row] < required_cosine or rounding_share[row] > ROUNDING_LIMIT:
            continue
        if flips is not None:
            gentle = flips[row] <= FLIP_LIMIT
        else:
            gentle = row == 0 or penalty[row] / epsilon >= penalty[row - 1] / epsilons[row - 1]
        if not gentle:
            break
        chosen.append(epsilon)
    return (chosen[0], chosen[-1]) if chosen else None


@contextlib.contextmanager
def _unchanged(smart: SmartLoss) -> Iterator[None]:
    """The random states, and buffers and attributes of the model, are as before after this block."""
    module = unwrapped(smart.model)
    drawn = None if smart.generator is None else smart.generator.get_state()
    try:
        with RandomState(devices_of(module)).replayed(), ModuleState(module).replayed():
            yield
    finally:
        if smart.generator is not None and drawn is not None:
            smart.generator.set_state(drawn)


def _checked_sizes(epsilons: Sequence[float] | None) -> tuple[float, ...]:
    sizes = tuple(sorted(float(epsilon) for epsilon in (HALF_DECADES if epsilons is None else epsilons)))
    if not sizes or not all(0 < size < float("inf") for size in sizes):
        raise ValueError(f"epsilons must be one or more finite numbers above 0, got {epsilons!r}")
    return sizes


def _running(choose: Any, values: Sequence[float]) -> tuple[float, ...]:
    """What rounding spoils less and less as ε grows, freed of the curvature that grows instead."""
    best: list[float] = []
    for value in values:
        best.append(value if not best else choose(best[-1], value))
    return tuple(best)
