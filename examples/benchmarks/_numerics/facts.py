"""The measurements of the numerics study, each a function from the subject to rows of numbers."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from smart_pytorch import SMARTLoss, sym_kl_loss
from torch import Tensor, nn

from smartreg import SmartLoss, SmartWarning, binary_symmetric_kl, symmetric_kl

from .subject import BF16_AUTOCAST, BF16_WEIGHTS, FLOAT32, FLOAT64, FP16_AUTOCAST, Precision, Subject, rescaled

Row = dict[str, Any]
ALGORITHM_1 = {"norm": "inf", "start": "noise", "steps": 1}
"""What the tables are of: the search that the paper prints."""
RELATIVE = tuple(10.0 ** (k / 2) for k in range(-10, 1))
ABSOLUTE = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2)
DRAWS = (1, 2, 3)  # seeds of the noise where one direction says too little
SWEEP = (FLOAT32, BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS)


class Recorder:
    """A forward function that remembers the perturbation which each pass of `SmartLoss` added.

    The hook is registered after that of `SmartLoss`, so that it sees the perturbed embeddings.
    """

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        self.subject, self.seen = subject, []
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: self.seen.append(out.detach()))

    def __call__(self, model: nn.Module) -> Tensor:
        return self.subject.forward(model)

    def last(self) -> Tensor:
        """x̃ − x of the last pass, zero at padding."""
        return (self.seen[-1].double() - self.seen[0].double()) * self.subject.mask.unsqueeze(-1)


def perturbed(model: nn.Module, subject: Subject, delta: Tensor | None) -> Tensor:
    """Logits with `delta` added to the word embeddings."""
    if delta is None:
        return subject.forward(model)
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: (out + delta).to(out.dtype))
    try:
        return subject.forward(model)
    finally:
        handle.remove()


def noise(subject: Subject, seed: int = 1) -> Tensor:
    """Normal noise of unit standard deviation on the real tokens, in float32."""
    draw = torch.randn(subject.embeddings().shape, generator=torch.Generator().manual_seed(seed))
    return draw * subject.mask.unsqueeze(-1)


def ascent_gradient(model: nn.Module, subject: Subject, delta: Tensor, precision: Precision) -> Tensor:
    """Gradient of the divergence at x + delta, the first of Algorithm 1."""
    scale = 4096.0 if precision.autocast is torch.float16 else 1.0
    variable = delta.clone().requires_grad_()
    with precision.active():
        with torch.no_grad():
            clean = perturbed(model, subject, None)
        value = symmetric_kl(perturbed(model, subject, variable), clean) * scale
        (gradient,) = torch.autograd.grad(value, variable)
    return gradient.double() / scale * subject.mask.unsqueeze(-1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the whole batch."""
    return ((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300)).item()


def divergence_errors(subject: Subject) -> list[Row]:
    """Fact 1: the penalty at small ε, by two `kl_div` calls and by `symmetric_kl`, beside float64."""
    rows = []
    exact_model, model = subject.in_precision(FLOAT64), subject.in_precision(FLOAT32)
    for epsilon in (1e-5, 1e-6, 1e-7, 1e-8):
        delta = _found(subject, exact_model, epsilon)
        with torch.no_grad():
            clean, moved = perturbed(model, subject, None), perturbed(model, subject, delta.float())
            truth = symmetric_kl(perturbed(exact_model, subject, delta), perturbed(exact_model, subject, None)).item()
        rows.append(
            {
                "epsilon": epsilon,
                "float64": truth,
                "float64 of the float32 outputs": symmetric_kl(moved.double(), clean.double()).item(),
                "smartreg": symmetric_kl(moved, clean).item(),
                "smart-pytorch": sym_kl_loss(moved, clean).item() / len(clean),
            }
        )
    return rows


def _found(subject: Subject, model: nn.Module, epsilon: float) -> Tensor:
    """The perturbation that `SmartLoss` finds at an absolute ε, η = 1e-3 as published, one norm for each token."""
    smart = SmartLoss(
        model,
        epsilon=epsilon,
        step_size=1e-3,
        noise_std=epsilon,
        epsilon_scale="absolute",
        norm_over="token",
        **ALGORITHM_1,
    )
    recorder = Recorder(subject, model)
    smart(recorder, mask=subject.mask, noise=epsilon * noise(subject))
    smart.remove()
    model.get_input_embeddings()._forward_hooks.clear()
    return recorder.last()


def directions(subject: Subject) -> list[Row]:
    """Fact 2: cosine of the first ascent direction with the exact one, at absolute sizes of the starting noise."""
    rows = []
    exact_model = subject.in_precision(FLOAT64)
    models = {precision: subject.in_precision(precision) for precision in SWEEP}
    for size in ABSOLUTE:
        delta = size * noise(subject)
        truth = ascent_gradient(exact_model, subject, delta.double(), FLOAT64)
        found = {p.name: cosine(ascent_gradient(m, subject, delta, p), truth) for p, m in models.items()}
        rows.append({"noise": size, "relative": size / subject.root_mean_square(), **found})
    return rows


def dropout_mismatch(subject: Subject) -> Row:
    """Fact 3: the divergence of two passes with no perturbation at all, in train mode."""
    model = subject.in_precision(FLOAT32).train()
    at_paper = _found(subject, subject.in_precision(FLOAT64), 1e-5)
    exact = subject.in_precision(FLOAT64)
    with torch.no_grad():
        tiny = symmetric_kl(perturbed(exact, subject, at_paper), perturbed(exact, subject, None)).item()
    torch.manual_seed(2)
    shared = SmartLoss(model, epsilon=0.0, dropout="shared")(subject.forward).penalty.item()
    values = [sym_kl_loss(subject.forward(model), subject.forward(model)).item() for _ in range(4)]
    apart = sum(values) / len(values) / len(subject.mask)
    return {"smartreg": shared, "smart-pytorch": apart, "penalty_at_paper": tiny, "ratio": apart / tiny}


def effective_perturbation(subject: Subject) -> list[Row]:
    """Fact 4: the largest entry of the perturbation of each token, at the published settings and at smartreg's."""
    embeddings, mask = subject.embeddings(), subject.mask.bool()
    seen: list[Tensor] = []

    def run(embeds: Tensor) -> Tensor:
        seen.append(embeds.detach())
        return subject.model(inputs_embeds=embeds, attention_mask=subject.mask).logits

    rows = []
    for epsilon in (1e-6, 1e-5, 1e-2):
        torch.manual_seed(3)
        peer = SMARTLoss(run, sym_kl_loss, epsilon=epsilon)
        peer(embeddings, run(embeddings))
        theirs = (seen[-1] - embeddings)[mask].abs().amax(-1).mean().item()
        ours = _found(subject, subject.in_precision(FLOAT64), epsilon)[mask].abs().amax(-1).mean().item()
        rows.append({"epsilon": epsilon, "smartreg": ours, "smart-pytorch": theirs})
    size = embeddings[mask].abs().mean().item()
    return [{**row, "mean_absolute_embedding": size} for row in rows]


def single_logit() -> list[Row]:
    """Fact 5: single logits z and −z, whose divergence is 2 z (σ(z) − σ(−z)); a softmax over one logit is constant."""
    rows = []
    for z in (0.5, 1.0, 2.0, 3.0, 4.0):
        a, b = torch.full((4, 1), z), torch.full((4, 1), -z)
        exact = 2 * z * (1 / (1 + math.exp(-z)) - 1 / (1 + math.exp(z)))
        row = {"logits": f"{z:g}, {-z:g}", "exact": exact, "smartreg": binary_symmetric_kl(a, b).item()}
        rows.append({**row, "smart-pytorch": sym_kl_loss(a, b).item() / len(a), "symmetric_kl": _refusal(a, b)})
    return rows


def _refusal(a: Tensor, b: Tensor) -> str:
    """What `symmetric_kl` says to logits of one class."""
    try:
        return f"returned {symmetric_kl(a, b).item()}"
    except ValueError:
        return "ValueError"


def sweep(subject: Subject, progress: Callable[[str], None]) -> list[Row]:
    """The penalty of `SmartLoss` against ε (= η = σ, in units of the RMS) in every precision, and its direction."""
    start = noise(subject)
    rms = subject.embeddings().mul(subject.mask.unsqueeze(-1)).square().sum((1, 2), keepdim=True)
    unit = start * (rms / (subject.mask.sum(1)[:, None, None] * subject.embeddings().shape[-1])).sqrt()
    rows = [
        {"epsilon": e, "penalty": _penalty(subject, FLOAT64, e, unit.double()), "precision": "float64", "cosine": 1.0}
        for e in RELATIVE
    ]
    exact_model = subject.in_precision(FLOAT64)
    truths = {e: ascent_gradient(exact_model, subject, e * unit.double(), FLOAT64) for e in RELATIVE}
    for precision in SWEEP:
        progress(f"penalty against epsilon in {precision.name}")
        model = subject.in_precision(precision)
        for epsilon in RELATIVE:
            gradient = ascent_gradient(model, subject, epsilon * unit, precision)
            row = {"epsilon": epsilon, "precision": precision.name, "cosine": cosine(gradient, truths[epsilon])}
            row["penalty"] = _penalty(subject, precision, epsilon, unit)
            if precision is BF16_AUTOCAST:
                row["penalty_ascent_float32"] = _penalty(subject, precision, epsilon, unit, ascent_autocast=False)
            rows.append(row)
    return rows


def _penalty(subject: Subject, precision: Precision, epsilon: float, unit: Tensor, **options: Any) -> float:
    options |= {"epsilon": epsilon, "step_size": epsilon, "noise_std": epsilon, **ALGORITHM_1}
    smart = SmartLoss(subject.in_precision(precision), **options)
    with precision.active(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SmartWarning)  # what it warns of is what is measured here
        with torch.no_grad():
            return smart(subject.forward, mask=subject.mask, noise=epsilon * unit).penalty.item()


def warned_sizes(subject: Subject, progress: Callable[[str], None]) -> list[Row]:
    """The smallest useful ε that the warning names, beside where the cosine with float64 crosses 0.9.

    Both are geometric means over several directions of the noise.
    """
    rows = []
    for factor in (1.0, 10.0):
        scaled = subject if factor == 1.0 else rescaled(subject, factor)
        for precision in (BF16_AUTOCAST, FP16_AUTOCAST, BF16_WEIGHTS):
            progress(f"smallest useful epsilon, embeddings x {factor:g}, {precision.name}")
            rows.append(
                {
                    "embeddings": factor,
                    "precision": precision.name,
                    "warned": statistics.geometric_mean(_warned(scaled, precision, seed) for seed in DRAWS),
                    "measured": statistics.geometric_mean(_crossing(scaled, precision, seed) for seed in DRAWS),
                }
            )
    return rows


def _warned(subject: Subject, precision: Precision, seed: int) -> float:
    """The absolute ε in the text of the warning."""
    smart = SmartLoss.paper(subject.in_precision(precision))
    torch.manual_seed(seed)
    with precision.active(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        smart(subject.forward, mask=subject.mask)
    text = next(str(w.message) for w in caught if issubclass(w.category, SmartWarning))
    return float(text.split("dtype is ")[1].split("epsilon=")[1].split(" ")[0].rstrip(","))


def _crossing(subject: Subject, precision: Precision, seed: int, wanted: float = 0.9) -> float:
    """The absolute size of the noise at which the cosine reaches 0.9, by bisection of its logarithm."""
    model = subject.in_precision(precision)
    exact_model = model.double() if precision.weights is not torch.float32 else subject.in_precision(FLOAT64)
    model = subject.in_precision(precision)
    unit = noise(subject, seed) * subject.root_mean_square()
    low, high = 1e-4, 1.0
    for _ in range(7):
        middle = math.sqrt(low * high)
        truth = ascent_gradient(exact_model, subject, middle * unit.double(), FLOAT64)
        found = cosine(ascent_gradient(model, subject, middle * unit, precision), truth)
        low, high = (low, middle) if found >= wanted else (middle, high)
    return math.sqrt(low * high) * subject.root_mean_square()


def paper_in_float32(subject: Subject) -> Row:
    """`SmartLoss.paper` in float32: whether it warns, and the cosine of its direction with float64."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SmartLoss.paper(subject.in_precision(FLOAT32))(subject.forward, mask=subject.mask)
    delta = 1e-5 * noise(subject)
    truth = ascent_gradient(subject.in_precision(FLOAT64), subject, delta.double(), FLOAT64)
    found = ascent_gradient(subject.in_precision(FLOAT32), subject, delta, FLOAT32)
    return {"warnings": len(caught), "cosine": cosine(found, truth)}
