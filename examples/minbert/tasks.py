"""The four tasks: which files they read, what they predict, and how a prediction is scored against a label."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Task:
    """A data set of the CS224N project and the kind of answer it wants.

    Attributes:
        name: its name on the command line and in the metrics.
        stem: its files are `<stem>-train.csv`, `<stem>-dev.csv`, `<stem>-test.csv` or `<stem>-test-student.csv`.
        columns: the text columns: one sentence, or two to compare.
        label: the label column.
        kind: "classes" (one logit a class), "binary" (a single logit), or "score" (a number).
        outputs: logits of the head.
        high: the largest label; labels start at 0.
        divergence: the divergence of the regularizers. A softmax over one logit is constant, so the single logit of
            the paraphrase head needs the Bernoulli form.
        prediction: the second column of a submission file.
    """

    name: str
    stem: str
    columns: tuple[str, ...]
    label: str
    kind: Literal["classes", "binary", "score"]
    outputs: int
    high: float
    divergence: str
    prediction: str

    @property
    def metric(self) -> str:
        """The name of its main metric."""
        return "pearson" if self.kind == "score" else "accuracy"

    def parse_label(self, text: str) -> float:
        """The label of a row.

        Raises:
            ValueError: the text is not a number of this task's range; the message says which labels are.
        """
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        whole = self.kind == "score" or value == int(value) if value == value and abs(value) < 1e9 else False
        if not (whole and 0 <= value <= self.high):
            kind = "a number" if self.kind == "score" else "a whole number"
            raise ValueError(f"{self.label}: expected {kind} from 0 to {self.high:g}, got {text!r}")
        return value


TASKS = {
    task.name: task
    for task in (
        Task("sst", "ids-sst", ("sentence",), "sentiment", "classes", 5, 4, "symmetric_kl", "Predicted_Sentiment"),
        Task(
            "para",
            "quora",
            ("sentence1", "sentence2"),
            "is_duplicate",
            "binary",
            1,
            1,
            "binary_symmetric_kl",
            "Predicted_Is_Duplicate",
        ),
        Task("sts", "sts", ("sentence1", "sentence2"), "similarity", "score", 1, 5, "mse", "Predicted_Similarity"),
        Task(
            "cfimdb", "ids-cfimdb", ("sentence",), "sentiment", "classes", 2, 1, "symmetric_kl", "Predicted_Sentiment"
        ),
    )
}
SENTIMENT = ("sst", "cfimdb")


def parse_tasks(text: str) -> tuple[str, ...]:
    """Task names out of a comma-separated list, in the order of `TASKS`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise InputError(f"--tasks: expected any of {','.join(TASKS)}, got {text!r}")
    return tuple(name for name in TASKS if name in names)


def task_loss(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """The training loss of a batch: mean cross-entropy, or mean squared error of scores.

    Args:
        task: which task.
        outputs: the head's output, (batch, classes), or (batch,) for a single logit or a score.
        labels: (batch,), floats.

    Returns:
        A scalar.
    """
    if task.kind == "classes":
        return F.cross_entropy(outputs, labels.long())
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype))
    return F.mse_loss(outputs, labels.to(outputs.dtype))


def predict(task: Task, outputs: Tensor) -> Tensor:
    """What the head's outputs say in the units of the label: a class, 0 or 1, or a score within its range."""
    if task.kind == "classes":
        return outputs.argmax(-1)
    if task.kind == "binary":
        return (outputs > 0).long()
    return outputs.clamp(0, task.high)


def log_likelihood(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """log p(label) of each example in float64, (batch,), for tasks that predict a distribution."""
    outputs, labels = outputs.double(), labels.double()
    if task.kind == "binary":
        return F.logsigmoid(torch.where(labels > 0.5, outputs, -outputs))
    return F.log_softmax(outputs, -1).gather(-1, labels.long()[:, None])[:, 0]
