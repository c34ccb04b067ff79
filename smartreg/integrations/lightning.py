"""Lightning with SMART: a callback, and one line in `training_step`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from smartreg._masks import Masks
from smartreg._outputs import Forward
from smartreg.divergences import Divergence
from smartreg.integrations._regularizers import Regularizers, Strength, require

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise require("lightning", "lightning", error) from error


class SmartCallback(Callback):
    r"""Holds \(\lambda_s R_s(\theta) + \mu D_{\text{Breg}}(\theta, \tilde\theta)\) of a run for `smart_loss`.

    The teacher starts from the weights at the first batch of `fit`, moves after each optimizer step that a scaler did
    not skip, before any checkpoint is written, and is part of the checkpoint as the state of this callback: the keys of
    the module stay what they are. Both penalties are logged.

    Args:
        smart_lambda: λ_s; 0 leaves the smoothness term out, at no cost.
        bregman_mu: μ; 0 leaves the proximal term out, at no cost.
        smart_every: Take the smoothness term at one optimizer step in so many, with so many times the weight.
        smart_warmup_steps: λ_s grows from 0 over so many optimizer steps.
        divergence: ℓ_s of both terms.
        output_to_logits: From what `forward` returns to what is compared, see `SmartLoss`.
        smart_options: Further arguments of `SmartLoss`.
        bregman_options: Further arguments of `MomentumBregman`, such as `beta`, whose half-life is a tenth of the run
            if it is not there.

    Raises:
        ValueError: A weight or a number of steps is out of range.
    """

    def __init__(
        self,
        *,
        smart_lambda: float = 0.03,
        bregman_mu: float = 0.0,
        smart_every: int = 1,
        smart_warmup_steps: int = 0,
        divergence: str | Divergence = "symmetric_kl",
        output_to_logits: Any = None,
        smart_options: Mapping[str, Any] | None = None,
        bregman_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        strength = Strength(smart_lambda, bregman_mu, smart_every, smart_warmup_steps)
        self.regularizers = Regularizers(strength, smart_options or {}, bregman_options or {})
        self.generator: torch.Generator | None = (smart_options or {}).get("generator")
        self.compare = {"divergence": divergence, "output_to_logits": output_to_logits}
        self.means: dict[str, Tensor] = {}
        """The last known mean of each penalty: not every step has a search, and Lightning drops what a step lacks."""
        self._handles: list[RemovableHandle] = []
        self._stepped = False
        self.step: int | None = None
        """Batches after which an optimizer has stepped; None between two calls of `fit`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before a checkpoint is read: the teacher of an earlier `fit` is none of this one."""
        if stage != "fit":
            return
        if self.generator is not None and trainer.world_size > 1:
            raise ValueError(
                "smart_options must have no generator on several processes, got one: Lightning saves the state of a "
                "callback from the first process alone, so that a resumed run would draw other noise"
            )
        if type(trainer.strategy).__name__ == "DeepSpeedStrategy":
            raise RuntimeError("SMART has not been made to work with DeepSpeedStrategy: use DDP")
        self.regularizers.restart()
        self.step, self.means = None, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An optimizer says itself whether it has stepped, which `global_step` does not where a scaler skipped it."""
        self._stepped = False
        if self.step is None:
            self.step = trainer.global_step  # a checkpoint of a run without this callback
        self._handles = [optimizer.register_step_post_hook(self._note_step) for optimizer in trainer.optimizers]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Runs before the checkpoint callbacks, which Lightning puts last."""
        if self._stepped:
            self._stepped = False
            self.step = (self.step or 0) + 1
            self.regularizers.update()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Teacher, counters and generator."""
        return {**self.regularizers.state_dict(), "step": torch.tensor(self.step or 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken over at the next batch."""
        state = dict(state_dict)
        step = state.pop("step", None)
        self.step = None if step is None else int(step)
        if state:  # none before the first step
            self.regularizers.load_state_dict(state)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on without the teacher, which there is from the first step on."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {})
        lost = self.regularizers.strength.bregman_mu and "bregman.updates" not in saved
        if trainer.state.fn == "fit" and lost and checkpoint.get("global_step"):
            raise ValueError(
                "cannot resume: the checkpoint has no teacher, since the run that wrote it had none. To start one "
                "from its weights, load them into the module and call fit() without ckpt_path"
            )

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # of a fused optimizer, which skips its steps itself
        if found_inf is None or not bool(found_inf):
            self._stepped = True


def smart_loss(
    module: LightningModule,
    model: nn.Module,
    forward: Forward,
    *,
    mask: Masks = None,
    output_mask: Masks = None,
    example_ids: Masks = None,
) -> tuple[Any, Tensor | float]:
    """Run `model`, and what is to be added to its loss.

    Outside of the training of a `fit` (in validation, test and prediction, or without a trainer) it is `forward(model)`
    and 0, so that a step may be shared.

    Args:
        module: The LightningModule whose step this is.
        model: The part of it that is regularized; it is not registered anywhere.
        forward: Runs the model given to it once, as in `lambda m: m(**batch)`.
        mask: (batch, sequence), real tokens; see `SmartLoss`.
        output_mask: Which positions of the output are compared, for outputs of tokens; see `token_mask`.
        example_ids: For rows that hold several examples; see `SmartLoss`.

    Returns:
        The outputs of the clean pass, and the weighted sum of both penalties.

    Raises:
        RuntimeError: The trainer has no `SmartCallback`.
    """
    trainer = getattr(module, "_trainer", None)  # the property raises where there is none
    if trainer is None or not trainer.training or not torch.is_grad_enabled():
        return forward(model), 0.0
    found = [callback for callback in trainer.callbacks if isinstance(callback, SmartCallback)]
    if len(found) != 1:
        raise RuntimeError(
            f"smart_loss needs one SmartCallback among the callbacks of the Trainer, got {len(found)}: pass one, and "
            f"run the Tuner, which takes callbacks away, on the module without smart_loss"
        )
    callback = found[0]
    regularizers = callback.regularizers
    if not regularizers.strength:
        return forward(model), 0.0
    regularizers.follow(model, callback.compare, total_steps=lambda: trainer.estimated_stepping_batches)
    step = callback.step or 0
    outputs, terms = regularizers(model, forward, step, mask=mask, output_mask=output_mask, example_ids=example_ids)
    callback.means.update(regularizers.means())
    module.log_dict(callback.means)
    # To read the gain waits for the device, so only where Lightning writes; its own monitors ask in the same way.
    gain = regularizers.ascent_gain() if trainer._logger_connector.should_update_logs else None
    if gain is not None:
        module.log("smart_ascent_gain", gain)
    return outputs, sum(terms.values())
