"""Frameworks that need no file of their own, or that are refused: SetFit, vision models, Opacus."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_tools import ON, encoder, sentences
from torch import nn
from trainer_tools import BETA, LAMBDA, MU, RATE, SEARCH, Rows, arguments, averages, farthest, row_noise, weights

from smartreg import MomentumBregman, SmartLoss
from smartreg.integrations.sentence_transformers import SmartLossModifier
from smartreg.integrations.transformers import SmartTrainer, SmartTrainingArguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:(accelerate|transformers|sentence_trans).*"),
    pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch:smartreg.SmartWarning"),
]
STEPS = 3


# SetFit: the loss around a loss, and its callback, in the trainer of another package


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_setfit_moves_the_teacher_at_every_step(tmp_path: Path) -> None:
    import setfit
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from sklearn.linear_model import LogisticRegression

    body = encoder(tmp_path / "encoder").float()
    start = weights(body)
    loss = SmartLossModifier(body, CosineSimilarityLoss(body), **ON)
    arguments_of_setfit = setfit.TrainingArguments(
        output_dir=str(tmp_path), batch_size=4, num_iterations=2, loss=lambda *_, **__: loss, report_to="none",
        save_strategy="no",
    )  # fmt: skip
    trainer = setfit.Trainer(
        model=setfit.SetFitModel(model_body=body, model_head=LogisticRegression(), labels=[0, 1]),
        args=arguments_of_setfit,
        train_dataset=Dataset.from_dict({"text": sentences(1), "label": [0, 1] * 4}),
        callbacks=[loss.callback],
    )
    trainer.train()
    steps, bregman = trainer.st_trainer.state.global_step, loss.regularizers.bregman
    assert steps == bregman.updates == 8
    assert loss.regularizers.smart.stats.penalty > 1e-6
    assert farthest(weights(body), start) > 1e-6
    assert 0 < farthest(weights(bregman.teacher), weights(body)) < farthest(weights(body), start)


# Pixels: the layer whose output is perturbed is named


def pictures() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(3, (8,), generator=generator)}


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=8, patch_size=4, **sizes, num_labels=3, initializer_range=0.3)
    return transformers.ViTForImageClassification(config).double()


@pytest.mark.parametrize("size", [8, 3])
def test_a_vision_model_trains_as_in_the_loop_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    forward = SmartLoss.forward
    monkeypatch.setattr(SmartLoss, "forward", lambda self, *a, **k: forward(self, *a, **{"noise": row_noise, **k}))
    model, batch, embedding = vit(), pictures(), "vit.embeddings.patch_embeddings"
    mine = copy.deepcopy(model)
    smart, bregman = SmartLoss(model, embedding=embedding, **SEARCH), MomentumBregman(model, beta=BETA)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model.train()
    for _ in range(STEPS):
        outputs, penalty = smart(lambda m: m(**batch))
        proximal = bregman(lambda m: m(**batch), outputs)
        optimizer.zero_grad()
        (outputs.loss + LAMBDA * penalty + MU * proximal).backward()
        optimizer.step()
        bregman.update()
    assert penalty > 1e-6
    assert proximal > 1e-9

    options: dict[str, Any] = {"smart_lambda": LAMBDA, "bregman_mu": MU, "bregman_beta": BETA}
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-8 // size)}
    made = arguments(tmp_path, SmartTrainingArguments, **options, **cut, remove_unused_columns=False)
    trainer = SmartTrainer(mine, made, train_dataset=Rows(batch), smart_options={**SEARCH, "embedding": embedding})
    trainer.train()
    assert farthest(weights(mine), weights(model)) < 1e-9
    assert farthest(averages(trainer.regularizers.bregman), averages(bregman)) < 1e-9


# Opacus


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids).mean(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_opacus_is_refused_by_name() -> None:
    import opacus

    torch.manual_seed(0)
    private = opacus.GradSampleModule(Classifier())
    with pytest.raises(RuntimeError, match="SmartLoss cannot run inside of Opacus, got GradSampleModule"):
        SmartLoss(private, embedding="_module.embedding")
    around = nn.Sequential(private)
    with pytest.raises(RuntimeError, match="SmartLoss cannot run inside of Opacus, got Sequential"):
        SmartLoss(around, embedding="0._module.embedding")
    plain = private.to_standard_module()
    assert SmartLoss(plain, embedding="embedding")(lambda m: m(torch.tensor([[1, 2]]))).penalty > 0
