"""The Hugging Face trainers with SMART, against the loop that a person would write."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from trainer_tools import (
    BETA,
    CASES,
    LAMBDA,
    MU,
    SEARCH,
    Interrupted,
    Overflow,
    Rows,
    arguments,
    averages,
    batch_of,
    by_hand,
    farthest,
    forwards,
    weights,
)

from smartreg import SmartWarning, suggested_beta
from smartreg.integrations import _checkpoint
from smartreg.integrations._heads import Head, infer_head, look_up_masks
from smartreg.integrations._regularizers import Regularizers, Strength
from smartreg.integrations.transformers import (
    SmartSeq2SeqTrainer,
    SmartSeq2SeqTrainingArguments,
    SmartTrainer,
    SmartTrainerMixin,
    SmartTrainingArguments,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:(accelerate|transformers|peft).*"),
    # What the classification and token heads of BERT do is asserted once, by name.
    pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch:smartreg.SmartWarning"),
]
ON = {"smart_lambda": LAMBDA, "bregman_mu": MU, "bregman_beta": BETA}
OFF = {"smart_lambda": 0.0, "bregman_mu": 0.0}
STEPS = 3


def trainer_of(
    folder: Path, name: str, model: nn.Module | None = None, *, stock: bool = False, batch: Any = None, **options: Any
) -> Any:
    """A trainer for one of the cases; fields of the arguments and arguments of the trainer by name."""
    model = CASES[name].model() if model is None else model
    own = {k: options.pop(k) for k in ("divergence", "smart_options", "bregman_options") if k in options}
    mine = {k: options.pop(k) for k in ("compute_loss_func", "model_init", "optimizers") if k in options}
    train = Rows(batch_of(name) if batch is None else batch)
    if stock:
        made = arguments(folder, transformers.TrainingArguments, **options)
        return transformers.Trainer(model, made, train_dataset=train, eval_dataset=train, **mine)
    made = arguments(folder, SmartTrainingArguments, **{**ON, **options})
    own["smart_options"] = {**SEARCH, **own.get("smart_options", {})}
    model = None if "model_init" in mine else model
    return SmartTrainer(model, made, train_dataset=train, eval_dataset=train, **own, **mine)


def trained(*args: Any, **options: Any) -> Any:
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


# One large batch, and (h) what is there without the integration

CUTS = [(name, 3, 3) for name in CASES if name != "question answering"]  # 3, 3 and 2 rows
CUTS += [("question answering", 2, 4), ("one label", 8, 1), ("tokens", 2, 4)]


@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize(("name", "size", "accumulated"), CUTS)
def test_three_steps_are_those_of_the_loop_by_hand(tmp_path: Path, name: str, size: int, accumulated: int) -> None:
    model = CASES[name].model()
    mine, without, start = copy.deepcopy(model), copy.deepcopy(model), weights(model)
    teacher = by_hand(name, model, batch_of(name), STEPS)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    trainer = trained(tmp_path, name, mine, **cut)

    assert trainer.state.global_step == STEPS
    assert farthest(weights(model), start) > 1e-3
    # The causal losses of transformers compute in float32, and so do the norms of Llama and T5.
    tolerance = {"causal, GPT-2": 1e-6, "causal, Llama": 1e-5, "sequence to sequence": 1e-8}.get(name, 1e-9)
    assert farthest(weights(mine), weights(model)) < tolerance
    assert farthest(averages(trainer.regularizers.bregman), averages(teacher)) < tolerance
    trained(tmp_path, name, without, stock=True, per_device_train_batch_size=8)
    assert farthest(weights(without), weights(model)) > 1e-4


def in_double(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    count = labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return functional.cross_entropy(logits, targets, reduction="sum") / count


@pytest.mark.usefixtures("row_start")
def test_a_causal_loss_in_float64_by_a_function_of_the_users_own(tmp_path: Path) -> None:
    name = "causal, GPT-2"
    model, share = CASES[name].model(), CASES[name].share
    mine = copy.deepcopy(model)
    by_hand(name, model, batch_of(name), STEPS, task=lambda out, b: share(b) * in_double(out, b["labels"]))
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    trained(tmp_path, name, mine, compute_loss_func=in_double, **cut)
    assert farthest(weights(mine), weights(model)) < 1e-9


@pytest.mark.usefixtures("row_start")
def test_rows_that_a_collator_flattens_are_examples_each(tmp_path: Path) -> None:
    name = "causal, GPT-2"
    model, batch = CASES[name].model(), batch_of(name)
    batch["labels"][:, 0] = -100  # as the collator has it
    mine, lengths = copy.deepcopy(model), batch["attention_mask"].sum(1).tolist()
    by_hand(name, model, batch, STEPS, task=lambda out, b: in_double(out, b["labels"]))
    rows = [{key: batch[key][i, :n].tolist() for key in ("input_ids", "labels")} for i, n in enumerate(lengths)]
    made = arguments(tmp_path, SmartTrainingArguments, **ON, per_device_train_batch_size=8)
    flattened = {"data_collator": transformers.DataCollatorWithFlattening(), "compute_loss_func": in_double}
    SmartTrainer(mine, made, train_dataset=rows, smart_options=SEARCH, **flattened).train()
    assert farthest(weights(mine), weights(model)) < 1e-9


@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize("name", ["one label", "tokens"])
def test_label_smoothing_is_that_of_the_parent(tmp_path: Path, name: str) -> None:
    model = CASES[name].model()
    mine, rows_of = copy.deepcopy(model), (lambda logits: logits.flatten(0, -2))

    def smoothed(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(rows_of(outputs.logits), batch["labels"].flatten(), label_smoothing=0.2)

    by_hand(name, model, batch_of(name), STEPS, task=smoothed)
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    trained(tmp_path, name, mine, label_smoothing_factor=0.2, **cut)
    assert farthest(weights(mine), weights(model)) < 1e-6  # the smoother sums in float32


@pytest.mark.usefixtures("row_start")
def test_a_subclass_keeps_its_own_loss(tmp_path: Path) -> None:
    class Weighted(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = 5.0 * functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    class Mine(SmartTrainerMixin, Weighted):
        pass

    name = "one label"
    model = CASES[name].model()
    mine = copy.deepcopy(model)
    by_hand(name, model, batch_of(name), STEPS, task=lambda out, batch: 5.0 * CASES[name].task(out, batch))
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    made = arguments(tmp_path, SmartTrainingArguments, **ON, **cut)
    Mine(mine, made, train_dataset=Rows(batch_of(name)), smart_options=SEARCH).train()
    assert farthest(weights(mine), weights(model)) < 1e-9


CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}


def step_of(folder: Path, parent: type, *, stock: bool = False, **options: Any) -> dict[str, Tensor]:
    """How far a first step of accumulated batches moves each weight, with penalties too small to see."""
    kind = parent if stock else type("Mine", (SmartTrainerMixin, parent), {})
    tiny = {} if stock else {"smart_lambda": 1e-12}
    model = CASES["one label"].model()
    before = weights(model)
    made = arguments(folder, transformers.TrainingArguments if stock else SmartTrainingArguments, **tiny, **CUT)
    kind(model, made, train_dataset=Rows(batch_of("one label")), **options).train()
    return {name: after - before[name] for name, after in weights(model).items()}


class Divided(transformers.Trainer):
    """Divides by the number of accumulated batches itself, and says so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, labels) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


@pytest.mark.filterwarnings("error::smartreg.SmartWarning")
def test_a_loss_that_is_divided_already_is_not_divided_again(tmp_path: Path) -> None:
    stock = step_of(tmp_path, Divided, stock=True)
    assert farthest(step_of(tmp_path, Divided), stock) < 1e-9
    assert farthest(stock, {name: torch.zeros_like(moved) for name, moved in stock.items()}) > 1e-3


class Drawn(transformers.Trainer):
    """A mean over the batch with random weights, and a gradient in it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        each = functional.cross_entropy(outputs.logits, labels, reduction="none")
        loss = (each * torch.rand(len(labels), dtype=torch.float64)).mean()
        (slope,) = torch.autograd.grad(loss, outputs.logits, create_graph=True)
        loss = loss + 0.1 * slope.square().sum()
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_draws_and_differentiates_is_looked_at_as_any_other(tmp_path: Path) -> None:
    with pytest.warns(SmartWarning, match="of BertForSequenceClassification is a mean over each batch and ignores"):
        mine = step_of(tmp_path, Drawn)
    stock = step_of(tmp_path, Drawn, stock=True)  # too large by the number of batches, as the warning says
    assert farthest(mine, {name: moved / 4 for name, moved in stock.items()}) < 1e-9


def test_a_loss_of_the_users_own_that_passes_the_mixin_by_is_an_error(tmp_path: Path) -> None:
    class Own(SmartTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainers = [
        Own(CASES["one label"].model(), arguments(tmp_path, SmartTrainingArguments, **more), train_dataset=Rows(data))
        for data in [batch_of("one label")]
        for more in (ON, OFF)
    ]
    with pytest.raises(RuntimeError, match=r"a whole step of Own passed by SmartTrainerMixin\.compute_loss"):
        trainers[0].train()
    trainers[1].train()  # nothing was asked for


@pytest.mark.filterwarnings("error::smartreg.SmartWarning")
def test_a_loss_that_ignores_the_count_is_said(tmp_path: Path) -> None:
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.warns(SmartWarning, match="the task loss of BertForSequenceClassification is a mean over each batch"):
        trained(tmp_path, "one label", **cut)
    trained(tmp_path, "one label", per_device_train_batch_size=8)  # nothing to add up
    trained(tmp_path, "causal, GPT-2", **cut)  # divides by it


# (a) Weights of 0


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.2}, {"compute_loss_func": in_double}])
@pytest.mark.parametrize("name", ["one label", "causal, Llama"])
def test_weights_of_0_are_the_stock_trainer(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    if "compute_loss_func" in more and name == "one label":
        more = {"compute_loss_func": lambda out, labels, num_items_in_batch: out.logits.square().sum()}
    model = CASES[name].model(dropout=0.2)
    mine = copy.deepcopy(model)
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    calls, stock_calls = forwards(mine), forwards(model)
    trained(tmp_path, name, model, stock=True, **cut, **more)
    trainer = trained(tmp_path, name, mine, **cut, **more, **OFF)
    assert farthest(weights(mine), weights(model)) == 0.0
    assert len(calls) == len(stock_calls) == 9
    assert (trainer.regularizers.smart, trainer.regularizers.bregman) == (None, None)


def test_a_term_of_weight_0_costs_nothing(tmp_path: Path) -> None:
    """Calls a step: clean, ascent and perturbed pass of the student, one of the teacher, which is a copy."""
    found = {}
    for label, options in {
        "both": {},
        "smoothness": {"bregman_mu": 0.0},
        "proximal": {"smart_lambda": 0.0},
        "every other": {"bregman_mu": 0.0, "smart_every": 2},
        "warm-up": {"bregman_mu": 0.0, "smart_warmup_steps": 1},
    }.items():
        model = CASES["one label"].model()
        calls = forwards(model)  # of the teacher too: the copy has the hook
        trained(tmp_path, "one label", model, per_device_train_batch_size=8, max_steps=2, **options)
        found[label] = len(calls) / 2
    assert found == {"both": 4, "smoothness": 3, "proximal": 2, "every other": 2, "warm-up": 2}


# (d) Interrupted and resumed


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


RUNS = {
    "own generator": {"smart_options": {"generator": generator()}},
    "accumulated": {"gradient_accumulation_steps": 2},
    "every other": {"smart_every": 2, "smart_warmup_steps": 3},
    "memory-efficient": {"smart_memory_efficient": True},
}


@pytest.mark.parametrize("label", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, label: str) -> None:
    def run(folder: str, stop: bool = False, **options: Any) -> Any:
        more = {**RUNS[label], **options}
        if "smart_options" in more:
            more["smart_options"] = {"generator": generator()}
        model = CASES["one label"].model(dropout=0.2)
        trainer = trainer_of(tmp_path / folder, "one label", model, per_device_train_batch_size=2, **more)
        if stop:
            trainer.add_callback(Interrupted())
        return trainer

    saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    whole = run("whole", num_train_epochs=2)
    whole.train()
    first = run("parts", stop=True, **saving)
    first.train()
    second = run("parts", **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))

    assert first.state.global_step == 3 < whole.state.global_step == second.state.global_step
    assert second.regularizers.bregman.updates == whole.state.global_step
    assert farthest(weights(second.model), weights(whole.model)) == 0.0
    assert farthest(averages(second.regularizers.bregman), averages(whole.regularizers.bregman)) == 0.0
    assert not torch.equal(whole.regularizers.bregman.teacher.classifier.weight, whole.model.classifier.weight)


def test_a_checkpoint_without_a_teacher_is_an_error(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    checkpoint = str(tmp_path / "checkpoint-2")

    def resume(**options: Any) -> None:
        trainer_of(tmp_path, "one label", **saving, **options).train(resume_from_checkpoint=checkpoint)

    trained(tmp_path, "one label", bregman_mu=0.0, **saving)
    with pytest.raises(FileNotFoundError, match=r"cannot resume: .*smartreg\.safetensors is missing"):
        resume()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "generator"'):
        resume(bregman_mu=0.0, smart_options={"generator": generator()})
    trained(tmp_path, "one label", **saving)
    with pytest.raises(ValueError, match="the saved run had a teacher, and this one with bregman_mu=0 has none"):
        resume(bregman_mu=0.0)


# (e) The first proximal term


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_the_first_proximal_term_is_0_and_the_log_has_every_number(
    tmp_path: Path, precision: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "smartreg")
    options = {
        "logging_strategy": "steps",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "eval_strategy": "epoch",
    }
    trainer = trained(tmp_path, "one label", CASES["one label"].model().float(), **precision, **options)
    first, *others = [line for line in trainer.state.log_history if "loss" in line]
    assert first["bregman_penalty"] == 0.0
    assert len(others) == 2
    for line in others:
        assert line["bregman_penalty"] > 1e-6
    for line in (first, *others):
        assert line["smart_penalty"] > 1e-6
        assert line["smart_ascent_gain"] > 1
    for line in trainer.state.log_history:
        assert "loss" in line or not any(name.startswith(("smart", "bregman")) for name in line)
    said = [record.message for record in caplog.records if "SMART compares" in record.message]
    assert said == ["SMART compares classification with one label: symmetric_kl"]


def test_a_model_that_is_made_by_model_init_has_the_teacher_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        "one label",
        model_init=lambda: CASES["one label"].model(),
        per_device_train_batch_size=8,
        logging_strategy="steps",
        logging_steps=1,
    )
    for _ in range(2):
        trainer.train()
        first = next(line for line in trainer.state.log_history if "loss" in line)
        assert first["bregman_penalty"] == 0.0
        assert trainer.regularizers.bregman.updates == STEPS


# (f) Evaluation


def test_evaluation_is_that_of_the_stock_trainer(tmp_path: Path) -> None:
    model = CASES["one label"].model(dropout=0.2)
    trainer = trained(tmp_path, "one label", model, per_device_train_batch_size=4)
    before, average = weights(model), averages(trainer.regularizers.bregman)
    stock = trainer_of(tmp_path, "one label", model, stock=True)
    calls, found = forwards(model), []
    for one in (trainer, stock):
        torch.manual_seed(0)
        loss, predictions = one.evaluate()["eval_loss"], one.predict(one.eval_dataset).predictions
        found.append((loss, predictions.tolist(), torch.get_rng_state().tolist(), len(calls)))
    (*mine, calls_of_mine), (*theirs, calls_of_both) = found
    assert mine == theirs
    assert (calls_of_mine, calls_of_both) == (2, 4)
    assert not any(calls)
    assert farthest(weights(model), before) == farthest(averages(trainer.regularizers.bregman), average) == 0.0


def test_generation_is_that_of_the_model(tmp_path: Path) -> None:
    name = "sequence to sequence"
    model, data = CASES[name].model(), Rows(batch_of(name))
    options = {"predict_with_generate": True, "generation_max_length": 6, "per_device_train_batch_size": 8}
    made = arguments(tmp_path, SmartSeq2SeqTrainingArguments, **ON, **options)
    trainer = SmartSeq2SeqTrainer(model, made, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.regularizers.smart.stats.penalty > 1e-6
    calls = forwards(trainer.regularizers.bregman.teacher)
    found = trainer.predict(data).predictions
    stock = transformers.Seq2SeqTrainer(
        model, arguments(tmp_path, transformers.Seq2SeqTrainingArguments, **options), eval_dataset=data
    )
    assert (found == stock.predict(data).predictions).all()
    assert not calls


# (g) A step that was skipped


def test_a_step_that_the_scaler_skips_moves_no_teacher(tmp_path: Path) -> None:
    model = CASES["one label"].model()
    trainer = trainer_of(tmp_path, "one label", model, per_device_train_batch_size=8)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # as fp16=True makes one on a GPU
    trainer.add_callback(Overflow())
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append((weights(model), averages(trainer.regularizers.bregman)))

    trainer.add_callback(Watch())
    trainer.train()
    (one, teacher_one), (two, teacher_two), (three, teacher_three) = seen
    assert farthest(one, two) == farthest(teacher_one, teacher_two) == 0.0
    assert farthest(two, three) > 1e-3
    assert farthest(teacher_two, teacher_three) > 1e-3
    assert trainer.state.global_step == STEPS
    assert trainer.regularizers.bregman.updates == STEPS - 1


# (c) Two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `trainer_ranks.py` left the weights of its runs on two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("trainer_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize("name", ["one label", "tokens", "causal, GPT-2"])
def test_two_ranks_are_the_loop_by_hand(ranks: Path, name: str) -> None:
    model = CASES[name].model()
    teacher = by_hand(name, model, batch_of(name), STEPS)
    for rank in range(2):
        found = torch.load(ranks / f"{name} {rank}.pt")
        tolerance = 1e-6 if "causal" in name else 1e-9
        assert farthest(found["weights"], weights(model)) < tolerance
        assert farthest(found["averages"], averages(teacher)) < tolerance
        assert found["log"]["smart_penalty"] > 1e-6
        assert found["log"] == torch.load(ranks / f"{name} 0.pt")["log"]


def test_two_ranks_resume_bit_for_bit(ranks: Path) -> None:
    for rank in range(2):
        whole, resumed = (torch.load(ranks / f"{label} {rank}.pt") for label in ("whole", "resumed"))
        assert farthest(whole["weights"], resumed["weights"]) == 0.0
        assert farthest(whole["averages"], resumed["averages"]) == 0.0


def test_the_trainers_own_compilation_is_refused_on_several_processes(ranks: Path) -> None:
    for rank in range(2):
        said = (ranks / f"compiled {rank}.txt").read_text()
        assert said.startswith("SmartLoss cannot take DistributedDataParallel off inside torch.compile")


# What is refused, and what is taken as it comes


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("regression", "symmetric_kl", "mse"),
        ("regression", "kl", "mse"),
        ("several labels", "symmetric_kl", "binary_symmetric_kl"),
        ("one label", "binary_symmetric_kl", "symmetric_kl"),
    ],
)
def test_a_divergence_for_another_head_is_an_error(tmp_path: Path, name: str, wrong: str, right: str) -> None:
    with pytest.raises(
        ValueError, match=f"divergence='{wrong}' compares .* does .*: expected '{right}', which is taken"
    ):
        trained(tmp_path, name, divergence=wrong)


class Plain(nn.Module):
    """No class of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CASES["one label"].model()
        self.get_input_embeddings = self.inner.get_input_embeddings

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(input_ids).logits
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_a_class_that_nobody_knows_has_to_be_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot tell from the class Plain what its outputs are: pass divergence="):
        trained(tmp_path, "one label", Plain())
    with pytest.raises(ValueError, match="classification is compared where there are labels, got a batch of input_ids"):
        infer_head(CASES["tokens"].model()).output_mask({"input_ids": torch.ones(2, 3)})
    trainer = trained(tmp_path, "one label", Plain(), divergence="symmetric_kl")  # and has no attention mask
    assert trainer.regularizers.smart.stats.penalty > 1e-6
    with pytest.raises(
        ValueError, match=r"how its labels of shape \(8, 8\) belong to its outputs: override smart_head"
    ):
        trained(tmp_path, "tokens", Plain(), divergence="symmetric_kl")


@pytest.mark.parametrize(
    ("name", "kind", "shift"),
    [
        ("FlaubertWithLMHeadModel", "masked language modelling", False),
        ("XLNetLMHeadModel", "causal language modelling", False),
        ("BartForCausalLM", "causal language modelling", False),
        ("ProphetNetForCausalLM", "causal language modelling", False),
        ("GPT2LMHeadModel", "causal language modelling", True),
    ],
)
def test_logits_are_shifted_where_the_loss_of_the_model_shifts_them(name: str, kind: str, shift: bool) -> None:
    head = infer_head(type(name, (nn.Module,), {})())
    assert (head.name, head.shift) == (kind, shift)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_penalty_does_not_depend_on_how_far_labels_are_padded(tmp_path: Path, length: int) -> None:
    model = CASES["sequence to sequence"].model()

    def penalty(padded: int) -> float:
        labels = [7, 12, 40, 41, 8][:length] + [-100] * padded
        row = {"input_ids": [5, 9, 11, 30, 2], "attention_mask": [1] * 5, "labels": labels}
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        trainer = trainer_of(
            tmp_path, "sequence to sequence", copy.deepcopy(model), batch=batch, bregman_mu=0.0, max_steps=1,
            smart_options={"start": "towards_uniform"},  # draws nothing
            logging_strategy="steps", logging_steps=1,
        )  # fmt: skip
        trainer.train()
        return trainer.state.log_history[0]["smart_penalty"]

    assert penalty(3) == pytest.approx(penalty(0), rel=1e-9)


def test_ones_of_several_labels_may_be_whole_numbers() -> None:
    config = SimpleNamespace(problem_type=None, num_labels=3)
    model = type("BertForSequenceClassification", (nn.Module,), {"config": config})()
    assert infer_head(model, torch.tensor([[1, 0, 1], [0, 0, 0]])).divergence == "binary_symmetric_kl"
    assert infer_head(model, torch.tensor([[2], [0]])).divergence == "symmetric_kl"
    assert infer_head(model, torch.tensor([2, 0])).divergence == "symmetric_kl"


def test_sounds_are_no_look_up() -> None:
    model = nn.Module()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    head = Head("sequence to sequence", "symmetric_kl", tokens=True)
    labels = torch.tensor([[5, 6, -100]])
    (encoder, decoder) = look_up_masks(model, head, {"input_ids": labels, "attention_mask": labels, "labels": labels})
    assert encoder is labels
    found = look_up_masks(model, head, {"input_features": torch.ones(1, 8, 4), "labels": labels})
    assert torch.equal(found, decoder)
    assert found.tolist() == [[1, 1, 0]]


def test_arguments_without_the_fields_are_an_error(tmp_path: Path) -> None:
    made = arguments(tmp_path, transformers.TrainingArguments)
    with pytest.raises(TypeError, match=r"args must have the fields of SmartArguments, .* got TrainingArguments"):
        SmartTrainer(CASES["one label"].model(), made)
    with pytest.raises(ValueError, match="smart_every must be 1"):
        trainer_of(tmp_path, "one label", smart_every=0)
    with pytest.raises(ValueError, match=r"smart_warmup_steps must be 0 \(none\) or more, got -1"):
        trainer_of(tmp_path, "one label", smart_warmup_steps=-1)
    with pytest.raises(TypeError, match=r"smart_every must be an int, got 1\.5"):
        trainer_of(tmp_path, "one label", smart_every=1.5)
    with pytest.raises(TypeError, match=r"smart_lambda must be a number, got '0\.3'"):
        trainer_of(tmp_path, "one label", smart_lambda="0.3")
    with pytest.raises(ValueError, match="bregman_mu must be finite and not negative, got -1"):
        trainer_of(tmp_path, "one label", bregman_mu=-1.0)


@pytest.mark.parametrize("times", [0, 2])
def test_a_loss_of_no_or_two_passes_is_an_error(tmp_path: Path, times: int) -> None:
    class Other(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            losses = [model(**inputs).loss for _ in range(times)] or [self.model(**inputs).loss]
            return sum(losses)

    class Mine(SmartTrainerMixin, Other):
        pass

    made = arguments(tmp_path, SmartTrainingArguments, **ON)
    trainer = Mine(CASES["one label"].model(), made, train_dataset=Rows(batch_of("one label")))
    with pytest.raises(
        RuntimeError,
        match="called the model twice for one batch" if times else "never called the model that it was given",
    ):
        trainer.train()


def test_what_the_trainer_cannot_regularize_is_refused(tmp_path: Path) -> None:
    class Fused(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return model(**inputs, fused_lm_head=True).loss

    class Mine(SmartTrainerMixin, Fused):
        pass

    made = arguments(tmp_path, SmartTrainingArguments, **ON)
    trainer = Mine(CASES["one label"].model(), made, train_dataset=Rows(batch_of("one label")))
    with pytest.raises(RuntimeError, match="Mine asks for a fused head"):
        trainer.train()
    for name in ("deepspeed", "fsdp"):
        trainer = trainer_of(tmp_path, "one label")
        setattr(trainer, f"is_{name}_enabled", True)
        with pytest.raises(RuntimeError, match=f"SMART has not been made to work with {name} inside of the Trainer"):
            trainer.train()


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_what_splits_an_example_or_a_layer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    class Split:  # a real one wants as many processes
        def __getattr__(self, name: str) -> bool:
            return name == f"{kind}_enabled"

    trainer = trainer_of(tmp_path, "one label")
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", Split())
    with pytest.raises(RuntimeError, match=f"SMART has not been made to work with {kind}_size > 1"):
        trainer.train()


def test_without_weights_the_trainer_may_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, "one label", **OFF)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(transformers.Trainer, "_inner_training_loop", lambda self, *args, **kwargs: "the loop")
    assert trainer._inner_training_loop() == "the loop"


def test_the_arguments_become_flags() -> None:
    parser = transformers.HfArgumentParser(SmartTrainingArguments)
    flags = "--smart_lambda 0.5 --smart_epsilon 0.1 --smart_memory_efficient --smart_every 2 --report_to none"
    (made,) = parser.parse_args_into_dataclasses(["--output_dir", "out", *flags.split()])
    assert (made.smart_lambda, made.smart_epsilon, made.smart_memory_efficient, made.smart_every) == (0.5, 0.1, True, 2)
    assert parser.parse_args_into_dataclasses(["--output_dir", "out"])[0].smart_epsilon is None


def test_options_reach_both_regularizers(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        "one label",
        smart_epsilon=0.01,
        smart_memory_efficient=True,
        smart_options={"norm": "2"},
        bregman_options={"beta": 0.25},
    )
    smart, bregman = trainer.regularizers.smart, trainer.regularizers.bregman
    assert (smart.settings.epsilon, smart.settings.norm, smart.memory_efficient) == (0.01, "2", True)
    assert bregman.beta == 0.25


@pytest.mark.parametrize("beta", [None, 0.75])
def test_the_teacher_has_the_momentum_of_the_run_unless_one_is_given(tmp_path: Path, beta: float | None) -> None:
    trainer = trained(tmp_path, "one label", bregman_beta=beta, max_steps=30)
    assert trainer.regularizers.bregman.updates == 30
    assert trainer.regularizers.bregman.beta == (suggested_beta(30) if beta is None else beta)


def test_a_run_is_made_by_the_arguments_that_it_starts_with(tmp_path: Path) -> None:
    """A search of hyperparameters sets them between two runs."""
    trainer = trained(tmp_path, "one label", bregman_beta=None, max_steps=2)
    first = trainer.regularizers
    values = {"smart_lambda": 0.9, "bregman_mu": 0.25, "smart_every": 3, "smart_epsilon": 0.01, "max_steps": 40}
    for name, value in values.items():
        setattr(trainer.args, name, value)
    trainer.train()
    now = trainer.regularizers
    assert (now.strength.smart_lambda, now.strength.bregman_mu, now.strength.smart_every) == (0.9, 0.25, 3)
    assert (now.smart.settings.epsilon, now.bregman.beta, now.bregman.updates) == (0.01, suggested_beta(40), 40)
    assert first.smart is None  # nothing of the run before is left on the model


def test_a_run_that_begins_again_with_smaller_batches_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `auto_find_batch_size` does where memory runs out: a longer run, and another momentum."""
    sizes: list[int] = []
    compute_loss = SmartTrainer.compute_loss

    def short_of_memory(self: SmartTrainer, model: nn.Module, inputs: Any, *rest: Any, **more: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes == [8, 8]:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(self, model, inputs, *rest, **more)

    monkeypatch.setattr(SmartTrainer, "compute_loss", short_of_memory)
    trainer = trained(
        tmp_path, "one label", bregman_beta=None, auto_find_batch_size=True, max_steps=-1, num_train_epochs=20,
        per_device_train_batch_size=8,
    )  # fmt: skip
    steps = trainer.state.max_steps
    assert sizes[:2] == [8, 8]
    assert sizes[2] < 8
    assert steps > 20
    assert (trainer.regularizers.bregman.updates, trainer.regularizers.bregman.beta) == (steps, suggested_beta(steps))


def test_nothing_is_written_where_there_is_nothing_to_save(tmp_path: Path) -> None:
    _checkpoint.save(Regularizers(Strength(0.1, 0.0), {}, {}), tmp_path / "checkpoint", 0, main=True)
    assert not (tmp_path / "checkpoint").exists()


def test_adapters(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(CASES["one label"].model(), config)
    trainer = trained(tmp_path, "one label", model, per_device_train_batch_size=8, label_smoothing_factor=0.1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {k.removeprefix("average.") for k in averages(trainer.regularizers.bregman) if "." in k} == trainable
    assert trainer.regularizers.smart.stats.penalty > 1e-6
