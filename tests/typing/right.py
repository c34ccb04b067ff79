"""A user's script that both type checkers accept in strict mode. Never run: `.ci/check_types.py` has it checked."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from smartreg import (
    MomentumBregman,
    SlantedTriangularLR,
    SmartLoss,
    SmartOutput,
    paper_beta,
    smoothness_penalty,
    token_mask,
)


def train(model: nn.Module, ids: Tensor, labels: Tensor) -> None:
    smart = SmartLoss(model, embedding="embedding", divergence="mse", epsilon=0.1, norm="inf", start="noise", steps=1)
    bregman = MomentumBregman(model, beta=paper_beta(100))
    outputs, penalty = smart(lambda m: m(ids), mask=ids != 0, divergence=half_squared, output_mask=token_mask(labels))
    assert_type(outputs, Any)
    assert_type(penalty, Tensor)
    proximal = bregman(lambda m: m(ids), outputs, divergence="binary_symmetric_kl")
    assert_type(proximal, Tensor)
    loss = nn.functional.cross_entropy(outputs, labels) + 0.03 * penalty + 1.0 * proximal
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SlantedTriangularLR(optimizer, total_steps=100)
    torch.autograd.backward(loss)
    schedule.step()
    bregman.update()
    assert_type(SmartLoss.paper(model), SmartLoss)
    assert_type(smoothness_penalty(lambda x: x.sum(1), torch.zeros(2, 3, 4)), SmartOutput)
    assert_type(bregman.teacher, nn.Module)
    if smart.stats is not None:
        assert_type(smart.stats.ascent_gain, float)


def half_squared(perturbed: Tensor, clean: Tensor) -> Tensor:
    return 0.5 * (perturbed - clean).square().mean()
