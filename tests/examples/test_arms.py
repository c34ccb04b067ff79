"""The arms: their settings, their methods, and the seam in the trainer that methods use."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from example_tools import SAMPLE, tiny_encoder

from minbert.batching import SentenceTokenizer, tokenize
from minbert.data import read_split
from minbert.distributed import Place
from minbert.extras import Extras
from minbert.model import MultitaskModel, build_model, encoder_config
from minbert.settings import Settings, resolve
from minbert.study.arms import ARMS, COMMON, choice_of, extras_of, settings_of
from minbert.study.methods import entropy, l2_sp, label_smoothing, neftune, sam
from minbert.tasks import TASKS, task_loss
from minbert.train import Trainer
from smartreg import suggested_beta

SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("arms") / "encoder", layers=1, size=8, dropout=0.0)


def trainer_of(encoder: Path, extras: Callable[[MultitaskModel], Extras], **given: object) -> Trainer:
    """A run of two steps on sentiment."""
    settings = resolve({"config": "t-vanilla", "tasks": ("sst",), "max_steps": 2, "batch_size": 8, **given})
    torch.manual_seed(0)
    model = build_model(settings, encoder_config(encoder, settings), encoder)
    data = {"sst": tokenize(read_split(SAMPLE, SST, "train", 16), SentenceTokenizer(encoder, 64))}
    return Trainer(settings, Place(torch.device("cpu")), model, data, {}, None, extras(model))


def usual(model: MultitaskModel) -> Extras:
    return Extras()


def test_every_arm_has_settings_for_every_trial() -> None:
    for name in ARMS:
        for trial in range(12):
            settings = settings_of(name, choice_of(name, trial), 256, seed=1, tasks=("sst",))
            assert settings.seed == 1


def test_trials_share_what_all_arms_have() -> None:
    for trial in range(1, 6):
        drawn = {name: {key: choice_of(name, trial)[key] for key in COMMON} for name in ARMS}
        assert len({tuple(each.values()) for each in drawn.values()}) == 1
    assert choice_of("t-vanilla", 1)["lr"] != choice_of("t-vanilla", 2)["lr"]
    assert choice_of("smart", 1)["lambda_s"] != choice_of("r-drop", 1)["lambda_s"]
    assert choice_of("smart", 0) == {
        "lr": 3e-5,
        "head_lr": 3e-4,
        "epochs": 5,
        "batch_size": 16,
        "mu": 0.0,
        "lambda_s": 0.3,
    }


def test_what_follows_from_a_choice() -> None:
    made = settings_of("smart-printed", choice_of("smart-printed", 0) | {"epsilon": 0.4}, 256)
    assert (made.epsilon, made.step_size, made.noise_std) == pytest.approx((0.4, 0.4, 0.04))
    longer = settings_of("longer", choice_of("longer", 0), 256)
    assert longer.epochs == 12  # 5 epochs × 7/3, rounded
    # 5 epochs of 16 steps: a half-life of a tenth is 8 updates.
    assert settings_of("mbpp", choice_of("mbpp", 0), 256).beta == pytest.approx(0.5 ** (1 / 8))
    assert settings_of("cause:slow-teacher", choice_of("cause:slow-teacher", 0), 256).beta == 0.99
    assert suggested_beta(1, 0.01) == 0.5  # never less than an update
    assert settings_of("smart", choice_of("smart", 0), 256).epsilon == Settings.epsilon


def test_one_method_an_arm(encoder: Path) -> None:
    model = trainer_of(encoder, usual).model
    with pytest.raises(ValueError, match=r"arm 'sam': expected one method at most, got l2_sp, sam"):
        extras_of("sam", {"sam": 0.1, "l2_sp": 0.1}, model)
    assert extras_of("plain", {"label_smoothing": 0.0}, model) == Extras()


def test_losses_by_hand(encoder: Path) -> None:
    model = trainer_of(encoder, usual).model
    outputs, labels = torch.tensor([[2.0, 0.0, 0.0, 0.0, 0.0]]), torch.tensor([0.0])
    logs = outputs.log_softmax(-1)[0]
    smooth = label_smoothing(model, 0.1)
    assert float(smooth.loss(SST, outputs, labels)) == pytest.approx(float(-0.9 * logs[0] - 0.1 * logs.mean()))
    logit = torch.tensor([0.7])
    expected = -(0.95 * F.logsigmoid(logit) + 0.05 * F.logsigmoid(-logit))
    assert float(smooth.loss(PARA, logit, torch.tensor([1.0]))) == pytest.approx(float(expected))
    assert float(smooth.loss(STS, logit, torch.tensor([3.0]))) == float(task_loss(STS, logit, torch.tensor([3.0])))

    sure = entropy(model, 0.5)
    spread = float(-(logs.exp() * logs).sum())
    assert float(sure.loss(SST, outputs, labels)) == pytest.approx(float(-logs[0]) - 0.5 * spread)
    even = sure.loss(PARA, torch.zeros(1), torch.tensor([1.0]))
    assert float(even) == pytest.approx(math.log(2) - 0.5 * math.log(2))


def test_l2_sp_pulls_to_the_start(encoder: Path) -> None:
    model = trainer_of(encoder, usual).model
    extras = l2_sp(model, 0.5)
    outputs, labels = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1.0])
    assert extras.loss(SST, outputs, labels).item() == task_loss(SST, outputs, labels).item()
    weight = model.encoder.embeddings.word_embeddings.weight
    with torch.no_grad():
        weight[3, 0] += 2.0
    moved = extras.loss(SST, outputs, labels)
    assert (moved - task_loss(SST, outputs, labels)).item() == pytest.approx(0.25 * 4, rel=1e-5)
    moved.backward()
    assert float(weight.grad[3, 0]) == pytest.approx(0.5 * 2)


def test_neftune_is_noise_in_training_only(encoder: Path) -> None:
    model = trainer_of(encoder, usual).model
    ids = torch.arange(12).reshape(2, 6) % 9
    embedding = model.get_input_embeddings()
    clean = embedding(ids)
    neftune(model, 3.0)
    model.train()
    gap = (embedding(ids) - clean).detach().abs()
    assert 0 < float(gap.max()) <= 3.0 / math.sqrt(6 * 8)
    assert float(gap.mean()) == pytest.approx(0.5 * 3.0 / math.sqrt(6 * 8), rel=0.2)  # uniform: half the largest
    model.eval()
    assert torch.equal(embedding(ids), clean)


def test_sam_takes_the_gradient_uphill(encoder: Path) -> None:
    """At ρ g / ‖g‖ from the weights, which are put back."""
    run = trainer_of(encoder, lambda model: sam(model, 0.05))
    step = run._steps(0)[0]
    run.model.train()
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run._backward(step)
    grads = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    length = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    run.model.zero_grad()
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            p += 0.05 * grads[name] / length if name in grads else 0.0
    run._backward(step)
    expected = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            p.copy_(start[name])
    run.model.zero_grad()
    run.extras.gradients(lambda: run._backward(step))
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name], atol=1e-6, rtol=0)
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_without_extras_nothing_changes(encoder: Path) -> None:
    """The seam's defaults, and a method of strength 0, train to the same weights."""
    plain, same = trainer_of(encoder, usual), trainer_of(encoder, lambda model: label_smoothing(model, 0.0))
    plain.run()
    same.run()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(same.model.state_dict()[name], value, atol=1e-7, rtol=0)
    assert plain.step == 2


def test_the_average_is_what_is_measured(encoder: Path) -> None:
    measured: list[MultitaskModel] = []

    def watched(model: MultitaskModel) -> Extras:
        return replace(extras_of("ema", {}, model), epoch_ended=lambda run: measured.append(run.extras.evaluated(run)))

    run = trainer_of(encoder, watched, config="t-bregman", mu=0.0, beta=0.5)
    start = run.model.heads["sst"][1].weight.detach().clone()
    run.run()
    teacher, trained = (model.heads["sst"][1].weight.detach() for model in (measured[0], run.model))
    assert 0 < float((teacher - start).norm()) < float((trained - start).norm())
    with pytest.raises(ValueError, match="expected a configuration with a teacher"):
        trainer_of(encoder, lambda model: extras_of("ema", {}, model)).run()
