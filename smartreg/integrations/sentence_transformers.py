"""sentence-transformers with SMART: a loss around a loss, for its trainers, for cross-encoders and for SetFit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smartreg._warnings import warn
from smartreg._wrappers import innermost
from smartreg.divergences import Divergence
from smartreg.integrations._regularizers import Regularizers, Strength, require

try:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss
    from sentence_transformers.sparse_encoder.losses import SpladeLoss
    from transformers import TrainerCallback

    from smartreg.integrations import _checkpoint
except ImportError as error:
    raise require("sentence-transformers", "sentence-transformers", error) from error

_CHOICES = ("embeddings", "cosine")


class SmartLossModifier(nn.Module):
    r"""Adds \(\lambda_s R_s(\theta) + \mu D_{\text{Breg}}(\theta, \tilde\theta)\) to any loss of sentence-transformers.

    The loss itself is what the passes run, clean and perturbed, so that it may embed its columns one by one or merged.
    Give its `callback` to the trainer: it moves the teacher and keeps it in the checkpoints. In training the result is
    a dictionary of components, which the trainer adds up and logs: `base_loss` (what the loss returned, or its own
    components), `smart_term` and `bregman_term`. In evaluation it is what the loss returns.

    Args:
        model: The SentenceTransformer or CrossEncoder, as for the loss.
        loss: Any loss of that model that does its forward passes when it is called.
        smart_lambda: λ_s; 0 leaves the smoothness term out, at no cost.
        bregman_mu: μ; 0 leaves the proximal term out, at no cost.
        smart_every: Take the smoothness term at one optimizer step in so many, with so many times the weight.
        smart_warmup_steps: λ_s grows from 0 over so many optimizer steps.
        compare: `"embeddings"`, or `"cosine"` of the first column with each other one. A CrossEncoder always compares
            its scores.
        divergence: In place of `"mse"`, and of what belongs to the scores of a CrossEncoder: `"binary_symmetric_kl"`
            for one label, `"symmetric_kl"` for several.
        smart_options: Further arguments of `SmartLoss`.
        bregman_options: Further arguments of `MomentumBregman`, such as `beta`, whose half-life is a tenth of the run
            if it is not there.

    Attributes:
        callback: For the trainer's `callbacks`.

    Raises:
        ValueError: A weight or an option is out of range, or the loss does its passes in the backward (`Cached...`), or
            runs parts of the model on what an earlier pass left (`AdaptiveLayerLoss`).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        smart_lambda: float = 0.03,
        bregman_mu: float = 0.0,
        smart_every: int = 1,
        smart_warmup_steps: int = 0,
        compare: str = "embeddings",
        divergence: str | Divergence | None = None,
        smart_options: Mapping[str, Any] | None = None,
        bregman_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if compare not in _CHOICES:
            raise ValueError(f"compare must be one of {_CHOICES}, got {compare!r}")
        if getattr(loss, "uses_gradient_cache", False):
            raise ValueError(
                f"{type(loss).__name__} runs the model again in its backward, where no perturbation can be: use the "
                f"loss without a cache"
            )
        if any(isinstance(part, AdaptiveLayerLoss) for part in loss.modules()):
            raise ValueError(
                f"{type(loss).__name__} runs parts of the model on the layers of an earlier pass, where no "
                f"perturbation can be: use the loss inside of it"
            )
        self.model, self.loss, self.compare = model, loss, compare
        strength = Strength(smart_lambda, bregman_mu, smart_every, smart_warmup_steps)
        self._smart_options = dict(smart_options or {})
        self.regularizers = Regularizers(strength, self._smart_options, bregman_options or {})
        self.callback = SmartCallback(self)
        self._options = {"divergence": divergence or self._divergence(), "output_to_logits": _compared}

    def forward(self, sentence_features: Iterable[Any], labels: Tensor | None = None, **options: Any) -> Any:
        """The components of the loss; the options, such as the prompt of a CrossEncoder, are for it alone."""
        columns = list(sentence_features)
        if not (self.regularizers.strength and self.model.training and torch.is_grad_enabled()):
            return self.loss(columns, labels, **options)
        if not self.callback.attached:
            raise RuntimeError(
                "nothing would count steps or move a teacher: give the trainer callbacks=[loss.callback]"
            )
        self.follow()
        masks: list[Tensor | None] = []  # filled by the clean pass, and read after it

        def run(model: nn.Module) -> tuple[Any, tuple[Tensor, ...]]:
            masks.clear()
            with _in_place_of(self.model, model, self.loss), _noted(model, masks) as outputs:
                value = self.loss([dict(c) if isinstance(c, Mapping) else c for c in columns], labels, **options)
            return value, self._tensors(outputs, columns)

        (value, _), terms = self.regularizers(self.model, run, self.callback.step, mask=masks)
        return {**(value if isinstance(value, dict) else {"base_loss": value}), **terms}

    def follow(self) -> None:
        """Build the regularizers of the run, or those of a model that has been wrapped since."""
        inner = innermost(self.model)
        embedding = None if "embedding" in self._smart_options else _embedding(inner)
        self.regularizers.follow(
            self.model,
            self._options,
            total_steps=lambda: self.callback.total_steps,
            embedding=embedding,
            teacher=lambda: _copy_of(inner),
        )

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        strength = vars(self.regularizers.strength)
        return {"loss": type(self.loss).__name__, "compare": self.compare, **strength}

    def _divergence(self) -> str:
        inner = innermost(self.model)
        if isinstance(inner, CrossEncoder):
            return "binary_symmetric_kl" if inner.num_labels == 1 else "symmetric_kl"
        return "mse"

    def _tensors(self, outputs: list[Mapping[str, Tensor]], columns: list[Any]) -> tuple[Tensor, ...]:
        if outputs and "scores" in outputs[0]:  # as one, however many forwards the loss makes of a batch
            return (torch.cat([output["scores"] for output in outputs]),)
        if any("sentence_embedding" not in output for output in outputs):
            raise ValueError(
                f"the {type(innermost(self.model)).__name__} must give a sentence_embedding or scores to compare, got "
                f"{sorted(outputs[0])}: use SmartLoss in a loop of your own"
            )
        embeddings = tuple(output["sentence_embedding"] for output in outputs)
        return embeddings if self.compare == "embeddings" else _cosines(embeddings, columns)


class SmartCallback(TrainerCallback):
    """Moves the teacher of a `SmartLossModifier` and keeps it in the checkpoints; made by it."""

    def __init__(self, modifier: SmartLossModifier) -> None:
        self.modifier, self.regularizers = modifier, modifier.regularizers
        self.attached = False
        self.step = self.total_steps = self.place = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The teacher starts anew, or from the checkpoint that the trainer resumes from."""
        self.attached, self.step, self.total_steps = True, state.global_step, state.max_steps
        # The state is one for all callbacks of a run: of several losses, each has its place among them.
        self.place = state.smart_losses = getattr(state, "smart_losses", 0) + 1
        self.regularizers.restart()
        if state.global_step:
            _checkpoint.load(self.regularizers, self._folder(args, state), args.process_index)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of several losses each has its teacher from the first step on, though its own first batch comes later."""
        if self.regularizers.strength:
            self.modifier.follow()
        loss = self.modifier.loss
        # The trainer adds a schedule to a SpladeLoss that it sees, and a schedule begins with weights of 0.
        if state.global_step == 0 and isinstance(loss, SpladeLoss) and loss.document_regularizer_weight:
            warn(
                "SpladeLoss trains at its full weights from the first step on: inside of SmartLossModifier the trainer "
                "adds no schedule, so add SpladeRegularizerWeightSchedulerCallback(loss=inner) to callbacks, where "
                "inner is the SpladeLoss"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """That of float16 may have been skipped."""
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.regularizers.update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the schedule of λ_s goes by."""
        self.step = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside the other files of the checkpoint."""
        _checkpoint.save(self.regularizers, self._folder(args, state), args.process_index, main=args.should_save)

    def _folder(self, args: Any, state: Any) -> Path:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        return folder if self.place == 1 else folder / f"smartreg-loss-{self.place}"


def _compared(output: tuple[Any, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return output[1]


def _cosines(embeddings: tuple[Tensor, ...], columns: list[Any]) -> tuple[Tensor, ...]:
    """Of the first column with each other one; the loss may have embedded several columns as one."""
    found = torch.cat(embeddings)
    given = sum(len(column["attention_mask"]) for column in columns if "attention_mask" in column)
    if len(columns) < 2 or given not in (0, len(found)):
        raise ValueError(
            f"compare='cosine' needs an embedding of each text in two or more columns, got {len(found)} "
            f"embeddings of {given} texts (columns: {len(columns)}): use compare='embeddings'"
        )
    first, *others = found.chunk(len(columns))
    return tuple(torch.cosine_similarity(first, other) for other in others)


def _embedding(model: nn.Module) -> nn.Module:
    """The input embedding of the transformer inside."""
    inner = getattr(model, "transformers_model", None)
    if inner is None:
        raise ValueError(
            f"{type(model).__name__} has no transformer inside whose embedding could be perturbed: pass "
            f"smart_options={{'embedding': ...}}"
        )
    found: nn.Module = inner.get_input_embeddings()
    return found


def _copy_of(model: nn.Module) -> nn.Module:
    """A teacher without what hangs on the model: its card holds the trainer."""
    card = getattr(model, "model_card_data", None)
    return copy.deepcopy(model, {} if card is None else {id(card): card})


@contextmanager
def _in_place_of(wrapped: nn.Module, model: nn.Module, loss: nn.Module) -> Iterator[None]:
    """In this block the loss, and each loss inside of it, has another model, under whatever name it holds it."""
    same, within = (wrapped, innermost(wrapped)), set(wrapped.modules())
    parts = [part for part in loss.modules() if part not in within]
    places = [(part._modules, name, held) for part in parts for name, held in part._modules.items() if held in same]
    for modules, name, _ in places:
        modules[name] = model
    try:
        yield
    finally:
        for modules, name, held in places:
            modules[name] = held


@contextmanager
def _noted(model: nn.Module, masks: list[Tensor | None]) -> Iterator[list[Mapping[str, Any]]]:
    """Yields the outputs of each pass of the model in this block; their attention masks go to `masks`."""
    outputs: list[Mapping[str, Any]] = []
    returned: list[object] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Mapping[str, Any]) -> None:
        # A loss that shortens embeddings returns one output several times, and writes to it.
        if not any(output is earlier for earlier in returned):
            returned.append(output)
            outputs.append(dict(output))
            masks.append(args[0].get("attention_mask"))

    handle = model.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()
