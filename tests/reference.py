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


# SMART
#
# Algorithm 1 on a model that is differentiated by hand. A sentence x (tokens, D) is encoded as the mean over its real
# tokens of tanh(W x_t + b); the head is linear in that vector, or for two sentences in (u, v, u * v). `weights` maps
# "embedding.weight" (vocabulary, D), "hidden.weight", "hidden.bias", "head.weight" and "head.bias" to arrays. A batch
# has one array of ids (n, tokens), one mask (n, tokens) and one noise (n, tokens, D) for each embedding look-up.


def model_of_example(weights, sentences, real):
    """The logits of one example, and what its gradient needs again."""
    hidden = [np.tanh(x @ weights["hidden.weight"].T + weights["hidden.bias"]) for x in sentences]
    pooled = [sum(h[t] for t in range(len(h)) if r[t]) / sum(r) for h, r in zip(hidden, real, strict=True)]
    joined = pooled[0] if len(pooled) == 1 else np.concatenate([pooled[0], pooled[1], pooled[0] * pooled[1]])
    return weights["head.weight"] @ joined + weights["head.bias"], hidden, pooled, joined


def backward_of_example(weights, sentences, real, d_logits, total):
    """Add the gradients of the parameters to `total`; return those of the sentences."""
    _, hidden, pooled, joined = model_of_example(weights, sentences, real)
    total["head.weight"] += np.outer(d_logits, joined)
    total["head.bias"] += d_logits
    d_joined = weights["head.weight"].T @ d_logits
    d_pooled, size = [d_joined], len(pooled[0])
    if len(pooled) == 2:
        d_u, d_v, d_product = d_joined[:size], d_joined[size : 2 * size], d_joined[2 * size :]
        d_pooled = [d_u + d_product * pooled[1], d_v + d_product * pooled[0]]
    d_sentences = []
    for x, h, r, d in zip(sentences, hidden, real, d_pooled, strict=True):
        d_x = np.zeros_like(x)
        for t in range(len(x)):
            if r[t]:
                d_before_tanh = d / sum(r) * (1 - h[t] ** 2)
                total["hidden.weight"] += np.outer(d_before_tanh, x[t])
                total["hidden.bias"] += d_before_tanh
                d_x[t] = weights["hidden.weight"].T @ d_before_tanh
        d_sentences.append(d_x)
    return d_sentences


def symmetric_kl_gradient(logits_p, logits_q):
    """d/da_c of KL(p || q) + KL(q || p): p_c (r_c - sum_k p_k r_k) + p_c - q_c with r = log p - log q."""
    log_p, log_q = log_softmax(logits_p), log_softmax(logits_q)
    p, q, ratio = np.exp(log_p), np.exp(log_q), log_p - log_q
    return p * (ratio - sum(p * ratio)) + p - q


def p_norm(values, norm):
    return abs(values).max() if norm == "inf" else math.sqrt((values**2).sum())


def steepest(g, norm):
    """The vector of p-norm 1 whose inner product with g is the largest: the dual norm of g."""
    if norm == "inf":
        return np.array([[(value > 0) * 1.0 - (value < 0) * 1.0 for value in row] for row in g])
    return g / math.sqrt((g**2).sum())


def on_sphere(gradient, real, unit, *, epsilon, norm, norm_over, epsilon_scale, **unused):
    """The start of one sentence along a gradient: of p-norm epsilon, or 0 where the gradient is."""
    start = np.zeros_like(gradient)
    for group in [range(len(gradient))] if norm_over == "example" else [[t] for t in range(len(gradient))]:
        tokens = [t for t in group if real[t]]
        if tokens and np.abs(gradient[tokens]).max() > 0:
            entries = gradient[tokens].size
            scale = unit * math.sqrt(entries) if norm == "2" and epsilon_scale == "rms" else unit
            start[tokens] = epsilon * scale * steepest(gradient[tokens], norm)
    return start


def move_in_ball(delta, gradient, real, unit, *, epsilon, step_size, norm, norm_over, epsilon_scale, ascent):
    """One step of one sentence by a rule of ascent, then the projection. A `gradient` of None only projects."""
    moved = np.zeros_like(delta)  # padding stays where it is
    for group in [range(len(delta))] if norm_over == "example" else [[t] for t in range(len(delta))]:
        tokens = [t for t in group if real[t]]
        if not tokens:
            continue
        entries = delta[tokens].size
        scale = unit * math.sqrt(entries) if norm == "2" and epsilon_scale == "rms" else unit
        value, g = delta[tokens], None if gradient is None else gradient[tokens]
        if ascent == "normalized":
            if g is not None:
                value = value + step_size * scale * g
                value = value / (p_norm(value, norm) + epsilon * scale)
        else:
            if g is not None and p_norm(g, norm) > 0:
                value = value + step_size * scale * (steepest(g, norm) if ascent == "steepest" else g / p_norm(g, norm))
            if norm == "inf":
                value = np.clip(value, -epsilon * scale, epsilon * scale)
            elif p_norm(value, norm) > epsilon * scale:
                value = value * epsilon * scale / p_norm(value, norm)
        moved[tokens] = value
    return moved


def smart(
    weights,
    ids,
    masks,
    noise,
    *,
    steps,
    epsilon_scale="rms",
    ascent="projected",
    start="noise",
    detach_reference=False,
    **ball,
):
    """Algorithm 1, lines 5 to 12.

    With `start="gradient"`, `noise` holds u, an array (n, classes), and the start lies on the sphere along J^T u, the
    gradient of <u, f(x)>.

    Returns:
        The perturbations after the start and after every step (a list of lists, one for each look-up), the penalty,
        its gradients by the names of the parameters, and the divergence at the start.
    """
    n, table = len(ids[0]), weights["embedding.weight"]
    visited = [[np.zeros((*one.shape, table.shape[1])) for one in ids] for _ in range(max(steps, 1) + 1)]
    total = {name: np.zeros_like(value) for name, value in weights.items()}
    penalty = start_divergence = 0.0
    for i in range(n):
        x, real = [table[one[i]] for one in ids], [np.asarray(one[i], dtype=bool) for one in masks]
        unit = [math.sqrt((a[r] ** 2).mean()) if epsilon_scale == "rms" else 1.0 for a, r in zip(x, real, strict=True)]
        clean = model_of_example(weights, x, real)[0]
        if start == "gradient":
            unused = {k: np.zeros_like(v) for k, v in total.items()}
            pulled = backward_of_example(weights, x, real, noise[0][i], unused)
            triples = zip(pulled, real, unit, strict=True)
            delta = [on_sphere(g, r, s, epsilon_scale=epsilon_scale, **ball) for g, r, s in triples]
        else:
            delta = [np.where(r[:, None], one[i], 0.0) for one, r in zip(noise, real, strict=True)]
        for step in range(max(steps, 1)):
            for k in range(len(delta)):
                visited[step][k][i] = delta[k]
            moved = [a + d for a, d in zip(x, delta, strict=True)]
            logits = model_of_example(weights, moved, real)[0]
            start_divergence += symmetric_kl_of_position(logits, clean) / n if step == 0 else 0.0
            d_logits, unused = symmetric_kl_gradient(logits, clean) / n, {k: np.zeros_like(v) for k, v in total.items()}
            gradient = backward_of_example(weights, moved, real, d_logits, unused) if steps else [None] * len(x)
            for k in range(len(delta)):
                delta[k] = move_in_ball(
                    delta[k], gradient[k], real[k], unit[k], epsilon_scale=epsilon_scale, ascent=ascent, **ball
                )
        for k in range(len(delta)):
            visited[-1][k][i] = delta[k]
        moved = [a + d for a, d in zip(x, delta, strict=True)]
        logits = model_of_example(weights, moved, real)[0]
        penalty += symmetric_kl_of_position(logits, clean) / n
        sides = [(moved, symmetric_kl_gradient(logits, clean) / n)]
        if not detach_reference:
            sides.append((x, symmetric_kl_gradient(clean, logits) / n))
        for sentences, d_logits in sides:
            for one, d_x in zip(ids, backward_of_example(weights, sentences, real, d_logits, total), strict=True):
                for t in range(len(d_x)):
                    total["embedding.weight"][one[i][t]] += d_x[t]
    return visited, penalty, total, start_divergence


def curvature(logits, kind):
    """S of one position: half the second derivative at equality of the symmetric KL divergence, or of (a - b)^2."""
    if kind == "value":
        return np.eye(len(logits))
    if kind == "bernoulli":
        return np.diag([math.exp(-abs(z)) / (1 + math.exp(-abs(z))) ** 2 for z in logits])
    p = np.exp(log_softmax(logits))
    return np.diag(p) - np.outer(p, p)


# Teacher
#
# Algorithm 1, line 14: θ̃_{t+1} = (1 − β) θ_{t+1} + β θ̃_t. Weights are dictionaries from name to array.


def momentum(teacher: dict, students: list[dict], betas: list[float]) -> dict:
    """θ̃ after one update for each student, in order."""
    for student, beta in zip(students, betas, strict=True):
        teacher = {
            name: (1.0 - beta) * np.asarray(student[name], dtype=np.float64)
            + beta * np.asarray(value, dtype=np.float64)
            for name, value in teacher.items()
        }
    return teacher


def paper_beta(update: int, total_steps: int) -> float:
    """0.99 for the first tenth of the updates, 0.999 after."""
    return 0.99 if update < total_steps / 10 else 0.999


# Schedule


def slanted_triangle(t: int, total_steps: int, cut_frac: float, ratio: float, peak_factor: float) -> float:
    """The factor of the base rate at step t."""
    cut = math.floor(total_steps * cut_frac)
    if t > total_steps:
        return 0.0
    if t < cut:
        p = t / cut
    elif total_steps > cut:
        p = 1 - (t - cut) / (total_steps - cut)
    else:
        p = 1.0
    return peak_factor * (1 + p * (ratio - 1)) / ratio


def howard_ruder(t: int, total_steps: int, cut_frac: float, ratio: float) -> float:
    """Equation 3 of arXiv 1801.06146 for a largest rate of 1, as printed."""
    cut = math.floor(total_steps * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio
