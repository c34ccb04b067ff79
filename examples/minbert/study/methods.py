"""The methods that SMART is compared with and that no setting of the example has: each a few lines of `Extras`.

A method is a function of the model and one number, its strength.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extras import Extras
from ..model import MultitaskModel
from ..objective import Losses
from ..tasks import Task, task_loss
from ..train import Trainer


def label_smoothing(model: MultitaskModel, share: float) -> Extras:
    """Cross-entropy against labels of which a share is spread over all classes; scores have none, and stay."""

    def loss(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
        if task.kind == "classes":
            return F.cross_entropy(outputs, labels.long(), label_smoothing=share)
        return task_loss(task, outputs, labels * (1 - share) + share / 2 if task.kind == "binary" else labels)

    return Extras(loss=loss)


def entropy(model: MultitaskModel, strength: float) -> Extras:
    """The confidence penalty: the loss minus `strength` times the entropy of the prediction; scores have none.

    Reference:
        Pereyra et al. 2017, arXiv 1701.06548.
    """

    def loss(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
        usual = task_loss(task, outputs, labels)
        if task.kind == "score":
            return usual
        logits = torch.stack([torch.zeros_like(outputs), outputs], -1) if task.kind == "binary" else outputs
        logs = F.log_softmax(logits, -1)
        return usual + strength * (logs.exp() * logs).sum(-1).mean()

    return Extras(loss=loss)


def l2_sp(model: MultitaskModel, strength: float) -> Extras:
    """Half `strength` times the squared distance of the encoder from the weights that it starts from.

    Reference:
        Li et al. 2018, arXiv 1802.01483. The heads, which start from nothing, keep their weight decay.
    """
    pairs = [(p, p.detach().clone()) for p in model.encoder.parameters()]

    def loss(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
        distance = torch.stack([(p - start).square().sum() for p, start in pairs]).sum()
        return task_loss(task, outputs, labels) + strength / 2 * distance

    return Extras(loss=loss)


def neftune(model: MultitaskModel, alpha: float) -> Extras:
    """Uniform noise on the word embeddings in training, in [−1, 1] times α / √(length · dim).

    Reference:
        Jain et al. 2024, NEFTune, arXiv 2310.05914.
    """
    model.get_input_embeddings().register_forward_hook(partial(_with_noise, alpha=alpha))
    return Extras()


def _with_noise(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, *, alpha: float) -> Tensor:
    if not module.training:
        return output
    size = alpha / math.sqrt(output.shape[1] * output.shape[2])
    return output + torch.empty_like(output).uniform_(-size, size)


def sam(model: MultitaskModel, rho: float) -> Extras:
    """The gradient at the weights a step of length ρ uphill: two passes a step.

    Reference:
        Foret et al. 2021, SAM, arXiv 2010.01412, as in the package pytorch-optimizer.
    """
    from pytorch_optimizer.optimizer.sam import SAM  # only this arm needs the package

    # Its base optimizer, at rate 0, puts the weights back and no more; the step is left to the run's own AdamW.
    climber = SAM([p for p in model.parameters() if p.requires_grad], torch.optim.SGD, rho=rho, lr=0.0)

    def gradients(backward: Callable[[], Losses]) -> Losses:
        backward()
        climber.first_step(zero_grad=True)
        losses = backward()
        climber.second_step()
        return losses

    return Extras(gradients=gradients)


def averaged(model: MultitaskModel) -> Extras:
    """Measures the average of the weights, which the teacher of the Bregman term holds, in place of the weights."""

    def teacher(trainer: Trainer) -> MultitaskModel:
        if trainer.objective.bregman is None:
            raise ValueError("averaged: expected a configuration with a teacher, such as t-bregman")
        return trainer.objective.bregman.teacher  # type: ignore[return-value]  # a copy of the model, of its class

    return Extras(evaluated=teacher)


METHODS: dict[str, Callable[[MultitaskModel, float], Extras]] = {
    "label_smoothing": label_smoothing,
    "entropy": entropy,
    "l2_sp": l2_sp,
    "neftune": neftune,
    "sam": sam,
}
"""By the name of their strength in an arm's choices."""
