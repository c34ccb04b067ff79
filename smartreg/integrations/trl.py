"""TRL's SFTTrainer with SMART: what its fused head would return is made from the logits of the clean pass.

The fused head of TRL never builds the logits, which are what SMART compares. So the clean pass runs without it, and the
parent gets the fields that it would have got: its loss and its metrics stay its own.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smartreg.integrations._heads import base_model
from smartreg.integrations._regularizers import require
from smartreg.integrations.transformers import SmartArguments, SmartTrainerMixin

try:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise require("trl", "trl", error) from error


@dataclass
class SmartSFTConfig(SmartArguments, SFTConfig):
    """`SFTConfig` with the fields of `SmartArguments`.

    Examples:
        >>> SmartSFTConfig.smart_lambda, SmartSFTConfig.bregman_mu, SmartSFTConfig.loss_type
        (0.03, 0.0, 'nll')
    """


class SmartSFTTrainer(SmartTrainerMixin, SFTTrainer):
    """The `SFTTrainer` of TRL with SMART; see `SmartTrainerMixin`.

    Both penalties are sums over the tokens with a label, divided by the count that TRL divides its loss by. The logs
    keep entropy, mean token accuracy and the number of tokens. Training needs the memory of the logits, which TRL's
    fused head saves; evaluation does not.

    Several sequences in one row (`padding_free`, or `packing` by `"bfd"`) are an example each, as in padded batches. A
    chunk of `packing_strategy="wrapped"` is one.

    Args:
        *args: As for the parent.
        **kwargs: As for the parent, and for `SmartTrainerMixin`.

    Raises:
        TypeError: The arguments lack the fields, see `SmartSFTConfig`.
        ValueError: A field is out of range.
        RuntimeError: The model's forward was replaced by something that no copy of the model could have.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.regularizers.strength.bregman_mu:
            _let_copies_run_themselves(self.model)

    def _answer(self, clean_pass: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("fused_lm_head", False):
            return clean_pass(*args, **kwargs)
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        return fused_output(clean_pass(*args, **kwargs), labels, shift_labels)

    def _loss_counts(self, inputs: Mapping[str, Any], items: Tensor | int, share: Tensor) -> bool:
        if self.compute_loss_func is None and self.label_smoother is None:
            return True  # TRL divides by it itself
        try:
            return super()._loss_counts(inputs, items, share)
        finally:
            self._metrics["eval"].clear()  # of the batch that it looked at


def fused_output(outputs: Any, labels: Tensor | None, shift_labels: Tensor | None = None) -> FusedCausalLMOutput:
    """What TRL's fused head returns, from logits.

    Args:
        outputs: Those of the model, with logits.
        labels: (batch, sequence), those of the tokens themselves.
        shift_labels: (batch, sequence), those that the logits at each position predict; they win.
    """
    logits, targets = outputs.logits, shift_labels
    if targets is None:
        assert labels is not None
        logits, targets = logits[:, :-1], labels[:, 1:]
    known = targets != -100
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        first = log_p.argmax(-1) == targets
    return FusedCausalLMOutput(
        log_probs=chosen.masked_fill(~known, 0.0),
        entropy=entropy.masked_fill(~known, 0.0),
        is_top1=first,  # no class is -100
        label_mask=known,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def _let_copies_run_themselves(model: nn.Module) -> None:
    """TRL's forward holds that of this very model: the teacher, a copy, would answer with the student's logits."""
    base = base_model(model)
    fused: Any = getattr(base.forward, "__func__", base.forward)
    plain = getattr(inspect.getclosurevars(fused).nonlocals.get("original_forward"), "__func__", None)
    if plain is None:
        raise RuntimeError(
            f"the forward of {type(base).__name__} was replaced on the object before TRL replaced it, so that a "
            f"teacher would run the student: pass a model that is not dispatched or patched, or set bregman_mu=0"
        )

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return fused(self, *args, fused_lm_head=True, **kwargs) if fused_lm_head else plain(self, *args, **kwargs)

    base.forward = types.MethodType(forward, base)
