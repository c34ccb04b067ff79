"""The divergence of two large outputs, forward and backward: ours and the usual form with two `kl_div`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WARM_UP = {"rows": 2, "classes": 8}
OURS, USUAL, FORMULA = "smartreg.symmetric_kl", "two kl_div", "(p - q)(log p - log q)"


def build(spec: Mapping[str, Any]) -> Callable[[], None]:
    """Forward and backward of `spec["variant"]` on `rows` × `classes` logits, which exist before the call."""
    torch.manual_seed(0)
    clean = torch.randn(spec["rows"], spec["classes"])
    perturbed = clean + 0.1 * torch.randn_like(clean)
    logits = [t.to(spec["device"]).requires_grad_() for t in (perturbed, clean)]
    divergence = _divergence(spec["variant"])

    def step() -> None:
        for tensor in logits:
            tensor.grad = None
        divergence(*logits).backward()

    return step


def _divergence(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == USUAL:
        return _two_kl_div
    if name == FORMULA:
        return _formula

    from smartreg import symmetric_kl

    return symmetric_kl


def _two_kl_div(a: Tensor, b: Tensor) -> Tensor:
    forward = F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1), reduction="batchmean")
    return forward + F.kl_div(F.log_softmax(b, -1), F.softmax(a, -1), reduction="batchmean")


def _formula(a: Tensor, b: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
