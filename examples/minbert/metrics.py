"""What is measured: accuracy and negative log-likelihood, Pearson correlation for scores, and two baselines."""

import warnings

import torch
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr
from torch import Tensor

from .tasks import Task, log_likelihood, predict

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
