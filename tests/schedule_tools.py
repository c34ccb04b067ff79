"""Optimizers for the tests of the schedule, and the rates that their steps ran at."""

from typing import Any

import torch
from torch import nn

from smartreg.schedule import SlantedTriangularLR


def optimizer_of(*rates: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates], lr=1.0, **options)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def take(optimizer: torch.optim.Optimizer, scheduler: SlantedTriangularLR, steps: int) -> list[list[float]]:
    """The rates that `steps` optimizer steps ran at."""
    rates = []
    for _ in range(steps):
        rates.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    return rates
