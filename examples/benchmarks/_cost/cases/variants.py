"""One training step of a BERT classifier: plain, with SMART in both modes, and with the smart-pytorch package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], None]

PLAIN, STANDARD, EFFICIENT, PEER = "plain", "smartreg", "smartreg, memory-efficient", "smart-pytorch"
ALL = (PLAIN, STANDARD, EFFICIENT, PEER)
SIZES = {
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
}
CLASSES = 5
LAMBDA_S = 0.3
WARM_UP = {"size": "tiny", "batch": 1, "length": 8}


def build(spec: Mapping[str, Any]) -> Step:
    """The step of `spec["variant"]`, its model loaded and every gradient allocated.

    Args:
        spec: `variant`, `size`, `batch`, `length`, `steps`, `device`, and optionally `every` (the penalty on each
            k-th step alone, times k; a call of the result is k steps), `compiled`, `weight` (λ_s), `autocast` (bfloat16
            in the passes) and `ascent_autocast`.
    """
    model, batch = load(spec)
    return step(spec["variant"], model, batch, spec)


def load(spec: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in train mode with dropout 0.1 and random weights, and a batch of random sentences."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(**SIZES[spec["size"]], vocab_size=30522, num_labels=CLASSES)
    model = BertForSequenceClassification(config).to(spec["device"], dtype).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sizes = (spec["batch"], spec["length"])
    lengths = torch.randint(max(1, math.ceil(spec["length"] / 2)), spec["length"] + 1, (spec["batch"], 1))
    lengths[0] = spec["length"]
    batch = {
        "input_ids": torch.randint(1000, 30522, sizes),
        "attention_mask": (torch.arange(spec["length"]) < lengths).long(),
        "labels": torch.randint(0, CLASSES, sizes[:1]),
    }
    return model, {name: tensor.to(spec["device"]) for name, tensor in batch.items()}


def gradients_of(variant: str, spec: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The gradient of every parameter after one step, from the same weights, batch, dropout masks and noise."""
    model, batch = load(spec, dtype)
    torch.manual_seed(1)
    step(variant, model, batch, spec)()
    return [parameter.grad for parameter in model.parameters()]


def step(variant: str, model: nn.Module, batch: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Step:
    """Forward and backward of one variant, adding to `.grad`. Only the variants of ours import the library."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mask, labels = batch["attention_mask"], batch["labels"]
    run = torch.compile(model) if spec.get("compiled") else model

    def autocast() -> torch.autocast:
        return torch.autocast(spec["device"], torch.bfloat16, enabled=spec.get("autocast", False))

    def plain() -> None:
        with autocast():
            loss = F.cross_entropy(run(**inputs).logits, labels)
        loss.backward()

    if variant == PLAIN:
        return plain
    if variant == PEER:
        return _peer(model, batch, spec)

    from smartreg import SmartLoss

    # Algorithm 1, whose passes are those of smart-pytorch; with `start` another search of the library.
    search = {"start": "noise", "norm": "inf", "noise_std": 0.15} if "start" not in spec else {"start": spec["start"]}
    options = {"memory_efficient": variant == EFFICIENT, "ascent_autocast": spec.get("ascent_autocast", True)}
    smart = SmartLoss(run, steps=spec["steps"], check_first_call=False, **search, **options)
    every, weight = spec.get("every", 1), spec.get("weight", LAMBDA_S)

    def regularized() -> None:
        with autocast():
            outputs, penalty = smart(lambda m: m(**inputs), mask=mask)
            loss = F.cross_entropy(outputs.logits, labels) + every * weight * penalty
        loss.backward()
        for _ in range(every - 1):
            plain()

    return regularized


def _peer(model: nn.Module, batch: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Step:
    from smart_pytorch import SMARTLoss, sym_kl_loss

    def evaluate(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits

    smart = SMARTLoss(evaluate, sym_kl_loss, num_steps=spec["steps"])

    def regularized() -> None:
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        logits = evaluate(embeddings)
        loss = F.cross_entropy(logits, batch["labels"]) + LAMBDA_S * smart(embeddings, logits) / len(logits)
        loss.backward()

    return regularized
