"""The project's mathematics once more: slow, in float64 numpy, with loops, and close to the printed equations.

Nothing here is clever and nothing is shared with the package, so that the two can disagree.
"""

import math

import numpy as np

# Divergences
#
# Logits are arrays (..., C); `mask` has the shape (...), True or 1 where a position counts.


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p_c = logits_c - log(sum_k exp(logits_k)) of one position, shifted by the largest logit."""
    shifted = logits - max(logits)
    return shifted - math.log(sum(math.exp(value) for value in shifted))


def kl_of_position(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) = sum_c p_c (log p_c - log q_c), a class with p_c = 0 contributing nothing."""
    total = 0.0
    for c in range(len(log_p)):
        if log_p[c] > -math.inf:
            total += math.exp(log_p[c]) * (log_p[c] - log_q[c])
    return total


def symmetric_kl_of_position(logits_p: np.ndarray, logits_q: np.ndarray) -> float:
    """KL(p || q) + KL(q || p)."""
    log_p, log_q = log_softmax(logits_p), log_softmax(logits_q)
    return kl_of_position(log_p, log_q) + kl_of_position(log_q, log_p)


def target_to_input_kl_of_position(logits_p: np.ndarray, logits_q: np.ndarray) -> float:
    """KL(q || p), where q is the target."""
    return kl_of_position(log_softmax(logits_q), log_softmax(logits_p))


def jensen_shannon_of_position(logits_p: np.ndarray, logits_q: np.ndarray) -> float:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2."""
    log_p, log_q = log_softmax(logits_p), log_softmax(logits_q)
    log_m = np.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * kl_of_position(log_p, log_m) + 0.5 * kl_of_position(log_q, log_m)


def hellinger_of_position(logits_p: np.ndarray, logits_q: np.ndarray) -> float:
    """sum_c (sqrt(p_c) - sqrt(q_c))^2 / 2, the squared distance."""
    p, q = np.exp(log_softmax(logits_p)), np.exp(log_softmax(logits_q))
    return 0.5 * sum((math.sqrt(p[c]) - math.sqrt(q[c])) ** 2 for c in range(len(p)))


def binary_symmetric_kl_of_position(logit_p: float, logit_q: float) -> float:
    """The symmetric KL of two Bernoulli distributions, as that of the two classes (logit, 0)."""
    return symmetric_kl_of_position(np.array([logit_p, 0.0]), np.array([logit_q, 0.0]))


def squared_error_of_position(value: float, target: float) -> float:
    return (value - target) ** 2


def _divergence(of_position, input, target, class_axis: bool, mask, reduction: str):
    """Apply `of_position` to every position that the mask leaves in, then reduce."""
    input, target = np.asarray(input, dtype=np.float64), np.asarray(target, dtype=np.float64)
    positions = input.shape[:-1] if class_axis else input.shape
    mask = np.ones(positions, dtype=bool) if mask is None else np.broadcast_to(np.asarray(mask, dtype=bool), positions)
    values = np.zeros(positions)
    count = 0
    for index in np.ndindex(*positions):
        if mask[index]:
            values[index] = of_position(input[index], target[index])
            count += 1
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    return values.sum() / count if count else 0.0


def symmetric_kl(input, target, mask=None, reduction="mean"):
    return _divergence(symmetric_kl_of_position, input, target, True, mask, reduction)


def kl(input, target, mask=None, reduction="mean"):
    return _divergence(target_to_input_kl_of_position, input, target, True, mask, reduction)


def jensen_shannon(input, target, mask=None, reduction="mean"):
    return _divergence(jensen_shannon_of_position, input, target, True, mask, reduction)


def hellinger(input, target, mask=None, reduction="mean"):
    return _divergence(hellinger_of_position, input, target, True, mask, reduction)


def binary_symmetric_kl(input, target, mask=None, reduction="mean"):
    return _divergence(binary_symmetric_kl_of_position, input, target, False, mask, reduction)


def mse(input, target, mask=None, reduction="mean"):
    return _divergence(squared_error_of_position, input, target, False, mask, reduction)
