"""Lightning with SMART, against the loop that a person would write."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning_tools import Module, fit
from torch import Tensor
from torch.utils.data import DataLoader
from trainer_tools import (
    BETA,
    CASES,
    LAMBDA,
    MU,
    SEARCH,
    Rows,
    averages,
    batch_of,
    by_hand,
    farthest,
    weights,
)

from smartreg import SmartLoss, suggested_beta
from smartreg.integrations.lightning import SmartCallback, smart_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]
STEPS = 3


def callback(**options: Any) -> SmartCallback:
    settings = {"smart_lambda": LAMBDA, "bregman_mu": MU, "smart_options": SEARCH, "bregman_options": {"beta": BETA}}
    return SmartCallback(**{**settings, **options})


# (b), (h)


@pytest.mark.usefixtures("row_start")
@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("name", ["one label", "tokens"])
def test_three_steps_are_those_of_the_loop_by_hand(tmp_path: Path, name: str, size: int) -> None:
    batch = batch_of(name)
    if name == "tokens":  # as many targets in each batch: Lightning takes the mean of the batches' means
        batch["labels"][:, 3:] = -100
    model = CASES[name].model()
    mine, without = copy.deepcopy(model), copy.deepcopy(model)
    teacher = by_hand(name, model, batch, STEPS)
    one = callback()
    fit(tmp_path, Module(name, mine), batch, [one], size=size, accumulate_grad_batches=8 // size)
    assert one.regularizers.bregman.updates == STEPS
    assert farthest(weights(mine), weights(model)) < 1e-9
    assert farthest(averages(one.regularizers.bregman), averages(teacher)) < 1e-9
    fit(tmp_path, Module(name, without, plain=True), batch, [])
    assert farthest(weights(without), weights(model)) > 1e-4


# (a)


def test_weights_of_0_are_the_plain_module(tmp_path: Path) -> None:
    model = CASES["one label"].model(dropout=0.2)
    mine, batch = copy.deepcopy(model), batch_of("one label")
    calls: list[None] = []
    mine.register_forward_pre_hook(lambda *_: calls.append(None))
    torch.manual_seed(0)
    plain = fit(tmp_path, Module("one label", model, plain=True), batch, [])
    torch.manual_seed(0)
    found = fit(tmp_path, Module("one label", mine), batch, [callback(smart_lambda=0.0, bregman_mu=0.0)])
    assert farthest(weights(mine), weights(model)) == 0.0
    assert len(calls) == STEPS
    assert found.lightning_module.state_dict().keys() == plain.lightning_module.state_dict().keys()


# (d)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    batch = batch_of("one label")

    def run(epochs: int, resume: Path | None = None) -> tuple[Module, SmartCallback, Path]:
        one = callback(smart_options={**SEARCH, "generator": torch.Generator().manual_seed(3)})
        saving = ModelCheckpoint(tmp_path, save_last=True, filename=f"{epochs}", every_n_train_steps=4)
        module = Module("one label", CASES["one label"].model())
        fit(tmp_path, module, batch, [one, saving], size=4, max_epochs=epochs, ckpt_path=resume)
        return module, one, tmp_path / f"{epochs}.ckpt"

    _, _, checkpoint = run(2)
    saved = torch.load(checkpoint)
    assert int(saved["callbacks"]["SmartCallback"]["bregman.updates"]) == saved["global_step"] == 4
    assert saved["state_dict"].keys() == Module("one label", CASES["one label"].model()).state_dict().keys()
    whole, one, _ = run(4)
    resumed, two, _ = run(4, checkpoint)
    assert one.regularizers.bregman.updates == two.regularizers.bregman.updates == 8
    assert farthest(weights(resumed.model), weights(whole.model)) == 0.0
    assert farthest(averages(two.regularizers.bregman), averages(one.regularizers.bregman)) == 0.0


def test_a_checkpoint_without_a_teacher_is_an_error(tmp_path: Path) -> None:
    batch, module = batch_of("one label"), Module("one label", CASES["one label"].model())
    trainer = fit(tmp_path, module, batch, [callback(bregman_mu=0.0)])
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="cannot resume: the checkpoint has no teacher"):
        fit(tmp_path, module, batch, [callback()], ckpt_path=tmp_path / "plain.ckpt")


# (e)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_proximal_term_is_0_and_all_is_logged(tmp_path: Path, precision: str) -> None:
    seen: list[dict[str, float]] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    module = Module("one label", CASES["one label"].model().float())
    fit(tmp_path, module, batch_of("one label"), [callback(), Watch()], precision=precision, log_every_n_steps=1)
    first, *others = seen
    assert first["bregman_penalty"] == 0.0
    assert len(others) == 2
    assert all(line["bregman_penalty"] > 1e-6 for line in others)
    assert all(line["smart_penalty"] > 1e-6 and line["smart_ascent_gain"] > 1 for line in seen)


class Lines(Logger):
    """Keeps what reaches a logger."""

    name, version = "lines", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.lines[step] = metrics

    def log_hyperparams(self, *_: Any) -> None:
        """None of interest."""


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(("every", "size"), [(1, 8), (2, 8), (3, 8), (1, 4)])
def test_the_lines_of_the_logger_hold_the_last_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, size: int
) -> None:
    """At the steps at which Lightning writes, which need not be those of a search; no other waits for the device."""
    one, logger = callback(bregman_mu=0.0, smart_every=every), Lines()
    read: list[float | None] = []
    gain = one.regularizers.ascent_gain
    monkeypatch.setattr(one.regularizers, "ascent_gain", lambda: read.append(gain()) or read[-1])
    found: list[tuple[float, float]] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            stats = one.regularizers.smart.stats
            found.append((stats.penalty, stats.ascent_gain))

    module = Module("one label", CASES["one label"].model())
    options = {"log_every_n_steps": 4, "max_epochs": 12, "accumulate_grad_batches": 8 // size}
    fit(tmp_path, module, batch_of("one label"), [one, Watch()], size=size, logger=logger, **options)
    assert len(set(found)) == len(found) // every
    assert len(read) <= len(found) // 4
    lines = {step: (line["smart_penalty"], line["smart_ascent_gain"]) for step, line in logger.lines.items()}
    batches = 8 // size
    assert lines == {step: pytest.approx(found[batches * (step + 1) - 1], rel=1e-5) for step in (3, 7, 11)}


# (f)


def test_evaluation_costs_one_pass_and_changes_nothing(tmp_path: Path) -> None:
    model, batch = CASES["one label"].model(), batch_of("one label")
    module, one = Module("one label", model), callback()
    calls: list[bool] = []
    model.register_forward_pre_hook(lambda inner, _: calls.append(inner.training))
    trainer = fit(tmp_path, module, batch, [one], validate=True)
    assert calls.count(False) == STEPS + STEPS  # validation, and the teacher, a copy with the hook
    before, average, steps = weights(model), averages(one.regularizers.bregman), len(calls)
    (found,) = trainer.validate(module, DataLoader(Rows(batch), batch_size=8), verbose=False)
    assert len(calls) == steps + 1
    with torch.no_grad():
        assert found["val_loss"] == pytest.approx(CASES["one label"].task(model(**batch), batch).item(), rel=1e-6)
    assert farthest(weights(model), before) == farthest(averages(one.regularizers.bregman), average) == 0.0
    outputs, term = smart_loss(Module("one label", model), model, lambda m: m(**batch))  # without a trainer
    assert term == 0.0
    assert outputs.logits.shape == (8, 3)


# (g)


class Overflow(lightning.Callback):
    """Puts an infinity into the gradients of the second step."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if len(self.seen) == 1:
            next(pl_module.model.parameters()).grad[0] = torch.inf

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        bregman = next(c for c in trainer.callbacks if isinstance(c, SmartCallback)).regularizers.bregman
        self.seen.append((weights(pl_module.model), averages(bregman)))


def test_a_step_that_the_scaler_skips_moves_no_teacher(tmp_path: Path) -> None:
    class InDouble(MixedPrecision):
        def autocast_context_manager(self) -> Any:  # the scaler is what matters here
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin, one, watch = InDouble("16-mixed", "cpu", scaler), callback(), Overflow()
    module = Module("one label", CASES["one label"].model())
    trainer = fit(tmp_path, module, batch_of("one label"), [one, watch], plugins=[plugin])
    (a, teacher_a), (b, teacher_b), (c, teacher_c) = watch.seen
    assert farthest(a, b) == farthest(teacher_a, teacher_b) == 0.0
    assert farthest(b, c) > 1e-3
    assert farthest(teacher_b, teacher_c) > 1e-3
    assert trainer.global_step == STEPS  # Lightning counts it all the same
    assert one.regularizers.bregman.updates == STEPS - 1


# (c)


@pytest.mark.usefixtures("row_start")
def test_two_ranks_are_the_loop_by_hand(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "lightning_tools.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    model = CASES["one label"].model()
    teacher = by_hand("one label", model, batch_of("one label"), STEPS)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert farthest(found["weights"], weights(model)) < 1e-9
        assert farthest(found["averages"], averages(teacher)) < 1e-9


def test_what_the_callback_cannot_regularize_is_refused() -> None:
    """The processes and the strategy are what a trainer says of itself."""
    several = SimpleNamespace(world_size=2, strategy=None)
    with pytest.raises(ValueError, match="must have no generator on several processes, got one: Lightning saves the"):
        callback(smart_options={"generator": torch.Generator()}).setup(several, lightning.LightningModule(), "fit")
    callback(smart_options={"generator": torch.Generator()}).setup(several, lightning.LightningModule(), "validate")
    sharded = SimpleNamespace(world_size=2, strategy=type("DeepSpeedStrategy", (), {})())
    with pytest.raises(RuntimeError, match="not been made to work with DeepSpeedStrategy: use DDP"):
        callback().setup(sharded, lightning.LightningModule(), "fit")


def test_the_teacher_has_the_momentum_of_the_run(tmp_path: Path) -> None:
    one = callback(bregman_options={})
    fit(tmp_path, Module("one label", CASES["one label"].model()), batch_of("one label"), [one], size=4, max_epochs=15)
    assert one.regularizers.bregman.updates == 30
    assert one.regularizers.bregman.beta == suggested_beta(30)


class Alternating(Module):
    """Two optimizers, stepped by hand at every batch."""

    def __init__(self, name: str) -> None:
        super().__init__(name, CASES[name].model())
        self.automatic_optimization = False
        self.weighted: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        outputs, term = smart_loss(self, self.model, lambda m: m(**batch), mask=self.case.masks(batch))
        self.weighted.append(float(torch.as_tensor(term).detach()))
        self.manual_backward(self.case.task(outputs, batch) + term)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, *others = self.model.parameters()
        return [torch.optim.SGD([first], lr=1e-3), torch.optim.SGD(others, lr=1e-3)]


def test_a_step_is_one_however_many_optimizers_take_it(tmp_path: Path) -> None:
    module = Alternating("one label")
    one = callback(bregman_mu=0.0, smart_every=2)
    fit(tmp_path, module, batch_of("one label"), [one], size=2, max_epochs=1)
    assert [term > 0 for term in module.weighted] == [True, False, True, False]
    assert one.step == 4


class Pair(Module):
    """Regularizes two models in turn."""

    def __init__(self, name: str) -> None:
        super().__init__(name, CASES[name].model())
        self.other = CASES[name].model()

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        terms = [smart_loss(self, model, lambda m: m(**batch))[1] for model in (self.model, self.other)]
        return sum(terms)


def test_a_second_model_in_one_run_is_an_error(tmp_path: Path) -> None:
    """Its teacher would be made anew at each call, and its proximal term 0 for ever."""
    with pytest.raises(RuntimeError, match=r"one run regularizes one model, got Bert\w+ after Bert"):
        fit(tmp_path, Pair("one label"), batch_of("one label"), [callback()])


def test_a_state_that_no_step_has_used_is_saved_as_it_was_loaded(tmp_path: Path) -> None:
    one, two = callback(), callback()
    fit(tmp_path, Module("one label", CASES["one label"].model()), batch_of("one label"), [one])
    state = one.state_dict()
    assert int(state["step"]) == 3
    two.load_state_dict(state)
    again = two.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_a_checkpoint_that_counts_no_steps_goes_on_at_those_of_the_trainer() -> None:
    one = callback()
    one.load_state_dict({})
    one.on_train_start(SimpleNamespace(global_step=5, optimizers=[]), lightning.LightningModule())
    assert one.step == 5


def test_a_new_run_begins_its_steps_and_means_anew(tmp_path: Path) -> None:
    one = callback()
    fit(tmp_path, Module("one label", CASES["one label"].model()), batch_of("one label"), [one])
    fit(tmp_path, Module("one label", CASES["one label"].model()), batch_of("one label"), [one])
    assert one.step == 3  # of the second run alone
    one.regularizers._note("smart_penalty", torch.tensor(1.0))
    one.regularizers.restart()
    assert one.regularizers.means() == {}


def test_a_run_without_a_length_wants_a_momentum(tmp_path: Path) -> None:
    endless = {"max_epochs": -1, "max_time": {"seconds": 1}}
    with pytest.raises(ValueError, match="number of optimizer steps, which is not known of this run"):
        fit(
            tmp_path,
            Module("one label", CASES["one label"].model()),
            batch_of("one label"),
            [callback(bregman_options={})],
            **endless,
        )


def test_a_step_without_the_callback_is_an_error(tmp_path: Path) -> None:
    module = Module("one label", CASES["one label"].model())
    with pytest.raises(RuntimeError, match=r"smart_loss needs one SmartCallback .*, got 0"):
        fit(tmp_path, module, batch_of("one label"), [])
    with pytest.raises(ValueError, match="symmetric_kl"):  # a softmax over the one output of a regression
        fit(tmp_path, Module("regression", CASES["regression"].model()), batch_of("regression"), [callback()])


class Tuned(Module):
    """What the Tuner changes: the rate, or the size of the batches."""

    lr, batch_size = 0.05, 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(batch_of("one label")), batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


TUNING = {
    "rate": lambda trainer, module: Tuner(trainer).lr_find(module, num_training=3, update_attr=False),
    "size": lambda trainer, module: Tuner(trainer).scale_batch_size(module, max_trials=1, steps_per_trial=1),
}


@pytest.mark.filterwarnings("ignore:.*(training batches|should not be used|callbacks used to create).*")
@pytest.mark.parametrize("mu", [0.0, MU])
@pytest.mark.parametrize("tune", TUNING.values(), ids=TUNING)
def test_the_tuner_runs_on_the_plain_module_alone(tmp_path: Path, tune: Any, mu: float) -> None:
    module, one = Tuned("one label", CASES["one label"].model()), callback(bregman_mu=mu)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, callbacks=[one], accelerator="cpu", devices=1, max_epochs=2, **quiet
    )
    with pytest.raises(RuntimeError, match=r"smart_loss needs one SmartCallback .*, got 0.* takes callbacks away"):
        tune(trainer, module)
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, callbacks=[one], accelerator="cpu", devices=1, max_epochs=2, **quiet
    )
    module, before = Tuned("one label", CASES["one label"].model(), plain=True), weights(CASES["one label"].model())
    tune(trainer, module)
    assert farthest(weights(module.model), before) == 0.0
    module.plain = False
    trainer.fit(module)
    assert one.regularizers.smart.stats.penalty > 1e-6
    assert mu == 0.0 or one.regularizers.bregman.updates == trainer.global_step


def test_a_checkpoint_of_no_step_is_a_new_start(tmp_path: Path) -> None:
    batch = batch_of("one label")
    module, one = Module("one label", CASES["one label"].model()), callback()
    fit(tmp_path, module, batch, [callback(bregman_mu=0.0)], max_epochs=0).save_checkpoint(tmp_path / "new.ckpt")
    fit(tmp_path, module, batch, [one], ckpt_path=tmp_path / "new.ckpt")
    assert one.regularizers.bregman.updates == STEPS


class Packed(Module):
    """Whose rows hold two examples each."""

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        rows, length = batch["input_ids"].shape
        ids = 2 * torch.arange(rows)[:, None] + (torch.arange(length) >= length // 2)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        outputs, term = smart_loss(self, self.model, lambda m: m(**inputs), example_ids=ids)
        return outputs.logits.square().mean() + term


def test_rows_that_hold_several_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    forward = SmartLoss.forward

    def noted(self: SmartLoss, *arguments: Any, **options: Any) -> Any:
        seen.append(options["example_ids"])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(SmartLoss, "forward", noted)
    fit(tmp_path, Packed("one label", CASES["one label"].model()), batch_of("one label"), [callback()], max_epochs=1)
    assert seen
    assert all(ids is not None and len(ids.unique()) == 2 * len(ids) for ids in seen)
