r"""Whether the dtype in use can carry the perturbation: measured on the model, once for each dtype.

Rounding gives the output of every pass an error, however small the perturbation, and so the ascent gradients an error
of a size that does not depend on the radius, while the gradients themselves grow with it. Let \(g_\pm\) be the
gradients at \(\pm r\nu\). The exact ones are opposite to first order; the rounding of the clean output enters both
alike, that of the two perturbed passes independently. With signal power s² and rounding power n² of each of the three,

\[ c = \cos(g_+, -g_-) = \frac{s^2 - n^2}{s^2 + 2n^2}, \qquad
   \cos(g_+, g_{\mathrm{exact}}) = \sqrt{\frac{s^2}{s^2 + 2n^2}} = \sqrt{\frac{q}{q + 2}}, \quad
   q = \frac{s^2}{n^2} = \frac{1 + 2c}{1 - c}, \]

and since q grows like r², one radius where q is neither tiny nor huge tells the radius of any cosine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smartreg._ascent.ball import Ball, entries, root_mean_square
from smartreg._ascent.objective import Objective
from smartreg._ascent.settings import SmartSettings
from smartreg._warnings import warn

REQUIRED_COSINE = 0.9
"""What the ascent direction must keep with the exact one."""

_SAFE = 256.0  # in units of the resolution: no model of reasonable depth rounds that much away
_LADDER = (2.0, 4.0, 8.0, 16.0, 32.0)  # likewise: where q is measured
_INFORMATIVE = 0.5  # agreement from which q is more than chance; the next rung down has a quarter of this q


class PrecisionCheck:
    """Looks once at every combination of device, dtypes and settings, and warns where it drowns the perturbation.

    Nothing is run where the sizes that the user asked for are far above the resolution of the dtype (in float32 with
    ordinary settings). Else ten more passes are differentiated, in the first call only; their number does not depend on
    the data, so that ranks of a distributed model stay together.
    """

    def __init__(self) -> None:
        self._looked: set[tuple[torch.device, torch.dtype, torch.dtype | None, SmartSettings]] = set()

    def look(
        self, objective: Objective, balls: Sequence[Ball], start: Sequence[Tensor], autocast: torch.dtype | None
    ) -> bool:
        """Warn if the perturbed passes, or the ascent, cannot carry what `balls` and `start` ask for.

        Args:
            objective: Of the pass that makes the penalty, under the dropout masks of the clean pass.
            balls: The ball of each look-up.
            start: The first δ of each look-up.
            autocast: What autocast makes of float32, None where it is off.

        Returns:
            Whether it warned.
        """
        settings, embeddings = balls[0].settings, balls[0].embeddings
        key = (embeddings.device, embeddings.dtype, autocast, settings)  # of a function each call may have its own
        if key in self._looked or torch.is_inference_mode_enabled():
            return False
        self._looked.add(key)
        fine = resolution(embeddings.device, [embeddings.dtype])
        coarse = resolution(embeddings.device, objective.dtypes)
        ascent = coarse if settings.ascent_autocast else fine
        asked = {}
        if settings.start == "noise":
            asked["noise_std"] = (_noise_size(balls, start), ascent if settings.steps else coarse)
        if settings.ascent != "normalized":
            asked["epsilon"] = (_epsilon_size(balls), coarse)
        doubtful = {name: size for name, (size, limit) in asked.items() if 0 < size < _SAFE * limit}
        if not doubtful:
            return False
        # A start along a gradient moves the output so much that curvature would pass for rounding: noise of our own.
        noise = start if settings.start == "noise" else [_own_noise(ball) for ball in balls]
        directions = [direction_of(ball, nu) for ball, nu in zip(balls, noise, strict=True)]
        if not any(bool(direction.any()) for direction in directions):
            return False
        needed = smallest_useful(objective, balls, directions)
        drowned = {name: size for name, size in doubtful.items() if needed is not None and size < needed}
        if drowned and needed is not None:
            warn(_message(drowned, needed, balls, autocast))
        return bool(drowned)


def resolution(device: torch.device, dtypes: Sequence[torch.dtype | None]) -> float:
    """The coarsest machine epsilon of these dtypes; TensorFloat-32 has the significand of float16.

    Examples:
        >>> import torch
        >>> resolution(torch.device("cpu"), [torch.bfloat16, torch.float32])
        0.0078125
    """
    floating = [dtype for dtype in dtypes if dtype is not None]
    if device.type == "cuda" and torch.float32 in floating and _tensor_float_32():
        floating.append(torch.float16)
    return max(torch.finfo(dtype).eps for dtype in floating)


def direction_of(ball: Ball, noise: Tensor) -> Tensor:
    """ν scaled to the root mean square of each example's embeddings; zero where either is."""
    wide = ball.embeddings.to(noise.dtype)
    size = root_mean_square(noise, ball.mask, ball.example)
    wanted = root_mean_square(wide, ball.mask, ball.example)
    return torch.where(size > 0, noise * (wanted / torch.where(size > 0, size, 1.0)), 0.0)


def _own_noise(ball: Ball) -> Tensor:
    """Standard normal entries, always the same, that leave every generator of the user's alone."""
    drawn = torch.Generator("cpu").manual_seed(0)  # said, since the user may have set another default device
    values = torch.randn(ball.embeddings.shape, generator=drawn, device="cpu")
    return ball.hide_padding(values.to(ball.embeddings.device, ball.entry_scale.dtype))


def agreement(objective: Objective, balls: Sequence[Ball], perturbations: Sequence[Tensor]) -> float | None:
    """c = cos(g₊, −g₋) over the whole batch, less any example whose gradients are not finite.

    Returns:
        c; −1 where both gradients are zero (nothing of the perturbation is left); None if no example can be judged, or
        the output does not depend on the perturbation.
    """
    sides = []
    for sign in (1.0, -1.0):
        _, gradients = objective.gradient([sign * delta for delta in perturbations])
        if gradients is None:
            return None
        sides.append([ball.hide_padding(g).flatten(1) for ball, g in zip(balls, gradients, strict=True)])
    plus, minus, both = 0.0, 0.0, 0.0
    judged = False
    for up, down in zip(*sides, strict=True):  # (batch, entries)
        finite = (torch.isfinite(up) & torch.isfinite(down)).all(dim=1)
        judged = judged or bool(finite.any())
        # In float64: squares of gradients of 1e-12 leave the range of float32 soon. MPS has none, so on the CPU.
        first, second = up[finite].cpu().double(), down[finite].cpu().double()
        plus, minus = plus + float(first.square().sum()), minus + float(second.square().sum())
        both += float((first * second).sum())
    if not judged:
        return None
    return -both / math.sqrt(plus * minus) if plus > 0 and minus > 0 else -1.0


def cosine_from(agreement: float) -> float:
    """The cosine of the ascent direction with the exact one that an agreement c stands for.

    Examples:
        >>> round(cosine_from(0.715), 3), cosine_from(-1.0), cosine_from(1.0)
        (0.9, 0.0, 1.0)
    """
    signal = _signal_to_rounding(agreement)
    return 1.0 if math.isinf(signal) else math.sqrt(signal / (signal + 2.0))


def smallest_useful(objective: Objective, balls: Sequence[Ball], directions: Sequence[Tensor]) -> float | None:
    """The size of a perturbation, in root mean squares of the embeddings, at which the cosine is `REQUIRED_COSINE`.

    Returns:
        The size, the geometric mean of what the two smallest rungs of the ladder tell whose agreement is more than
        chance (larger ones are curved); infinity if there is none; None if nothing could be judged.
    """
    unit = resolution(balls[0].embeddings.device, objective.dtypes)
    wanted = 2.0 * REQUIRED_COSINE**2 / (1.0 - REQUIRED_COSINE**2)
    judged, told = False, []
    for factor in _LADDER:  # all of it, whatever comes out: the number of passes must not depend on the data
        size = factor * unit
        c = agreement(objective, balls, [size * direction for direction in directions])
        judged = judged or c is not None
        if c is not None and c >= _INFORMATIVE:
            told.append(size * math.sqrt(wanted / _signal_to_rounding(c)))
    if not judged:
        return None
    return math.prod(told[:2]) ** (1.0 / len(told[:2])) if told else math.inf


def _signal_to_rounding(agreement: float) -> float:
    if agreement >= 1.0:
        return math.inf
    return max(0.0, (1.0 + 2.0 * agreement) / (1.0 - agreement))


def _noise_size(balls: Sequence[Ball], start: Sequence[Tensor]) -> float:
    """Root mean square of ν over that of the embeddings."""
    noise = [root_mean_square(nu, ball.mask, ball.example) for ball, nu in zip(balls, start, strict=True)]
    return _mean(noise) / max(_embedding_size(balls), torch.finfo(torch.float32).tiny)


def _epsilon_size(balls: Sequence[Ball]) -> float:
    """The entries of a perturbation on the sphere, over the root mean square of the embeddings."""
    settings = balls[0].settings
    return settings.epsilon / max(_unit(balls, "epsilon"), torch.finfo(torch.float32).tiny)


def _unit(balls: Sequence[Ball], name: str) -> float:
    """What the user's number is for a perturbation as large as the embeddings."""
    settings = balls[0].settings
    if settings.epsilon_scale == "rms":
        return 1.0
    size = _embedding_size(balls)
    if name == "noise_std" or settings.norm == "inf":
        return size
    return size * math.sqrt(_mean([entries(b.embeddings.float(), b.mask, b.under_norm) for b in balls]))


def _embedding_size(balls: Sequence[Ball]) -> float:
    return _mean([root_mean_square(b.embeddings.to(b.entry_scale.dtype), b.mask, b.example) for b in balls])


def _mean(values: Sequence[Tensor]) -> float:
    """Over all examples that have any entry."""
    flat = torch.cat([value.flatten().cpu().double() for value in values])
    flat = flat[flat > 0]
    return float(flat.mean()) if len(flat) else 0.0


def _message(drowned: dict[str, float], needed: float, balls: Sequence[Ball], autocast: torch.dtype | None) -> str:
    settings = balls[0].settings
    dtype = balls[0].embeddings.dtype if autocast is None else autocast
    where = str(dtype).removeprefix("torch.") + (" autocast" if autocast is not None else "")
    kind = "times the root mean square of the embeddings" if settings.epsilon_scale == "rms" else "absolute"
    asked = " and ".join(f"{name}={size * _unit(balls, name):.3g}" for name, size in drowned.items())
    if math.isinf(needed):
        least = "and no larger value up to a quarter of the embeddings themselves was found that is not"
    else:
        values = ", ".join(f"{name}={needed * _unit(balls, name):.2g}" for name in drowned)
        least = f"the smallest useful value for this model and dtype is {values} ({kind})"
    remedy = "use larger values, or float32"
    if autocast is not None:
        remedy = "use larger values, or switch autocast off for this call"
        if settings.steps and settings.ascent_autocast:
            remedy += (
                "; ascent_autocast=False makes the direction of the ascent exact, while the penalty itself stays "
                "rounded"
            )
    return (
        f"{asked}: too small for {where}, which rounds the perturbation away (the cosine of the gradient at a "
        f"perturbation of this size with the exact one is below {REQUIRED_COSINE}); {least}, measured on this batch. "
        f"Remedy: {remedy}"
    )


def _tensor_float_32() -> bool:
    """Whether float32 matrix products on CUDA may be rounded to TensorFloat-32, by any of the ways to ask for it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        general = getattr(torch.backends, "fp32_precision", "none")
        return "tf32" in (matmul.fp32_precision, general if matmul.fp32_precision == "none" else "")
    return bool(matmul.allow_tf32)
