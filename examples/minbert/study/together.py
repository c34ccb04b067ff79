"""Two runs on the same rows whose predictions are averaged: what the cost of SMART buys without it."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import MultitaskModel
from ..tasks import TASKS, Task
from ..train import Trainer

OTHER_SEED = 500
"""A partner's seed is the run's and so much more, which no seed of a stage is."""


class Partner:
    """A run that is made before another, from another start and in another order, and then answers beside it.

    Args:
        trainer: of the run, not begun. It is made here, and its weights at the end of each epoch are kept.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.model = trainer.model
        self.weights: dict[int, dict[str, Tensor]] = {}
        trainer.extras = replace(trainer.extras, epoch_ended=self._keep)
        started = time.process_time()
        trainer.run()
        self.seconds = time.process_time() - started

    def _keep(self, trainer: Trainer) -> None:
        self.weights[trainer.step] = {key: value.detach().clone() for key, value in self.model.state_dict().items()}

    def beside(self, trainer: Trainer) -> "Together":
        """The two models, the partner's as it was when it had made as many steps."""
        self.model.load_state_dict(self.weights[trainer.step])
        return Together(trainer.model, self.model)


class Together(MultitaskModel):
    """Models that answer with the mean of their predictions.

    Args:
        first: one of them.
        second: another, with the same heads.
    """

    def __init__(self, first: MultitaskModel, second: MultitaskModel) -> None:
        super().__init__(first.encoder, ())
        self.members = nn.ModuleList([first, second])

    def get_input_embeddings(self) -> nn.Embedding:
        """Each member has its own.

        Raises:
            TypeError: always.
        """
        raise TypeError("get_input_embeddings: expected one model, got two that answer together, each with its own")

    def forward(self, task: str, sentences: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The outputs that say what the members' say on average, in the shape of theirs."""
        return mean_prediction(TASKS[task], torch.stack([model(task, sentences, masks) for model in self.members]))


def mean_prediction(task: Task, outputs: Tensor) -> Tensor:
    """Outputs of the mean of some predictions: of probabilities, in logits again, or of scores.

    Args:
        task: which task.
        outputs: (models, batch, classes) or (models, batch).

    Returns:
        (batch, classes) or (batch,).

    Example:
        >>> mean_prediction(TASKS["para"], torch.tensor([[0.0], [2.0]])).sigmoid()  # of 0.5000 and 0.8808
        tensor([0.6904])
    """
    if task.kind == "score":
        return outputs.mean(0)
    if task.kind == "binary":
        return F.logsigmoid(outputs).logsumexp(0) - F.logsigmoid(-outputs).logsumexp(0)
    return outputs.log_softmax(-1).logsumexp(0)
