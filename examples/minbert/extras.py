"""Where something may be added to a run that no setting knows. Every default adds nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .model import MultitaskModel
from .objective import Losses
from .tasks import Task, task_loss

if TYPE_CHECKING:
    from .train import Trainer


def once(backward: Callable[[], Losses]) -> Losses:
    """Gradients of one backward pass."""
    return backward()


def trained(trainer: Trainer) -> MultitaskModel:
    """The model in training itself."""
    return trainer.model


def nothing(trainer: Trainer) -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Extras:
    """What a `Trainer` does in place of the usual.

    Attributes:
        loss: the task loss of a batch, of (task, outputs, labels).
        gradients: leaves the gradients of a step in `.grad`, given a function that runs forward and backward once.
        evaluated: the model that is measured at the end of an epoch.
        epoch_ended: is called after every epoch.
    """

    loss: Callable[[Task, Tensor, Tensor], Tensor] = task_loss
    gradients: Callable[[Callable[[], Losses]], Losses] = once
    evaluated: Callable[[Trainer], MultitaskModel] = trained
    epoch_ended: Callable[[Trainer], None] = nothing
