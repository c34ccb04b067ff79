"""What is measured on a model's outputs: a number for each row, whose mean is the metric, and calibration.

Correctness and log-likelihood are means over rows as they stand. A correlation is made one by its influence: row i
contributes r + z_i w_i − r (z_i² + w_i²) / 2, where z and w are prediction and label in standard units; the mean is r,
and to first order the spread is the one that resampled rows give r. So all intervals are those of means, and no label
need be kept with a result.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from ..tasks import Task, log_likelihood, predict

Array = NDArray[np.float64]
BINS = 15


def finite(outputs: Tensor) -> Tensor:
    """Outputs, of which those that are no numbers count as 0: a model that has come apart says nothing."""
    return outputs.nan_to_num(0.0, 0.0, 0.0)


def contributions(task: Task, outputs: Tensor, labels: Tensor) -> dict[str, Array]:
    """The main metric and the negative log-likelihood by row: {"accuracy" or "pearson": (n,), "nll": (n,)}."""
    return {task.metric: metric_rows(task, outputs, labels), "nll": nll_rows(task, outputs, labels)}


def metric_rows(task: Task, outputs: Tensor, labels: Tensor) -> Array:
    """Accuracy or Pearson by row. A constant prediction has no correlation; it counts as 0, as in `tasks.pearson`."""
    predicted, labels = predict(task, outputs).double(), labels.double()
    if task.kind != "score":
        return (predicted == labels).double().numpy()
    z, w = _standard(predicted), _standard(labels)
    r = (z * w).mean()
    return (r + z * w - r * (z.square() + w.square()) / 2).numpy()


def nll_rows(task: Task, outputs: Tensor, labels: Tensor, scale: float = 1.0) -> Array:
    """Negative log-likelihood by row, at a temperature.

    Args:
        task: which task.
        outputs: (n, classes) or (n,).
        labels: (n,).
        scale: temperature that logits are divided by; for scores, which are taken as the mean of a normal
            distribution, its standard deviation (1 is what training by squared error takes it to be).
    """
    if task.kind == "score":
        squares = ((predict(task, outputs).double() - labels.double()) / scale).square()
        return (0.5 * squares + math.log(scale) + 0.5 * math.log(2 * math.pi)).numpy()
    return (-log_likelihood(task, outputs.double() / scale, labels)).numpy()


def fitted_scale(task: Task, outputs: Tensor, labels: Tensor) -> float:
    """The temperature (for scores the standard deviation) of least negative log-likelihood, from 1/100 to 100."""
    if task.kind == "score":
        residual = (predict(task, outputs).double() - labels.double()).square().mean().sqrt()
        return min(max(float(residual), 0.01), 100.0)

    def mean_nll(log_scale: float) -> float:
        return float(nll_rows(task, outputs, labels, math.exp(log_scale)).mean())

    # The likelihood is convex in 1/T and so has one minimum in log T.
    found = minimize_scalar(mean_nll, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)


def calibration_error(task: Task, outputs: Tensor, labels: Tensor, scale: float = 1.0) -> float | None:
    """Expected calibration error: |accuracy − mean confidence| over 15 equal bins of confidence; None for scores.

    Reference:
        Guo et al. 2017, arXiv 1706.04599.
    """
    if task.kind == "score":
        return None
    logits = outputs.double() / scale
    confidence = torch.sigmoid(logits.abs()) if task.kind == "binary" else logits.softmax(-1).amax(-1)
    right = (predict(task, outputs).double() == labels.double()).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return float(gaps.abs().sum() / len(labels))


def _standard(values: Tensor) -> Tensor:
    """Mean 0, mean square 1; zeros where values do not vary."""
    centred = values - values.mean()
    size = centred.square().mean().sqrt()
    return centred / size if float(size) > 1e-12 else torch.zeros_like(centred)
