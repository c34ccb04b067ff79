"""The four tasks: which files they read, what they predict, their loss, and how predictions are measured."""

import re
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr
from torch import Tensor

from . import InputError


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
        value = float(text) if NUMBER.fullmatch(text) else float("nan")
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
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
"""What is a number in a data file. Python reads more as one, `1_0` for instance, and `3.` is a number cut off."""
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


Metrics = dict[str, float | int | None]


def score(task: Task, outputs: Tensor, labels: Tensor) -> Metrics:
    """Metrics of a head's outputs, as predictions would be submitted: scores are brought into their range first.

    Args:
        task: which task.
        outputs: (n, classes) or (n,).
        labels: (n,).

    Returns:
        {"accuracy", "nll", "n"}, or {"pearson", "mse", "n"} for scores.
    """
    outputs, labels = outputs.double().cpu(), labels.double().cpu()
    predicted = predict(task, outputs)
    if task.kind == "score":
        error = (predicted - labels).square().mean()
        return {"pearson": pearson(predicted, labels), "mse": _number(error), "n": len(labels)}
    right = (predicted == labels).double().mean()
    return {
        "accuracy": _number(right),
        "nll": _number(-log_likelihood(task, outputs, labels).mean()),
        "n": len(labels),
    }


def pearson(predictions: Tensor, labels: Tensor) -> float | None:
    """The correlation of two vectors; 0 by convention for a constant prediction, None where labels do not vary."""
    if len(labels) < 2 or bool((labels == labels[0]).all()):
        return None
    if bool((predictions == predictions[0]).all()):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        warnings.simplefilter("ignore", NearConstantInputWarning)
        return _number(torch.tensor(pearsonr(predictions.numpy(), labels.numpy()).statistic))


def baseline(task: Task, train_labels: Tensor, labels: Tensor) -> Metrics:
    """The metrics of an answer that ignores the text: the most frequent class, or the mean score, of the training set.

    Its likelihood is that of the training set's class frequencies. A constant has no correlation; it counts as 0.
    """
    if task.kind == "score":
        return score(task, train_labels.double().mean().expand(len(labels)), labels)
    if task.kind == "binary":
        share = train_labels.double().mean().clamp(1e-6, 1 - 1e-6)
        return score(task, torch.logit(share).expand(len(labels)), labels)
    counts = torch.bincount(train_labels.long(), minlength=task.outputs).double().clamp(min=1e-6)
    return score(task, (counts / counts.sum()).log().expand(len(labels), -1), labels)


def gap(task: Task, train: Metrics, dev: Metrics) -> float | None:
    """How much better the training set is known than the dev set, in the main metric."""
    on_train, on_dev = train[task.metric], dev[task.metric]
    return None if on_train is None or on_dev is None else on_train - on_dev


def _number(value: Tensor) -> float | None:
    """A float, or None for what JSON has no number for."""
    number = float(value)
    return number if number == number and abs(number) != float("inf") else None
