"""The Hugging Face Trainer with SMART: two class names change in a script.

The parent's own `compute_loss` makes the task loss, on a stand-in for the model whose one call is the clean pass, so
that label smoothing, `compute_loss_func`, subclasses, `num_items_in_batch` and what DDP averages stay the parent's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smartreg._masks import Masks
from smartreg._outputs import OutputToLogits
from smartreg.divergences import Divergence
from smartreg.integrations._accumulation import SharesOfAStep
from smartreg.integrations._heads import Head, infer_head, look_up_examples, look_up_masks
from smartreg.integrations._regularizers import Regularizers, Strength, require
from smartreg.integrations._sharding import refuse_sharding
from smartreg.integrations._stand_in import StandIn

try:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

    from smartreg.integrations import _checkpoint
except ImportError as error:
    raise require("transformers and accelerate", "transformers", error) from error

_log = logging.getLogger(__name__)


@dataclass
class SmartArguments:
    """The fields that a training-arguments class gains; `HfArgumentParser` makes a flag of each."""

    smart_lambda: float = field(default=0.03, metadata={"help": "Weight of the smoothness penalty; 0 leaves it out."})
    bregman_mu: float = field(default=0.0, metadata={"help": "Weight of the proximal term; 0 leaves it out."})
    bregman_beta: float | None = field(
        default=None, metadata={"help": "Momentum of the teacher; None: its half-life is a tenth of the run."}
    )
    smart_epsilon: float | None = field(
        default=None, metadata={"help": "Radius of the ball around the embeddings; None: SmartLoss's own."}
    )
    smart_memory_efficient: bool = field(
        default=False, metadata={"help": "Keep one pass in memory at a time, for one more clean pass."}
    )
    smart_every: int = field(
        default=1, metadata={"help": "Take the smoothness penalty at one optimizer step in so many, times so many."}
    )
    smart_warmup_steps: int = field(
        default=0, metadata={"help": "Let the weight of the smoothness penalty grow from 0 over so many steps."}
    )


@dataclass
class SmartTrainingArguments(SmartArguments, TrainingArguments):
    """`TrainingArguments` with the fields of `SmartArguments`.

    Examples:
        >>> arguments = SmartTrainingArguments(output_dir="out", smart_lambda=0.5, report_to="none")
        >>> arguments.smart_lambda, arguments.bregman_mu
        (0.5, 0.0)
    """


@dataclass
class SmartSeq2SeqTrainingArguments(SmartArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the fields of `SmartArguments`."""


class SmartTrainerMixin(SharesOfAStep):
    r"""Adds \(\lambda_s R_s(\theta) + \mu D_{\text{Breg}}(\theta, \tilde\theta)\) to the loss of a Trainer.

    Put it before a Trainer class, `class MyTrainer(SmartTrainerMixin, BaseTrainer)`; `SmartTrainer` and
    `SmartSeq2SeqTrainer` are that for the two classes of transformers. The weights are fields of the arguments. The
    head of the model decides what is compared, where, and by which divergence, and the log says it once.

    Outside of training, and in a run whose two weights are 0, it does nothing at all. The teacher starts from the
    weights at the first step of `train()`, moves after each optimizer step that was not skipped, and is part of every
    checkpoint; resuming from one without it is an error.

    Each penalty is weighted among the accumulated batches as the task loss is. Where the task loss ignores the
    `num_items_in_batch` that the Trainer has counted (BERT's heads do, and the stock Trainer then takes steps that are
    too large by the number of accumulated batches), it is brought to that count, with a `SmartWarning`.

    Args:
        *args: As for the parent.
        divergence: In place of the one that belongs to the head.
        output_to_logits: In place of the one that belongs to the head.
        smart_options: Further arguments of `SmartLoss`. They win over the fields of the arguments.
        bregman_options: Further arguments of `MomentumBregman`. They win over the fields of the arguments.
        **kwargs: As for the parent.

    Raises:
        TypeError: The arguments lack the fields.
        ValueError: A field is out of range.
    """

    def __init__(
        self,
        *args: Any,
        divergence: str | Divergence | None = None,
        output_to_logits: OutputToLogits | None = None,
        smart_options: Mapping[str, Any] | None = None,
        bregman_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        fields: Any = self.args
        if not isinstance(fields, SmartArguments):
            raise TypeError(
                f"args must have the fields of SmartArguments, as SmartTrainingArguments and "
                f"SmartSeq2SeqTrainingArguments do, got {type(fields).__name__}"
            )
        self._divergence, self._output_to_logits = divergence, output_to_logits
        self._head: Head | None = None
        self._options = dict(smart_options or {}), dict(bregman_options or {})
        self.regularizers = self._by_arguments()
        self.add_callback(_MoveTeacher(self))

    # What a subclass may override

    def smart_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> Head:
        """What to compare; called with the first batch.

        Args:
            model: The model without wrappers.
            inputs: The batch.
        """
        labels = inputs.get("labels")
        return infer_head(model, labels, divergence=self._divergence, output_to_logits=self._output_to_logits)

    def smart_masks(self, model: nn.Module, inputs: Mapping[str, Any]) -> Masks:
        """One mask of the real tokens for each look-up of the embedding, in their order; None where all are real.

        Args:
            model: The model without wrappers.
            inputs: The batch.
        """
        assert self._head is not None
        return look_up_masks(model, self._head, inputs)

    # What the Trainer calls

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; both regularizers anew, by the arguments as they are now: a search may have set them."""
        self.regularizers.restart()
        self.regularizers = self._by_arguments()
        if self.regularizers.strength:
            refuse_sharding(self)
        self._head = self._counts = None
        return super()._inner_training_loop(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The parent's loss, with both terms while it trains."""
        if not (self.regularizers.strength and model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        batch = dict(inputs)  # the parent may take the labels out
        if self._head is None:
            self._head = self.smart_head(self.model, batch)
            _log.info("SMART compares %s", self._head)
        self.regularizers.follow(model, self._head.options, total_steps=lambda: self.state.max_steps)
        output_mask = self._head.output_mask(batch)
        masks = self.smart_masks(self.model, batch)
        totals: list[Tensor | float] = []

        def clean_pass(*args: Any, **kwargs: Any) -> Any:
            if totals:
                raise RuntimeError(
                    f"{type(self).__name__}.compute_loss called the model twice for one batch, and SMART regularizes "
                    f"one pass: use SmartLoss and MomentumBregman in a compute_loss of your own"
                )
            where: dict[str, Any] = {"mask": masks, "output_mask": output_mask, "example_ids": look_up_examples(batch)}
            outputs, terms = self.regularizers(model, lambda m: m(*args, **kwargs), self.state.global_step, **where)
            totals.append(sum(terms.values()))
            return outputs

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # the parent looks at something; what trains is another pass
                return model(*args, **kwargs)
            return self._answer(clean_pass, *args, **kwargs)

        result = super().compute_loss(
            StandIn(model, call), inputs, return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not totals:
            raise RuntimeError(
                f"{type(self).__name__}.compute_loss never called the model that it was given, so that nothing is "
                f"regularized: it must call its argument `model`"
            )
        loss, outputs = result if return_outputs else (result, None)
        for_task, for_terms = self.shares(batch, output_mask, num_items_in_batch, loss.dtype)
        loss = for_task * loss + for_terms * totals[0]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the parent's, with the mean of each penalty since the last time, and the gain of the last search."""
        if "loss" in logs:
            for name, mean in self.regularizers.means().items():
                logs[name] = float(self.accelerator.reduce(mean, "mean"))
            gain = self.regularizers.ascent_gain()
            if gain is not None:
                logs["smart_ascent_gain"] = gain
        super().log(logs, *args, **kwargs)

    def _answer(self, clean_pass: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the parent's call of the model returns."""
        if kwargs.get("fused_lm_head"):
            raise RuntimeError(
                f"{type(self).__name__} asks for a fused head (TRL's trainers do), whose output has no logits to "
                f"compare: use SmartSFTTrainer, or the Trainer of transformers"
            )
        return clean_pass(*args, **kwargs)

    def _by_arguments(self) -> Regularizers:
        fields: Any = self.args
        smart, bregman = self._options
        radius = {} if fields.smart_epsilon is None else {"epsilon": fields.smart_epsilon}
        momentum = {} if fields.bregman_beta is None else {"beta": fields.bregman_beta}
        return Regularizers(
            Strength(fields.smart_lambda, fields.bregman_mu, fields.smart_every, fields.smart_warmup_steps),
            {"memory_efficient": fields.smart_memory_efficient, **radius, **smart},
            {**momentum, **bregman},
        )

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        _checkpoint.save(self.regularizers, output_dir, self.args.process_index, main=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            _checkpoint.load(self.regularizers, checkpoint, self.args.process_index)


class SmartTrainer(SmartTrainerMixin, Trainer):
    """The `Trainer` of transformers with SMART; see `SmartTrainerMixin`."""


class SmartSeq2SeqTrainer(SmartTrainerMixin, Seq2SeqTrainer):
    """The `Seq2SeqTrainer` of transformers with SMART; see `SmartTrainerMixin`."""


class _MoveTeacher(TrainerCallback):
    """Moves the teacher after an optimizer step; that of float16 may have been skipped."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.regularizers.strength and trainer._head is None:
            raise RuntimeError(
                f"a whole step of {type(trainer).__name__} passed by SmartTrainerMixin.compute_loss, so that nothing "
                f"is regularized: put the mixin before the class whose compute_loss is your own, as in "
                f"class Mine(SmartTrainerMixin, Own)"
            )
        if not trainer.accelerator.optimizer_step_was_skipped:
            trainer.regularizers.update()
