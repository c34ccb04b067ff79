"""sentence-transformers with SMART, against the loop that a person would write."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
import transformers
from datasets import Dataset, DatasetDict
from sentence_tools import ON, Cosine, by_hand, checkpoint, data, encoder, sentences, trainer_of
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn
from trainer_tools import SEARCH, arguments, averages, farthest, weights

from smartreg import suggested_beta
from smartreg.integrations.sentence_transformers import SmartLossModifier

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
STEPS = 3


def forwards(model: nn.Module) -> list[bool]:
    """Grows by whether the model is in training, at each of its calls, and at those of its copies."""
    calls: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    return calls


# (b), (h)


@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize(("compare", "size"), [("embeddings", 8), ("embeddings", 2), ("cosine", 4)])
def test_three_steps_are_those_of_the_loop_by_hand(tmp_path: Path, compare: str, size: int) -> None:
    hand, mine, plain = (encoder(tmp_path / "encoder") for _ in range(3))
    teacher = by_hand(hand, STEPS, cosine=compare == "cosine")
    loss = SmartLossModifier(mine, Cosine(mine), compare=compare, **ON)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    trainer_of(tmp_path, loss, **cut).train()
    assert loss.regularizers.bregman.updates == STEPS
    assert farthest(weights(mine), weights(hand)) < 1e-9
    assert farthest(averages(loss.regularizers.bregman), averages(teacher)) < 1e-9
    trainer_of(tmp_path, Cosine(plain), per_device_train_batch_size=8).train()
    assert farthest(weights(plain), weights(hand)) > 1e-4


# (a)


def test_weights_of_0_are_the_loss_itself(tmp_path: Path) -> None:
    mine, stock = (encoder(tmp_path / "encoder", dropout=0.2) for _ in range(2))
    calls = forwards(mine)
    trainer_of(tmp_path, Cosine(stock), per_device_train_batch_size=4).train()
    loss = SmartLossModifier(mine, Cosine(mine), smart_lambda=0.0, bregman_mu=0.0)
    trainer_of(tmp_path, loss, per_device_train_batch_size=4).train()
    assert farthest(weights(mine), weights(stock)) == 0.0
    assert len(calls) == 2 * 2 * STEPS  # columns, batches


# (d)


class Interrupted(transformers.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, *more: Any, resume: str | None = None, **options: Any) -> Any:
        model = encoder(tmp_path / "encoder", dropout=0.2)
        search = {**SEARCH, "generator": torch.Generator().manual_seed(3)}
        loss = SmartLossModifier(model, Cosine(model), **{**ON, "smart_options": search})
        options |= {"num_train_epochs": 2, "per_device_train_batch_size": 2}
        trainer_of(tmp_path / folder, loss, callbacks=[loss.callback, *more], **options).train(
            resume_from_checkpoint=resume
        )
        return loss

    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = run("whole")
    run("parts", Interrupted(), **saving)
    resumed = run("parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **saving)
    assert resumed.regularizers.bregman.updates == whole.regularizers.bregman.updates == 8
    assert farthest(weights(resumed.model), weights(whole.model)) == 0.0
    assert farthest(averages(resumed.regularizers.bregman), averages(whole.regularizers.bregman)) == 0.0
    (tmp_path / "parts" / "checkpoint-3" / "smartreg.safetensors").unlink()
    words = r"cannot resume: .*smartreg\.safetensors is missing, .* or it was saved with save_only_model"
    with pytest.raises(FileNotFoundError, match=words):
        run("parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **saving)


def test_two_losses_resume_with_a_teacher_each(tmp_path: Path) -> None:
    def run(folder: str, *more: Any, resume: str | None = None) -> list[SmartLossModifier]:
        model = encoder(tmp_path / "encoder")
        losses = {}
        for seed, (name, beta) in enumerate({"one": 0.9, "two": 0.1}.items()):
            search = {**SEARCH, "generator": torch.Generator().manual_seed(seed)}
            options = {"smart_options": search, "bregman_options": {"beta": beta}}
            losses[name] = SmartLossModifier(model, Cosine(model), **{**ON, **options})
        kind = sentence_transformers.SentenceTransformerTrainingArguments
        saving = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4, "num_train_epochs": 2}
        sentence_transformers.SentenceTransformerTrainer(
            model,
            arguments(tmp_path / folder, kind, **saving),
            train_dataset=DatasetDict({name: data() for name in losses}),
            loss=losses,
            callbacks=[*(loss.callback for loss in losses.values()), *more],
        ).train(resume_from_checkpoint=resume)
        return list(losses.values())

    whole = run("whole")
    run("parts", Interrupted())
    resumed = run("parts", resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert farthest(*(averages(loss.regularizers.bregman) for loss in whole)) > 1e-3
    assert farthest(weights(resumed[0].model), weights(whole[0].model)) == 0.0
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine.regularizers.bregman.updates == theirs.regularizers.bregman.updates == 8
        assert farthest(averages(mine.regularizers.bregman), averages(theirs.regularizers.bregman)) == 0.0


# (e)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_the_first_proximal_term_is_0_and_the_components_are_logged(tmp_path: Path, precision: dict[str, bool]) -> None:
    model = encoder(tmp_path / "encoder").float()
    loss = SmartLossModifier(model, Cosine(model), **ON)
    options = {"logging_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 8, **precision}
    trainer = trainer_of(tmp_path, loss, **options)
    trainer.train()
    first, *others = [line for line in trainer.state.log_history if "loss" in line]
    assert first["bregman_term"] == 0.0
    assert len(others) == 2
    assert all(line["bregman_term"] > 1e-6 for line in others)
    assert all(line["smart_term"] > 1e-6 for line in (first, *others))
    for line in (first, *others):  # the components are rounded to four digits
        parts = line["base_loss"] + line["smart_term"] + line["bregman_term"]
        assert line["loss"] == pytest.approx(parts, abs=2e-4)


# (f)


def test_evaluation_is_that_of_the_loss(tmp_path: Path) -> None:
    model = encoder(tmp_path / "encoder", dropout=0.2)
    loss = SmartLossModifier(model, Cosine(model), **ON)
    trainer = trainer_of(tmp_path, loss, per_device_train_batch_size=8)
    trainer.train()
    before, average, calls = weights(model), averages(loss.regularizers.bregman), forwards(model)
    found = trainer.evaluate()
    assert calls == [False, False]
    assert trainer_of(tmp_path, Cosine(model)).evaluate()["eval_loss"] == found["eval_loss"]
    assert not any("term" in name for name in found)
    assert farthest(weights(model), before) == farthest(averages(loss.regularizers.bregman), average) == 0.0


# (g)


class Overflow(transformers.TrainerCallback):
    """Puts an infinity into the gradients of the second step, and notes what each step left."""

    def __init__(self, loss: SmartLossModifier, seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
        self.loss, self.seen = loss, seen

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step == 1:
            next(model.parameters()).grad[0] = torch.inf

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.seen.append((weights(model), averages(self.loss.regularizers.bregman)))


def test_a_step_that_the_scaler_skips_moves_no_teacher(tmp_path: Path) -> None:
    model = encoder(tmp_path / "encoder")
    loss, seen = SmartLossModifier(model, Cosine(model), **ON), []
    trainer = trainer_of(tmp_path, loss, callbacks=[loss.callback, Overflow(loss, seen)], per_device_train_batch_size=8)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # as fp16=True makes one on a GPU
    trainer.train()
    (one, teacher_one), (two, teacher_two), (three, teacher_three) = seen
    assert farthest(one, two) == farthest(teacher_one, teacher_two) == 0.0
    assert farthest(two, three) > 1e-3
    assert farthest(teacher_two, teacher_three) > 1e-4
    assert loss.regularizers.bregman.updates == STEPS - 1


# (c)


@pytest.mark.usefixtures("row_start")
def test_two_ranks_are_the_loop_by_hand(tmp_path: Path) -> None:
    checkpoint(tmp_path / "encoder")
    script = Path(__file__).parent.parent / "sentence_tools.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    hand = encoder(tmp_path / "encoder")
    teacher = by_hand(hand, STEPS)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert farthest(found["weights"], weights(hand)) < 1e-9
        assert farthest(found["averages"], averages(teacher)) < 1e-9


# Other losses and models


def trained(tmp_path: Path, model: Any, inner: nn.Module, train: Dataset) -> SmartLossModifier:
    loss = SmartLossModifier(model, inner, **ON)
    trainer_of(tmp_path, loss, train, per_device_train_batch_size=8).train()
    assert loss.regularizers.bregman.updates == STEPS
    assert loss.regularizers.smart.stats.penalty > 1e-6
    return loss


def test_merged_columns_and_modifiers_of_the_loss(tmp_path: Path) -> None:
    model = encoder(tmp_path / "encoder").float()
    columns = Dataset.from_dict({f"column{i}": sentences(i) for i in range(4)})
    shapes: list[tuple[int, ...]] = []
    model[0].model.get_input_embeddings().register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    trained(tmp_path, model, MultipleNegativesRankingLoss(model), columns)
    assert {shape[0] for shape in shapes} == {8, 24}  # the anchors alone, and three columns in one
    trained(tmp_path, model, MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [16, 8]), columns)
    with pytest.raises(ValueError, match="CachedMultipleNegativesRankingLoss runs the model again in its backward"):
        SmartLossModifier(model, CachedMultipleNegativesRankingLoss(model))


def test_a_cross_encoder_compares_its_scores(tmp_path: Path) -> None:
    model = sentence_transformers.CrossEncoder(str(checkpoint(tmp_path / "scores", scores=True)), device="cpu")
    loss = SmartLossModifier(model, BinaryCrossEntropyLoss(model), **ON)
    made = arguments(tmp_path, sentence_transformers.CrossEncoderTrainingArguments, per_device_train_batch_size=8)
    sentence_transformers.CrossEncoderTrainer(
        model, made, train_dataset=data(), loss=loss, callbacks=[loss.callback]
    ).train()
    assert loss.regularizers.bregman.updates == STEPS
    assert loss.regularizers.bregman.divergence.__name__ == "binary_symmetric_kl"
    assert loss.regularizers.smart.stats.penalty > 1e-6


def test_a_model_without_a_transformer_inside_has_to_be_told(tmp_path: Path) -> None:
    tokenizer = transformers.BertTokenizerFast.from_pretrained(checkpoint(tmp_path / "encoder")).backend_tokenizer
    torch.manual_seed(0)
    static = StaticEmbedding(tokenizer, embedding_dim=8)
    model = sentence_transformers.SentenceTransformer(modules=[static], device="cpu").double()
    with pytest.raises(ValueError, match="has no transformer inside whose embedding could be perturbed: pass"):
        trained(tmp_path, model, Cosine(model), data())


def test_the_teacher_has_the_momentum_of_the_run(tmp_path: Path) -> None:
    model = encoder(tmp_path / "encoder")
    loss = SmartLossModifier(model, Cosine(model), **ON | {"bregman_options": {}})
    trainer_of(tmp_path / "run", loss, max_steps=30).train()
    assert loss.regularizers.bregman.updates == 30
    assert loss.regularizers.bregman.beta == suggested_beta(30)


def test_a_trainer_without_the_callback_is_an_error(tmp_path: Path) -> None:
    model = encoder(tmp_path / "encoder")
    loss = SmartLossModifier(model, Cosine(model), **ON)
    with pytest.raises(
        RuntimeError, match=r"nothing would count steps or move a teacher: give the trainer callbacks=\[loss.callback\]"
    ):
        trainer_of(tmp_path, loss, callbacks=[]).train()
    with pytest.raises(ValueError, match=r"compare must be one of .*, got 'cosines'"):
        SmartLossModifier(model, Cosine(model), compare="cosines")
    assert copy.deepcopy(loss).get_config_dict()["smart_lambda"] == ON["smart_lambda"]
