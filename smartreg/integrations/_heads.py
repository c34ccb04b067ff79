"""What to compare of a Hugging Face model, where, and by which divergence: told by its class and its labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smartreg import token_mask
from smartreg._masks import Masks
from smartreg._outputs import OutputToLogits
from smartreg.divergences import Divergence, Kind, kind_of, name_of, resolve_divergence

# How the names of transformers' classes with a head end.
_SEQUENCE = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")
_CAUSAL = ("CausalLM", "LMHeadModel")
_SEQ2SEQ = ("ConditionalGeneration", "MTModel")
_UNSHIFTED = (
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM"),
    *("CpmAntForCausalLM", "MarianForCausalLM", "MBartForCausalLM", "MvpForCausalLM", "PegasusForCausalLM"),
    *("PLBartForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM", "XLNetLMHeadModel"),
)
"""Called causal, but with a loss in which the logits at a token are those of its own label."""


@dataclass(frozen=True)
class Head:
    """What the outputs of a model mean.

    Attributes:
        name: For the log.
        divergence: ℓ_s, a name or a function.
        output_to_logits: See `SmartLoss`.
        tokens: There is a label for each token, and positions without one are not compared.
        shift: The logits at a token predict the label of the next one.
    """

    name: str
    divergence: str | Divergence
    output_to_logits: OutputToLogits | None = None
    tokens: bool = False
    shift: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `SmartLoss` and `MomentumBregman`."""
        return {"divergence": self.divergence, "output_to_logits": self.output_to_logits}

    def output_mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which positions of the output are compared.

        Raises:
            ValueError: The batch has no labels to tell them.
        """
        if not self.tokens:
            return None
        if isinstance(inputs.get("shift_labels"), Tensor):  # made by collators that flatten a batch
            return token_mask(inputs["shift_labels"])
        if not isinstance(inputs.get("labels"), Tensor):
            raise ValueError(
                f"{self.name} is compared where there are labels, got a batch of {', '.join(inputs) or 'nothing'}: "
                f"let the collator add labels"
            )
        return token_mask(inputs["labels"], shift=self.shift)

    def __str__(self) -> str:
        where = "" if not self.tokens else ", at every token with a label"
        return f"{self.name}: {name_of(resolve_divergence(self.divergence))}{where}"


def infer_head(
    model: nn.Module,
    labels: object = None,
    *,
    divergence: str | Divergence | None = None,
    output_to_logits: OutputToLogits | None = None,
) -> Head:
    """The head of a model, by the rules of transformers itself.

    Args:
        model: The model without wrappers; PEFT may be around it.
        labels: Those of a batch, whose dtype tells one label from several, as in transformers.
        divergence: Given by the user; None takes what belongs to the head.
        output_to_logits: Given by the user; None takes what belongs to the head.

    Raises:
        ValueError: The class is none of those known and there is no divergence, or the divergence is one for another
            kind of head.
    """
    inner = base_model(model)
    head = _known(inner, labels)
    if head is None:
        if divergence is None:
            raise ValueError(
                f"cannot tell from the class {type(inner).__name__} what its outputs are: pass divergence= (and "
                f"output_to_logits= where they are not in .logits), or override smart_head"
            )
        if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim > 1:
            raise ValueError(
                f"cannot tell from the class {type(inner).__name__} how its labels of shape {tuple(labels.shape)} "
                f"belong to its outputs: override smart_head, and say whether it is a label a token, and shifted"
            )
        return Head("the outputs", divergence, output_to_logits)
    if divergence is not None:
        _refuse_other_kind(head, inner, divergence)
        head = replace(head, divergence=divergence)
    return head if output_to_logits is None else replace(head, output_to_logits=output_to_logits)


def _known(model: nn.Module, labels: object) -> Head | None:
    names = [cls.__name__ for cls in type(model).__mro__]

    def ends(*endings: str) -> bool:
        return any(name.endswith(endings) for name in names)

    config = getattr(model, "config", None)
    if ends(*_SEQUENCE):
        return _classification(config, labels)
    if ends("TokenClassification"):
        return Head("token classification", "symmetric_kl", tokens=True)
    if ends("MultipleChoice"):
        return Head("multiple choice", "symmetric_kl")
    if ends("QuestionAnswering"):
        return Head("question answering, start and end", "symmetric_kl", start_and_end)
    if ends("MaskedLM", "WithLMHeadModel"):  # XLM and Flaubert call theirs so
        return Head("masked language modelling", "symmetric_kl", tokens=True)
    if ends(*_SEQ2SEQ) and getattr(config, "is_encoder_decoder", False):
        return Head("sequence to sequence", "symmetric_kl", tokens=True)
    if ends(*_CAUSAL, *_SEQ2SEQ):
        return Head("causal language modelling", "symmetric_kl", tokens=True, shift=not ends(*_UNSHIFTED))
    return None


def _classification(config: Any, labels: object) -> Head:
    problem = getattr(config, "problem_type", None)
    if problem is None and getattr(config, "num_labels", None) == 1:
        problem = "regression"
    if problem is None and isinstance(labels, Tensor):
        whole = labels.dtype in (torch.long, torch.int) and (labels.ndim < 2 or labels.shape[-1] == 1)
        problem = "single_label_classification" if whole else "multi_label_classification"
    if problem == "regression":
        return Head("regression", "mse")
    if problem == "multi_label_classification":
        return Head("classification with several labels", "binary_symmetric_kl")
    return Head("classification with one label", "symmetric_kl")


def _refuse_other_kind(head: Head, model: nn.Module, divergence: str | Divergence) -> None:
    """Raises a `ValueError` for a softmax over what are no classes, and the like. Squared error fits any output."""
    right: Kind | None = kind_of(resolve_divergence(head.divergence))
    given = kind_of(resolve_divergence(divergence))
    if given not in (None, "value", right):
        raise ValueError(
            f"divergence={name_of(resolve_divergence(divergence))!r} compares {given} outputs, but "
            f"{type(model).__name__} does {head.name}: expected {name_of(resolve_divergence(head.divergence))!r}, "
            f"which is taken if you leave divergence out"
        )


def start_and_end(output: Any) -> tuple[Tensor, Tensor]:
    """The two logits of question answering."""
    return output.start_logits, output.end_logits


def look_up_masks(model: nn.Module, head: Head, inputs: Mapping[str, Any]) -> Masks:
    """`mask` for `SmartLoss`: real tokens, of the encoder and, if there is one, of the decoder.

    A decoder that is given no inputs of its own takes the labels (or, to classify, the inputs of the encoder) shifted
    to the right. Real is what an output with a label is made from: the last token before the padding leads to none, and
    would be there in rows alone that another one is longer than.
    """
    mask = inputs.get("attention_mask")
    if not getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False):
        # A choice of several is one sequence more to the embedding.
        return mask.flatten(0, -2) if isinstance(mask, Tensor) and mask.ndim == 3 else mask
    decoder = inputs.get("decoder_attention_mask")
    if decoder is None:
        decoder = token_mask(inputs["labels"]) if head.tokens and "labels" in inputs else mask
    # Sounds, and embeddings that are given, are not looked up.
    return [mask, decoder] if "input_ids" in inputs else decoder


def look_up_examples(inputs: Mapping[str, Any]) -> Tensor | None:
    """`example_ids` for `SmartLoss`, where a collator has put several sequences into one row; None where a row is one.

    Such rows have no attention mask, and their positions begin anew with each sequence.
    """
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or inputs.get("attention_mask") is not None:
        return None
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return begins.flatten().cumsum(0).view_as(positions)


def base_model(model: nn.Module) -> nn.Module:
    """The model inside of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # PEFT's
