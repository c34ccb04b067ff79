"""`diagnose`: sweep ε on a model and a batch before choosing one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smartreg import divergences
from smartreg.diagnosis import Diagnosis, recommended_range
from smartreg.divergences import Divergence, resolve_divergence
from smartreg.locate import unwrapped
from smartreg.loss_scale import LossScale
from smartreg.output import divergence_of
from smartreg.passes import Forward, ModelPasses
from smartreg.precision import REQUIRED_COSINE, agreement, cosine_from
from smartreg.replay import ModuleState, RandomState, devices_of
from smartreg.search import Masks, search, starting_noise, surround
from smartreg.smart import SmartLoss

HALF_DECADES = tuple(10.0 ** (k / 2) for k in range(-10, 1))
"""From 1e-5 to 1, the sizes that are swept unless others are asked for."""

_SOFTMAX = (divergences.symmetric_kl, divergences.kl, divergences.jensen_shannon, divergences.hellinger)


def diagnose(
    model: nn.Module,
    forward: Forward,
    *,
    mask: Masks = None,
    divergence: str | Divergence | None = None,
    epsilons: Sequence[float] | None = None,
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
            sweep = _Sweep(smart, forward, mask, resolved)
            rows = [sweep.row(size) for size in sizes]
    finally:
        smart.remove()
    columns = {name: tuple(row[name] for row in rows) for name in rows[0]}
    flips = None if any(value is None for value in columns["flips"]) else columns["flips"]
    penalty, random = columns["penalty"], columns["random"]
    cosine = _running(max, columns["cosine"])
    rounding = _running(min, columns["rounding"])
    return Diagnosis(
        epsilons=sizes,
        penalty=penalty,
        random_divergence=random,
        ascent_gain=tuple(_ratio(p, r) for p, r in zip(penalty, random, strict=True)),
        flips=flips,
        direction_cosine=cosine,
        rounding_share=rounding,
        dropout_share=columns["dropout"],
        epsilon_scale=smart.settings.epsilon_scale,
        recommended=recommended_range(sizes, cosine, rounding, flips, penalty, REQUIRED_COSINE),
    )


class _Sweep:
    """One clean pass, and the passes of each ε around it."""

    def __init__(self, smart: SmartLoss, forward: Forward, mask: Masks, divergence: Divergence) -> None:
        self._settings, self._divergence, self._mask = smart.settings, divergence, mask
        self._passes = ModelPasses(smart.model, smart._attached(), forward, smart.output_to_logits, shared_dropout=True)
        self._clean = tuple(tensor.detach() for tensor in self._passes.reference())
        self._ascent_clean = self._clean
        if not self._settings.ascent_autocast:
            self._ascent_clean = tuple(tensor.detach() for tensor in self._passes.reference(autocast=False))
        self._embeddings = self._passes.record.embeddings
        self._unit = starting_noise(surround(self._embeddings, mask, self._settings), None, smart.generator)
        autocast = self._passes.record.autocast_dtype
        self._dtypes = [autocast, *(t.dtype for t in self._embeddings), *(t.dtype for t in self._clean)]
        self._scale = LossScale()
        with self._passes.same_dropout(False):
            self._dropout = self._value(self._outputs([torch.zeros_like(nu) for nu in self._unit]))

    def row(self, size: float) -> dict[str, Any]:
        """Everything that is measured at one ε."""
        settings = replace(self._settings, epsilon=size, step_size=size, noise_std=size)
        balls = surround(self._embeddings, self._mask, settings)
        noise = [size * nu for nu in self._unit]
        ascent = (self._divergence, self._scale, self._dtypes)
        found = search(balls, noise, self._run, self._ascent_clean, *ascent)
        agreed = agreement(self._run, self._ascent_clean, noise, balls, *ascent)
        plus = self._outputs(found.perturbations)
        minus = self._outputs([-delta for delta in found.perturbations])
        random = self._value(self._outputs([ball.settle(nu) for ball, nu in zip(balls, noise, strict=True)]))
        penalty = self._value(plus)
        return {
            "penalty": penalty,
            "random": random,
            "flips": _flips(plus, self._clean, self._divergence),
            "cosine": 0.0 if agreed is None else cosine_from(agreed),
            "rounding": self._rounding(plus, minus),
            "dropout": _ratio(self._dropout, self._dropout + penalty) if self._dropout else 0.0,
        }

    @contextlib.contextmanager
    def _run(self, perturbations: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        autocast = self._settings.ascent_autocast
        with self._passes.perturbed(perturbations, freeze=True, autocast=autocast) as outputs:
            yield outputs

    def _outputs(self, perturbations: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # Not frozen: where nothing needs a gradient some layers take another path, with other rounding.
        with self._passes.perturbed(perturbations) as outputs:
            return tuple(output.detach() for output in outputs)

    def _value(self, outputs: tuple[Tensor, ...]) -> float:
        return float(divergence_of(self._divergence, outputs, self._clean))

    def _rounding(self, plus: tuple[Tensor, ...], minus: tuple[Tensor, ...]) -> float:
        """In float64, so that no more than the rounding of the outputs themselves is seen."""
        clean = tuple(_wide(tensor) for tensor in self._clean)
        even = tuple((_wide(a) + _wide(b)) / 2 for a, b in zip(plus, minus, strict=True))
        whole = float(divergence_of(self._divergence, tuple(_wide(a) for a in plus), clean))
        part = float(divergence_of(self._divergence, even, clean))
        return min(1.0, 4.0 / 3.0 * part / whole) if whole > 0 else 1.0


def _flips(outputs: tuple[Tensor, ...], clean: tuple[Tensor, ...], divergence: Divergence) -> float | None:
    """Fraction of predictions that differ; a divergence of the user's own counts as one between softmax outputs."""
    if divergences.is_builtin(divergence):
        while hasattr(divergence, "func"):  # functools.partial
            divergence = divergence.func
        kind = "argmax" if divergence in _SOFTMAX else "sign" if divergence is divergences.binary_symmetric_kl else None
    else:
        kind = "argmax" if all(c.ndim > 1 and c.shape[-1] > 1 for c in clean) else None
    if kind is None:
        return None
    pairs = zip(outputs, clean, strict=True)
    if kind == "argmax":
        changed = [(a.argmax(-1) != b.argmax(-1)).flatten() for a, b in pairs]
    else:
        changed = [((a > 0) != (b > 0)).flatten() for a, b in pairs]
    return float(torch.cat(changed).float().mean())


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


def _running(choose: Any, values: tuple[float, ...]) -> tuple[float, ...]:
    """What rounding spoils less and less as ε grows, freed of the curvature that grows instead."""
    best: list[float] = []
    for value in values:
        best.append(value if not best else choose(best[-1], value))
    return tuple(best)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (float("nan") if part == 0 else float("inf"))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()  # MPS has no float64
