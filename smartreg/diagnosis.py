"""`diagnose`: what each size of perturbation does to a model, before choosing one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smartreg._ascent.adversary import Adversary, Query
from smartreg._ascent.precision import REQUIRED_COSINE
from smartreg._ascent.start import Masks, noise_start
from smartreg._ascent.sweep import Sweep, ratio
from smartreg._model.passes import Forward, ModelPasses, check_forward
from smartreg._model.replay import ModuleState, RandomState, devices_of
from smartreg._outputs import OutputMask
from smartreg._wrappers import unwrapped
from smartreg.divergences import Divergence, resolve_divergence
from smartreg.results import Diagnosis
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
    example_ids: Masks = None,
    loss: float | Tensor | None = None,
    reference_steps: int = 10,
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
    - `share_of_maximum`: the penalty over the larger of two that `reference_steps` further steps of steepest ascent, of
      decreasing size, end at: from where the search ended, and from a start towards the uniform prediction;
    - `lambda_s`: the weight at which the regularizer is a tenth of the given task loss. A tenth is felt and does not
      take over; what serves a task best has to be tried on held-out data.

    The recommended range: cosine at least 0.9 and rounding at most a tenth, up to where a tenth of the predictions
    change (for a regression: where the penalty no longer grows as fast as ε).

    Args:
        model: As in `SmartLoss`.
        forward: As in the call of `SmartLoss`.
        mask: As in the call of `SmartLoss`.
        divergence: A name or a function; None: `"symmetric_kl"`.
        output_mask: As in the call of `SmartLoss`.
        example_ids: As in the call of `SmartLoss`.
        epsilons: Sizes above 0, in any order, in the unit of `epsilon_scale`. None: half decades from 1e-5 to 1.
        loss: The task loss on this batch, for the column `lambda_s`.
        reference_steps: Steps of the ascent that `share_of_maximum` is measured against; 0 leaves it out, and saves
            twice as many passes, forward and backward, for each ε.
        **options: Any other argument of `SmartLoss`, such as `embedding` or `norm`.

    Returns:
        A `Diagnosis`: tuples with an entry for each ε, a table when printed, a picture by `.plot()`. The model, its
        gradients and the random state are as before.

    Raises:
        TypeError, ValueError: As `SmartLoss`; an ε is not above 0, or there is none.
        RuntimeError: As `SmartLoss`; under `torch.inference_mode`.

    Examples:
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
    check_forward(forward)
    sizes = _checked_sizes(epsilons)
    if isinstance(reference_steps, bool) or not isinstance(reference_steps, int) or reference_steps < 0:
        raise ValueError(f"reference_steps must be an int of 0 or more, got {reference_steps!r}")
    task_loss = None if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
    if task_loss is not None and not 0 < task_loss < float("inf"):
        raise ValueError(f"loss must be a finite number above 0, the task loss on this batch, got {loss!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("the ascent needs gradients, which torch.inference_mode forbids: use torch.no_grad")
    swept = [name for name in ("epsilon", "step_size", "noise_std") if name in options]
    if swept:
        raise ValueError(f"diagnose sweeps epsilon = step_size = noise_std: pass epsilons, not {', '.join(swept)}")
    resolved = resolve_divergence("symmetric_kl" if divergence is None else divergence)
    smart = SmartLoss(model, divergence=resolved, epsilon=1.0, step_size=1.0, noise_std=1.0, **options)
    try:
        with _unchanged(smart):
            sweep = _swept_batch(smart, forward, Query(resolved, mask, None, output_mask, example_ids))
            rows = [sweep.row(size, reference_steps) for size in sizes]
    finally:
        smart.remove()
    penalty, random = tuple(row.penalty for row in rows), tuple(row.random for row in rows)
    changed = tuple(row.flips for row in rows if row.flips is not None)
    flips = changed if len(changed) == len(rows) else None
    shares = tuple(row.share for row in rows if row.share is not None)
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
        share_of_maximum=shares if reference_steps else None,
        lambda_s=None if task_loss is None else tuple(ratio(0.1 * task_loss, p) for p in penalty),
    )


def _swept_batch(smart: SmartLoss, forward: Forward, query: Query) -> Sweep:
    """The clean pass of a sweep, and what the passes around it need."""
    passes = ModelPasses(smart.model, smart._attached(), forward, smart.output_to_logits, shared_dropout=True)
    clean = passes.reference()
    adversary = Adversary(smart.settings, smart.generator, replace(smart._looks, precision=None))
    objective, balls, start = adversary.begin(passes, clean, query)
    noise = start if smart.settings.start == "noise" else noise_start(balls, None, smart.generator)
    uniform = replace(adversary, settings=replace(smart.settings, start="towards_uniform"))
    restart = uniform.begin(passes, clean, query).start
    autocast = smart.settings.ascent_autocast
    exact = objective.reference if autocast else passes.reference_without_autocast()
    # Not frozen: where nothing needs a gradient some layers take another path, with other rounding.
    penalty = replace(objective, run=passes.perturbed)
    run = partial(passes.perturbed, freeze=True, autocast=autocast)
    ascent = replace(penalty, run=run, reference=exact)
    with passes.same_dropout(False), passes.perturbed([torch.zeros_like(nu) for nu in noise.perturbations]) as outputs:
        dropout = float(penalty.value(tuple(output.detach() for output in outputs)))
    return Sweep(ascent, penalty, balls, start, restart, noise, dropout)


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

    Examples:
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
        state = ModuleState(module)
        with RandomState(devices_of(module), state.held.generators).replayed(), state.replayed():
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
