"""The losses of sentence-transformers in a `SmartLossModifier`: which work, with what weight, and which are refused."""

from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
import transformers
from datasets import Dataset
from sentence_tools import ON, WORDS, Cosine, checkpoint, data, encoder, sentences, trainer_of
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, LambdaLoss
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from tiny_transformers import _ENCODER
from torch import Tensor, nn
from torch.nn import functional
from trainer_tools import arguments, farthest, weights

from smartreg import SmartWarning
from smartreg.integrations.sentence_transformers import SmartLossModifier

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
HARDLY = {"smart_lambda": 1e-9}  # the loss runs as it always does, and its weights are those of the loss alone
PAIRS = Dataset.from_dict({"first": sentences(1), "second": sentences(2)})
SINGLE = Dataset.from_dict({"text": sentences(1), "label": [0, 0, 0, 0, 1, 1, 1, 1]})


def run(
    folder: Path, kind: str, model: Any, loss: nn.Module, train: Dataset, more: tuple[Any, ...] = (), **options: Any
) -> Any:
    """The trainer after its run; `kind` is what the names of the trainer and of its arguments begin with."""
    made = arguments(folder, getattr(sentence_transformers, f"{kind}TrainingArguments"), **options)
    callbacks = [loss.callback, *more] if isinstance(loss, SmartLossModifier) else [*more]
    kind_of_trainer = getattr(sentence_transformers, f"{kind}Trainer")
    trainer = kind_of_trainer(model, made, train_dataset=train, loss=loss, callbacks=callbacks)
    trainer.train()
    return trainer


# Cross-encoders


class WithoutOptions(nn.Module):
    """A loss of a user's own, as the trainer has always called it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, columns: list[list[str]], labels: Tensor) -> Tensor:
        pairs = list(zip(*columns, strict=True))
        return functional.mse_loss(self.model(self.model.preprocess(pairs))["scores"].view(-1), labels.float())


@pytest.mark.parametrize("loss_of", [BinaryCrossEntropyLoss, WithoutOptions])
def test_a_cross_encoder_trains_on_the_prompts_that_the_loss_alone_has(tmp_path: Path, loss_of: Any) -> None:
    def trained(modified: bool, prompts: str | None) -> dict[str, Tensor]:
        folder = checkpoint(tmp_path / "scores", scores=True)
        model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
        loss = SmartLossModifier(model, loss_of(model), **HARDLY) if modified else loss_of(model)
        run(tmp_path, "CrossEncoder", model, loss, data(), max_steps=2, prompts=prompts)
        return weights(model)

    alone = trained(False, "red green blue: ")
    assert farthest(trained(True, "red green blue: "), alone) < 1e-6
    changed = farthest(trained(False, None), alone)
    assert changed > 1e-3 if loss_of is BinaryCrossEntropyLoss else changed == 0.0


def test_the_size_of_the_forwards_does_not_change_the_weight(tmp_path: Path) -> None:
    documents = [sentences(10 + row, 3) for row in range(4)]
    lists = Dataset.from_dict({"query": sentences(1, 4), "docs": documents, "labels": [[1.0, 0.0, 0.0]] * 4})

    def terms(size: int | None) -> list[float]:
        model = sentence_transformers.CrossEncoder(str(checkpoint(tmp_path / "scores", scores=True)), device="cpu")
        torch.manual_seed(0)
        options = {"smart_lambda": 0.5, "bregman_mu": 1.0, "bregman_options": {"beta": 0.5}}
        loss = SmartLossModifier(model, LambdaLoss(model, mini_batch_size=size), **options)
        logs = {"logging_strategy": "steps", "logging_steps": 2}
        trainer = run(tmp_path, "CrossEncoder", model, loss, lists, max_steps=2, **logs)
        line = trainer.state.log_history[0]
        return [line["smart_term"], line["bregman_term"]]

    at_once = terms(12)
    assert min(at_once) > 1e-2
    for size in (None, 5, 1):
        assert terms(size) == pytest.approx(at_once, rel=0.02)  # the start is drawn by forwards, the log rounds


# The weights of Splade


def sparse(folder: Path) -> tuple[Any, SpladeLoss]:
    checkpoint(folder)
    torch.manual_seed(0)
    still = {"attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**{**_ENCODER, "vocab_size": len(WORDS) + 5}, hidden_dropout_prob=0.0, **still)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    model = sentence_transformers.SparseEncoder(str(folder), device="cpu")
    inner = SparseMultipleNegativesRankingLoss(model)
    return model, SpladeLoss(model, inner, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3)


def test_splade_without_its_schedule_is_a_warning(tmp_path: Path) -> None:
    model, inner = sparse(tmp_path / "sparse")
    words = r"SpladeLoss trains at its full weights from the first step on: .*SpladeRegularizerWeightSchedulerCallback"
    with pytest.warns(SmartWarning, match=words):
        run(tmp_path, "SparseEncoder", model, SmartLossModifier(model, inner, **HARDLY), PAIRS, max_steps=1)


def test_splade_with_its_schedule_is_the_loss_alone(tmp_path: Path) -> None:
    model, inner = sparse(tmp_path / "sparse")
    schedule = SpladeRegularizerWeightSchedulerCallback(loss=inner)
    run(tmp_path, "SparseEncoder", model, SmartLossModifier(model, inner, **HARDLY), PAIRS, (schedule,), max_steps=6)
    alone, inner = sparse(tmp_path / "sparse")
    run(tmp_path, "SparseEncoder", alone, inner, PAIRS, max_steps=6)
    assert farthest(weights(model), weights(alone)) < 1e-5


# Sentence encoders


@pytest.mark.parametrize(
    ("loss_of", "train"),
    [
        (losses.BatchAllTripletLoss, SINGLE),
        (losses.BatchHardTripletLoss, SINGLE),
        (losses.ContrastiveTensionLoss, PAIRS),
        (Cosine, data()),
    ],
)
def test_the_model_is_found_under_any_name(tmp_path: Path, loss_of: Any, train: Dataset) -> None:
    model = encoder(tmp_path / "encoder").float()
    loss = SmartLossModifier(model, loss_of(model), **ON)
    trainer_of(tmp_path, loss, train).train()
    assert loss.regularizers.smart.stats.penalty > 1e-9
    assert float(loss.regularizers.means()["bregman_penalty"]) > 1e-9


@pytest.mark.parametrize("strength", [HARDLY, {"smart_lambda": 0.0, "bregman_mu": 1.0}])
def test_a_model_of_one_embedding_a_token_is_an_error(tmp_path: Path, strength: dict[str, float]) -> None:
    model = sentence_transformers.MultiVectorEncoder(str(checkpoint(tmp_path / "tokens")), device="cpu")
    loss = SmartLossModifier(model, MultiVectorMultipleNegativesRankingLoss(model), **strength)
    with pytest.raises(ValueError, match="the MultiVectorEncoder must give a sentence_embedding or scores to compare"):
        run(tmp_path, "MultiVectorEncoder", model, loss, PAIRS)


@pytest.mark.parametrize("name", ["AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_a_loss_of_single_layers_is_refused(tmp_path: Path, name: str) -> None:
    model = encoder(tmp_path / "encoder").float()
    inner = losses.CoSENTLoss(model)
    kind = getattr(losses, name)
    with pytest.raises(ValueError, match=f"{name} runs parts of the model on the layers of an earlier pass, "):
        SmartLossModifier(model, kind(model, inner, [16, 8]) if name == "Matryoshka2dLoss" else kind(model, inner))


@pytest.mark.parametrize(
    ("loss_of", "train"), [(losses.BatchAllTripletLoss, SINGLE), (losses.ContrastiveTensionLoss, PAIRS)]
)
def test_the_cosine_of_one_column_is_an_error(tmp_path: Path, loss_of: Any, train: Dataset) -> None:
    model = encoder(tmp_path / "encoder").float()
    loss = SmartLossModifier(model, loss_of(model), compare="cosine")
    with pytest.raises(
        ValueError, match="compare='cosine' needs an embedding of each text in two or more columns, got 8 embeddings"
    ):
        trainer_of(tmp_path, loss, train, per_device_train_batch_size=8).train()
