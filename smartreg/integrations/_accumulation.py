"""How a batch is weighted among those of one optimizer step of a Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smartreg._model.replay import undone
from smartreg._warnings import warn

_Parent: Any = object  # a Trainer class, in whatever a user puts the mixin before


class SharesOfAStep(_Parent):
    """What a loss and the penalties of one batch are multiplied by, in a Trainer that accumulates.

    The Trainer divides by the number of accumulated batches itself unless the loss is a sum over this batch divided by
    `items`, the count of all batches of the step (and, on several processes, of all of them, which DDP's mean would
    divide once more). The penalties then become such sums, and so does a task loss that ignored the count, unless
    `loss_is_scaled_for_ga = True` says that it was normalized in another way.
    """

    _counts: bool | None = None  # whether the task loss is divided by num_items_in_batch; None: not yet seen

    def shares(
        self, inputs: Mapping[str, Any], output_mask: Tensor | None, items: Tensor | int | None, dtype: torch.dtype
    ) -> tuple[Tensor | float, Tensor | float]:
        """Factors of the task loss and of the penalties, which are means over this batch."""
        accepts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        scaled = said
        if said is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        if not scaled:
            return 1.0, 1.0
        if items is None:
            return 1.0, 1.0 / self.current_gradient_accumulation_steps
        here = output_mask if output_mask is not None else inputs["labels"] != -100
        share = here.sum().to(torch.promote_types(dtype, torch.float32)) / items
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices and accepts else 1
        return (1.0 if said or self._loss_counts(inputs, items, share) else share), share * processes

    def _loss_counts(self, inputs: Mapping[str, Any], items: Tensor | int, share: Tensor) -> bool:
        """Whether the parent's loss is divided by `items`: looked at once, by whether twice as many halve it."""
        if self._counts is None and float(share) != 1.0:
            once, half = (self._parents_loss(inputs, count) for count in (items, 2 * items))
            if not torch.isfinite(once) or once == 0:
                return True  # nothing to see in this batch
            self._counts = not torch.equal(once, half)
            if not self._counts:
                warn(
                    f"the task loss of {type(self.model).__name__} is a mean over each batch and ignores "
                    f"num_items_in_batch: the stock Trainer adds up such means over accumulated batches, without "
                    f"dividing by their number. Here it is brought to the common count, so compare with a stock run "
                    f"of one batch a step. If your own code divides it already, say loss_is_scaled_for_ga = True in "
                    f"the class of the Trainer"
                )
        return self._counts is not False

    def _parents_loss(self, inputs: Mapping[str, Any], items: Tensor | int) -> Tensor:
        model: nn.Module = self.model
        with undone(model):
            model.eval()
            loss: Tensor = super().compute_loss(model, dict(inputs), False, num_items_in_batch=items)
        return loss.detach()
