"""TRL's SFTTrainer with SMART, against the loop that a person would write."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import sft_tools
import torch
import transformers
from datasets import Dataset
from sft_tools import NAME, batch, task, trained, trainer_of
from torch import Tensor, nn
from trainer_tools import (
    CASES,
    Interrupted,
    Overflow,
    averages,
    by_hand,
    farthest,
    forwards,
    row_noise,
    weights,
)

from smartreg import SmartLoss
from smartreg.integrations.trl import SmartSFTConfig, fused_output

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning:(accelerate|transformers|trl|peft).*"),
    # Label smoothing, before transformers 5.15.
    pytest.mark.filterwarnings("ignore:.*ignores num_items_in_batch:smartreg.SmartWarning"),
]
STEPS = 3
METRICS = {"entropy", "mean_token_accuracy", "num_tokens"}
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # what TRL asks


def loop(model: nn.Module, name: str = NAME, **options: Any) -> Any:
    """Every row at each of three steps."""
    return by_hand(name, model, batch(name), STEPS, **{"task": task, **options})


def train_log(trainer: Any) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


# (b) One large batch, and (h) what is there without the integration


@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize(
    ("name", "size", "accumulated", "more"),
    [
        (NAME, 8, 1, {}),
        (NAME, 3, 3, {}),
        (NAME, 2, 4, {"gradient_checkpointing": True}),
        (NAME, 4, 2, {"smart_memory_efficient": True}),
        ("causal, Llama", 3, 3, {}),
    ],
)
def test_three_steps_are_those_of_the_loop_by_hand(
    tmp_path: Path, name: str, size: int, accumulated: int, more: dict[str, Any]
) -> None:
    model = CASES[name].model()
    mine, without, start = copy.deepcopy(model), copy.deepcopy(model), weights(model)
    teacher = loop(model, name)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    trainer = trained(tmp_path, mine, name=name, **cut, **more)

    assert trainer.state.global_step == STEPS
    assert farthest(weights(model), start) > 1e-3
    tolerance = 1e-5 if "Llama" in name else 1e-9  # its norms compute in float32
    assert farthest(weights(mine), weights(model)) < tolerance
    assert farthest(averages(trainer.regularizers.bregman), averages(teacher)) < tolerance
    trained(tmp_path, without, name=name, stock=True, **cut)
    assert farthest(weights(without), weights(model)) > 1e-4


@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize("size", [8, 4])
def test_a_batch_without_padding_is_the_padded_one(tmp_path: Path, size: int) -> None:
    """Two rows of four sequences, or one of eight: each keeps its own radius and its own norm."""
    model = CASES[NAME].model()
    mine = copy.deepcopy(model)
    teacher = loop(model)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    trainer = trained(tmp_path, mine, padding_free=True, max_length=None, **cut)
    assert farthest(weights(mine), weights(model)) < 1e-9
    assert farthest(averages(trainer.regularizers.bregman), averages(teacher)) < 1e-9


@pytest.mark.usefixtures("row_start")
def test_packed_rows_are_the_padded_ones(tmp_path: Path) -> None:
    model = CASES[NAME].model()
    mine = copy.deepcopy(model)
    loop(model)
    packed = {"packing": True, "max_length": 16, "per_device_train_batch_size": 8}
    trainer = trained(tmp_path, mine, **packed)
    assert len(trainer.train_dataset) < 8
    assert farthest(weights(mine), weights(model)) < 1e-9


# The parent's loss and metrics


def test_the_fused_fields_are_those_of_trl(tmp_path: Path) -> None:
    model, rows = CASES[NAME].model(), batch()
    trainer_of(tmp_path, model, stock=True)  # patches the model
    given = {key: rows[key] for key in ("input_ids", "attention_mask")}
    rows["labels"][:, 1:3] = model(**given).logits[:, :2].argmax(-1)  # some are the most likely ones
    theirs = model(**given, labels=rows["labels"], fused_lm_head=True)
    mine = fused_output(model(**given), rows["labels"])
    shifted = fused_output(model(**given), None, nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=-100))
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        found = getattr(mine, name)
        assert found.double().sum().abs() > 1
        torch.testing.assert_close(found.double(), getattr(theirs, name).double(), rtol=1e-6, atol=1e-6)
        assert torch.equal(getattr(shifted, name)[:, :-1], found)


def in_double(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return 2 * nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def dft(outputs: Any, rows: dict[str, Tensor]) -> Tensor:
    log_p = outputs.logits[:, :-1].log_softmax(-1)
    targets = rows["labels"][:, 1:]
    chosen = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[targets != -100]
    return -(chosen * chosen.exp().detach()).mean()


@pytest.mark.filterwarnings("ignore:.*will be removed in v2:FutureWarning")
@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize(
    ("options", "by_task"),
    [
        ({"loss_type": "dft"}, dft),
        ({"compute_loss_func": in_double}, lambda out, rows: 2 * task(out, rows)),
        (
            {"label_smoothing_factor": 0.2},
            lambda out, rows: nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), label_smoothing=0.2
            ),
        ),
    ],
    ids=["dft", "function", "smoothing"],
)
def test_the_task_loss_is_that_of_the_parent(tmp_path: Path, options: dict[str, Any], by_task: Any) -> None:
    model = CASES[NAME].model()
    mine = copy.deepcopy(model)
    loop(model, task=by_task)
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    trainer = trained(tmp_path, mine, **cut, **LOGGED, **options)
    assert farthest(weights(mine), weights(model)) < (1e-6 if "label_smoothing_factor" in options else 1e-9)
    assert train_log(trainer)[0].keys() >= METRICS
    assert not trainer._metrics["eval"]  # nothing was evaluated


def test_the_metrics_are_those_of_the_parent(tmp_path: Path) -> None:
    """Of the first step, at which both models are the same."""
    lines = []
    for stock in (True, False):
        trainer = trained(tmp_path, stock=stock, per_device_train_batch_size=8, eval_strategy="epoch", **LOGGED)
        lines.append([train_log(trainer)[0], next(x for x in trainer.state.log_history if "eval_loss" in x)])
    (theirs, their_eval), (mine, my_eval) = lines
    assert mine.keys() - theirs.keys() == {"smart_penalty", "bregman_penalty", "smart_ascent_gain"}
    assert {key: mine[key] for key in METRICS} == pytest.approx({key: theirs[key] for key in METRICS}, rel=1e-6)
    assert theirs["entropy"] > 0.1
    assert theirs["num_tokens"] == batch()["attention_mask"].sum()
    assert my_eval.keys() == their_eval.keys() >= {f"eval_{key}" for key in METRICS}


# (a) Weights of 0


def test_weights_of_0_are_the_stock_trainer(tmp_path: Path) -> None:
    model = CASES[NAME].model(dropout=0.2)
    mine = copy.deepcopy(model)
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    calls, stock_calls = forwards(mine), forwards(model)
    trained(tmp_path, model, stock=True, **cut)
    trainer = trained(tmp_path, mine, smart_lambda=0.0, bregman_mu=0.0, **cut)
    assert farthest(weights(mine), weights(model)) == 0.0
    assert len(calls) == len(stock_calls) == 9
    assert (trainer.regularizers.smart, trainer.regularizers.bregman) == (None, None)


# (c) Two ranks


def test_two_ranks_are_the_loop_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, sft_tools.__file__, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    forward = SmartLoss.forward
    monkeypatch.setattr(SmartLoss, "forward", lambda self, *a, **k: forward(self, *a, **{**k, "noise": row_noise}))
    model = CASES[NAME].model()
    teacher = loop(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert farthest(found["weights"], weights(model)) < 1e-9
        assert farthest(found["averages"], averages(teacher)) < 1e-9
        assert found["log"]["num_tokens"] == STEPS * batch()["attention_mask"].sum()


# (d) Interrupted and resumed


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> Any:
        search = {"generator": torch.Generator().manual_seed(3)}
        model = CASES[NAME].model(dropout=0.2)
        return trainer_of(tmp_path / folder, model, per_device_train_batch_size=2, smart_options=search, **options)

    saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    whole = run("whole", num_train_epochs=2)
    whole.train()
    first, second = run("parts", **saving), run("parts", **saving)
    first.add_callback(Interrupted())
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert first.state.global_step == 3 < whole.state.global_step == second.state.global_step
    assert farthest(weights(second.model), weights(whole.model)) == 0.0
    assert farthest(averages(second.regularizers.bregman), averages(whole.regularizers.bregman)) == 0.0
    assert second.regularizers.bregman.updates == whole.state.global_step


# (e) The first proximal term, and a teacher that is not the student


@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_proximal_term_is_0_and_the_others_are_not(tmp_path: Path, bf16: bool) -> None:
    trainer = trained(tmp_path, CASES[NAME].model().float(), bf16=bf16, per_device_train_batch_size=8, **LOGGED)
    first, *others = train_log(trainer)
    assert first["bregman_penalty"] == 0.0
    assert min(line["bregman_penalty"] for line in others) > 1e-6
    assert min(line["smart_penalty"] for line in (first, *others)) > 1e-6
    assert len(others) == STEPS - 1


def test_a_forward_that_no_copy_would_have_is_refused(tmp_path: Path) -> None:
    model = CASES[NAME].model()
    model.forward = functools.partial(model.forward)
    with pytest.raises(RuntimeError, match="the forward of GPT2LMHeadModel was replaced on the object before TRL"):
        trainer_of(tmp_path, model)
    trainer_of(tmp_path, model, bregman_mu=0.0)


def test_adapters(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = trained(tmp_path, peft_config=config, per_device_train_batch_size=8, **LOGGED)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {k.removeprefix("average.") for k in averages(trainer.regularizers.bregman) if "." in k} == trainable
    first, *others = train_log(trainer)
    assert first["bregman_penalty"] == 0.0
    assert min(line["bregman_penalty"] for line in others) > 1e-9
    assert first["smart_penalty"] > 1e-6


# (f) Evaluation


def test_evaluation_and_generation_are_those_of_the_stock_trainer(tmp_path: Path) -> None:
    model = CASES[NAME].model(dropout=0.2)
    trainer = trained(tmp_path, model, per_device_train_batch_size=4)
    before, average = weights(model), averages(trainer.regularizers.bregman)
    twin = copy.deepcopy(CASES[NAME].model())
    twin.load_state_dict(model.state_dict())
    stock = trainer_of(tmp_path, twin, stock=True)
    calls, stock_calls = forwards(model), forwards(twin)
    keys = {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"}
    mine, theirs = ({k: v for k, v in one.evaluate().items() if k in keys} for one in (trainer, stock))
    assert mine == theirs
    assert len(mine) == 3
    assert len(calls) == len(stock_calls) == 1
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompt), twin.generate(**prompt))
    assert farthest(weights(model), before) == farthest(averages(trainer.regularizers.bregman), average) == 0.0


# (g) A step that was skipped


def test_a_step_that_the_scaler_skips_moves_no_teacher(tmp_path: Path) -> None:
    model = CASES[NAME].model()
    trainer = trainer_of(tmp_path, model, per_device_train_batch_size=8)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # as fp16=True makes one on a GPU
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append((weights(model), averages(trainer.regularizers.bregman)))

    trainer.add_callback(Overflow())
    trainer.add_callback(Watch())
    trainer.train()
    (one, teacher_one), (two, teacher_two), (three, teacher_three) = seen
    assert farthest(one, two) == farthest(teacher_one, teacher_two) == 0.0
    assert farthest(two, three) > 1e-3
    assert farthest(teacher_two, teacher_three) > 1e-3


def test_the_config_becomes_flags_and_sentences_become_rows(tmp_path: Path) -> None:
    parser = transformers.HfArgumentParser(SmartSFTConfig)
    (made,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--smart_lambda", "0.5", "--use_cpu"])
    assert (made.smart_lambda, made.loss_type) == (0.5, "nll")
    rows = Dataset.from_dict({"prompt": ["w3 w4 w5", "w6 w7"], "completion": [" w8 w9", " w10 w11 w12"]})
    trainer = trained(tmp_path, CASES[NAME].model().float(), rows=rows, **LOGGED)
    assert train_log(trainer)[0]["smart_penalty"] > 1e-6
