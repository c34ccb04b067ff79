"""One update of a moving average of all parameters of a model: ours, and those of other packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import variants

WARM_UP = variants.WARM_UP
FLAT = "torch.lerp, one flat tensor"
OURS = "smartreg.MomentumBregman"
OTHERS = ("torch-ema", "ema-pytorch", "AveragedModel, avg_fn", "AveragedModel, get_ema_multi_avg_fn")
BETA = 0.99
REPEATS = 10  # a single update is over before the clock is worth reading


def build(spec: Mapping[str, Any]) -> Callable[[], None]:
    """A call that makes the average of `spec["variant"]` when it is first called, and updates it `REPEATS` times.

    What the first call adds to memory is therefore what the average costs.
    """
    model, _ = variants.load(spec)
    updates: list[Callable[[], object]] = []

    def step() -> None:
        if not updates:
            updates.append(_update(spec["variant"], model))
        with torch.no_grad():
            for _ in range(REPEATS):
                updates[0]()

    return step


def _update(name: str, model: nn.Module) -> Callable[[], object]:
    if name == FLAT:
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        average = flat.clone()
        return lambda: average.lerp_(flat, 1 - BETA)
    if name == OURS:
        from smartreg import MomentumBregman

        return MomentumBregman(model, beta=BETA).update
    if name == "torch-ema":
        from torch_ema import ExponentialMovingAverage

        return ExponentialMovingAverage(model.parameters(), BETA, use_num_updates=False).update
    if name == "ema-pytorch":
        from ema_pytorch import EMA

        return EMA(model, beta=BETA, update_after_step=0, update_every=1).update
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    if name == "AveragedModel, avg_fn":
        averaged = AveragedModel(model, avg_fn=lambda old, new, _: BETA * old + (1 - BETA) * new)
    else:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(BETA))
    return lambda: averaged.update_parameters(model)
