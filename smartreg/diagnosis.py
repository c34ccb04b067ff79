"""`diagnose`: what each size of perturbation does to a model, before choosing one."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from smartreg._ascent.adversary import Adversary, Query
from smartreg._ascent.looks import all_finite
from smartreg._ascent.settings import LARGEST
from smartreg._ascent.start import noise_start
from smartreg._ascent.sweep import Row, Sweep, ratio
from smartreg._ascent.verdict import FELT, gentle, is_sound, is_useful, recommended_range, wilson
from smartreg._checks import check_forward, whole
from smartreg._masks import Masks
from smartreg._model.passes import ModelPasses
from smartreg._model.replay import undone
from smartreg._outputs import Forward
from smartreg._wrappers import unwrapped
from smartreg.divergences import Divergence, kind_of, resolve_divergence
from smartreg.results import Diagnosis
from smartreg.smart import SmartLoss

HALF_DECADES = tuple(10.0 ** (k / 2) for k in range(-10, 1))
"""From 1e-5 to 1; swept, with the default of `SmartLoss` where it has this unit, unless others are asked for."""

DEFAULT_EPSILON: float = inspect.signature(SmartLoss.__init__).parameters["epsilon"].default


def diagnose(
    model: nn.Module,
    forward: Forward,
    *,
    mask: Masks = None,
    divergence: str | Divergence | None = None,
    epsilons: Sequence[float] | None = None,
    output_mask: Masks = None,
    example_ids: Masks = None,
    loss: float | Tensor | None = None,
    reference_steps: int = 10,
    progress: Callable[[str], object] | None = None,
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
      `dropout="independent"` would add. 0 without dropout or in eval mode;
    - `share_of_maximum`: the penalty over the largest that `reference_steps` further steps of steepest ascent, of
      decreasing size, end at: from where the search ended, and, where it did not end there already, from a start
      towards the uniform prediction;
    - `lambda_s`: the weight at which the regularizer is a tenth of the given task loss. A tenth is felt and does not
      take over; what serves a task best has to be tried on held-out data.

    Three questions are answered apart from each other, for each ε:

    - `sound`: the precision in use carries it: cosine at least 0.9, at most a tenth of the penalty rounding;
    - `useful`: a \(\lambda_s\) of at most 100 makes the regularizer a tenth of the task loss, which takes a penalty of
      at least a thousandth of that loss. Without `loss` the loss of the uniform prediction stands in for it, \(\ln C\);
      for values there is none, and nothing is called useless;
    - `gentle`: it is not shown that more than a tenth of the predictions change: the 95 % interval of their share
      reaches down to a tenth (for a regression: the penalty still grows at least as fast as ε). With fewer than 35
      predictions this is told badly, and printing the result says so.

    The recommended range holds the ε that are all three, up to the first that is not gentle. It describes one batch and
    one state of the model: held-out data decides, and may prefer an ε outside of it.

    It takes its time: for each ε about as long as 14 plain training steps on this batch (24 with steps of ascent or
    another start than the default), and as 4 with `reference_steps=0`. Thirty-five examples or more are worth it;
    `progress=print` tells how long it will take.

    Args:
        model: As in `SmartLoss`.
        forward: As in the call of `SmartLoss`.
        mask: As in the call of `SmartLoss`.
        divergence: A name or a function; None: `"symmetric_kl"`.
        output_mask: As in the call of `SmartLoss`.
        example_ids: As in the call of `SmartLoss`.
        epsilons: Sizes above 0, in any order, in the unit of `epsilon_scale`. None: half decades from 1e-5 to 1, and in
            the unit "rms" the default of `SmartLoss`.
        loss: The task loss on this batch, for the column `lambda_s` and for what is useful.
        reference_steps: Steps of the ascent that `share_of_maximum` is measured against; 0 leaves it out, and saves
            as many passes, forward and backward, for each ε and each point that the ascent begins at.
        progress: Called after each ε with a line of text: how long it took, and about how long the others will.
        **options: Any other argument of `SmartLoss`, such as `embedding` or `norm`; masks of dropout are shared.

    Returns:
        Tuples with an entry for each ε; a table with a summary when printed, a picture by `.plot()`. The model, its
            gradients and the random state are as before.

    Raises:
        TypeError, ValueError: As `SmartLoss`; an ε is not above 0, or there is none.
        RuntimeError: As `SmartLoss`; under `torch.inference_mode`; the clean output is not finite.

    Examples:
        >>> import torch
        >>> from smartreg import diagnose
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> result = diagnose(model, lambda m: m(ids), embedding="0", epsilons=[0.01, 0.1])
        >>> result.recommended
        (0.1, 0.1)
        >>> result.sound, result.useful
        ((True, True), (False, True))

    Reference:
        Jiang et al., SMART, ACL 2020, section 3.1, doi 10.18653/v1/2020.acl-main.197, for the penalty.
    """
    check_forward(forward)
    sizes = _checked_sizes(epsilons, options.get("epsilon_scale", "rms"))
    reference_steps = whole("reference_steps", reference_steps)
    if not (loss is None or isinstance(loss, Real) or (isinstance(loss, Tensor) and loss.numel() == 1)):
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss must be a number or a tensor of one, got {got}")
    task_loss = None if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
    if task_loss is not None and not 0 < task_loss < float("inf"):
        raise ValueError(f"loss must be a finite number above 0, the task loss on this batch, got {loss!r}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be None or a function of a line of text, got {type(progress).__name__}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("the ascent needs gradients, which torch.inference_mode forbids: use torch.no_grad")
    swept = [name for name in ("epsilon", "step_size", "noise_std") if name in options]
    if swept:
        raise ValueError(f"diagnose sweeps epsilon = step_size = noise_std: pass epsilons, not {', '.join(swept)}")
    if options.get("dropout") == "independent":
        raise ValueError(
            'diagnose measures under shared dropout masks, got dropout="independent": leave it out, and read from '
            "dropout_share what fresh masks would add to the penalty"
        )
    resolved = resolve_divergence("symmetric_kl" if divergence is None else divergence)
    smart = SmartLoss(model, divergence=resolved, epsilon=1.0, step_size=1.0, noise_std=1.0, **options)
    began = time.perf_counter()
    try:
        with undone(unwrapped(model), [] if smart.generator is None else [smart.generator]):
            sweep = _swept_batch(smart, forward, Query(resolved, mask, None, output_mask, example_ids))
            rows = []
            for size in sizes:
                rows.append(sweep.row(size, reference_steps))
                if progress is not None:
                    progress(_so_far(sizes, len(rows), time.perf_counter() - began))
            typical = sweep.uniform_loss() if task_loss is None else task_loss
    finally:
        smart.remove()
    found = _columns(sizes, rows, typical)
    shares = tuple(row.share for row in rows if row.share is not None)
    return replace(
        found,
        epsilon_scale=smart.settings.epsilon_scale,
        share_of_maximum=shares if reference_steps else None,
        lambda_s=None if task_loss is None else tuple(ratio(FELT * task_loss, p) for p in found.penalty),
        default_epsilon=DEFAULT_EPSILON if smart.settings.epsilon_scale == "rms" else None,
        seconds=time.perf_counter() - began,
    )


def _columns(sizes: tuple[float, ...], rows: Sequence[Row], task_loss: float | None) -> Diagnosis:
    """The rows as columns, and what they say together."""
    penalty, random = tuple(row.penalty for row in rows), tuple(row.random for row in rows)
    changed = tuple(row.flips for row in rows if row.flips is not None)
    flips = changed if len(changed) == len(rows) else None
    n = rows[0].predictions
    intervals = None if flips is None or n is None else tuple(wilson(share, n) for share in flips)
    cosine = _running(max, [row.cosine for row in rows])
    rounding = _running(min, [row.rounding for row in rows])
    sound = tuple(map(is_sound, cosine, rounding))
    useful = None if task_loss is None else tuple(is_useful(p, task_loss) for p in penalty)
    soft = gentle(intervals, sizes, penalty)
    fit = sound if useful is None else tuple(s and u for s, u in zip(sound, useful, strict=True))
    return Diagnosis(
        epsilons=sizes,
        penalty=penalty,
        random_divergence=random,
        ascent_gain=tuple(ratio(p, r) for p, r in zip(penalty, random, strict=True)),
        flips=flips,
        direction_cosine=cosine,
        rounding_share=rounding,
        dropout_share=tuple(row.dropout for row in rows),
        epsilon_scale="rms",
        recommended=recommended_range(sizes, fit, soft),
        predictions=n,
        flips_interval=intervals,
        task_loss=task_loss,
        sound=sound,
        useful=useful,
        gentle=soft,
    )


def _so_far(sizes: Sequence[float], done: int, seconds: float) -> str:
    left = seconds / done * (len(sizes) - done)
    return f"epsilon {sizes[done - 1]:.3g}: {done} of {len(sizes)} after {seconds:.1f} s, about {left:.0f} s to go"


def _swept_batch(smart: SmartLoss, forward: Forward, query: Query) -> Sweep:
    """The clean pass of a sweep, and what the passes around it need."""
    passes = ModelPasses(smart.model, smart._attached(), forward, smart.output_to_logits, shared_dropout=True)
    clean = passes.reference()
    if not all_finite(clean.compared):
        raise RuntimeError(
            "diagnose needs a model whose output is finite, got NaN or inf in the clean pass: the weights or the batch "
            "hold them. Go back to a sound checkpoint"
        )
    adversary = Adversary(smart.settings, smart.generator, replace(smart._looks, precision=None))
    objective, balls, start = adversary.begin(passes, clean, query)
    noise = start if smart.settings.start == "noise" else noise_start(balls, None, smart.generator)
    restart = None  # where the search itself ends at that start
    draws = kind_of(query.divergence) in (None, "value")  # nothing is uniform there, so that the start is a random one
    if draws or smart.settings.start != "towards_uniform" or smart.settings.steps:
        uniform = replace(adversary, settings=replace(smart.settings, start="towards_uniform"))
        restart = uniform.begin(passes, clean, query).start
    autocast = smart.settings.ascent_autocast or not smart.settings.steps  # there is nothing else to be run without it
    exact = objective.reference if autocast else passes.reference_without_autocast()[0]
    # Not frozen: where nothing needs a gradient some layers take another path, with other rounding.
    penalty = replace(objective, run=passes.perturbed)
    run = partial(passes.perturbed, freeze=True, autocast=autocast)
    ascent = replace(penalty, run=run, reference=exact)
    with passes.same_dropout(False), passes.perturbed([torch.zeros_like(nu) for nu in noise.perturbations]) as outputs:
        dropout = float(penalty.value(tuple(output.detach() for output in outputs)))
    return Sweep(ascent, penalty, balls, start, restart, noise, dropout)


def _checked_sizes(epsilons: Sequence[float] | None, scale: str) -> tuple[float, ...]:
    swept = (*HALF_DECADES, *([DEFAULT_EPSILON] if scale == "rms" else [])) if epsilons is None else epsilons
    try:
        sizes = tuple(sorted(float(epsilon) for epsilon in swept))
    except (TypeError, ValueError, OverflowError):  # no sequence, or no numbers, or none that a float can hold
        sizes = ()
    if not sizes or not all(0 < size <= LARGEST for size in sizes):
        raise ValueError(f"epsilons must be one or more numbers above 0 and at most {LARGEST:g}, got {epsilons!r}")
    return sizes


def _running(choose: Any, values: Sequence[float]) -> tuple[float, ...]:
    """What rounding spoils less and less as ε grows, freed of the curvature that grows instead."""
    best: list[float] = []
    for value in values:
        best.append(value if not best else choose(best[-1], value))
    return tuple(best)
