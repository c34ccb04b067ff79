"""The parts of the example, one by one: batches, noise, heads, losses, metrics, schedules, saved states."""

import doctest
import importlib
import json
import pkgutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import minbert
from minbert import InputError
from minbert.batching import Batch, TokenSet, collate, epoch_steps, micro_batches, share
from minbert.bert import BertConfig, BertEncoder
from minbert.checkpoint import pack, unpack
from minbert.data import drawn
from minbert.distributed import Place
from minbert.evaluate import evaluate
from minbert.model import MultitaskModel, pair_features
from minbert.objective import Objective, SeededNoise
from minbert.optimizer import equation3, make_schedule, schedule_note
from minbert.settings import BETAS, Settings, resolve
from minbert.tasks import TASKS, baseline, log_likelihood, pearson, predict, score, task_loss
from smartreg import suggested_beta

CPU = torch.device("cpu")
TINY = BertConfig(
    vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=16, initializer_range=0.5,
)  # fmt: skip
NAMES = [module.name for module in pkgutil.walk_packages(minbert.__path__, "minbert.")]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def model(**options: object) -> MultitaskModel:
    torch.manual_seed(0)
    return MultitaskModel(BertEncoder(TINY), list(TASKS), **options)  # type: ignore[arg-type]


def batch(task: str, count: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        rows.append(tuple(torch.randint(5, 40, (3 + (i + j) % 4,), generator=draw).tolist() for j in range(2)))
    rows = [row[: len(TASKS[task].columns)] for row in rows]
    labels = [float(i % 2) for i in range(count)]
    data = TokenSet(TASKS[task], [str(i) for i in range(count)], rows, labels, 0)
    return collate(data, range(count), 0, CPU)


def test_an_epoch_has_every_row_once_and_tasks_by_their_share() -> None:
    lengths = {"sst": [i % 7 + 3 for i in range(100)], "sts": [5] * 30}
    steps = epoch_steps(lengths, 8, seed=0, epoch=0, interleave="proportional")
    for task, sizes in lengths.items():
        rows = [row for step in steps if step.task == task for row in step.rows]
        assert sorted(rows) == list(range(len(sizes)))
    assert Counter(step.task for step in steps) == {"sst": 13, "sts": 4}
    assert steps == epoch_steps(lengths, 8, seed=0, epoch=0, interleave="proportional")
    assert steps != epoch_steps(lengths, 8, seed=0, epoch=1, interleave="proportional")
    assert steps != epoch_steps(lengths, 8, seed=1, epoch=0, interleave="proportional")


def test_round_robin_takes_turns_until_the_largest_is_through() -> None:
    lengths = {"sst": [4] * 40, "sts": [5] * 10}
    steps = epoch_steps(lengths, 8, seed=0, epoch=0, interleave="round-robin")
    assert [step.task for step in steps] == ["sst", "sts"] * 5
    assert sorted(row for step in steps[::2] for row in step.rows) == list(range(40))
    assert {row for step in steps[1::2] for row in step.rows} == set(range(10))


def test_rows_of_like_length_share_a_step() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (320,), generator=draw).tolist()
    steps = epoch_steps({"sst": lengths}, 10, seed=0, epoch=0, interleave="proportional")
    padded = sum(max(lengths[row] for row in step.rows) * len(step.rows) for step in steps)
    assert padded < 1.1 * sum(lengths)


def test_padding_and_masks() -> None:
    data = TokenSet(TASKS["sst"], ["a", "b"], [([1, 2],), ([3, 4, 5, 6],)], [0.0, 1.0], 0)
    made = collate(data, [1, 0], 9, CPU)
    assert made.sentences[0].tolist() == [[3, 4, 5, 6], [1, 2, 9, 9]]
    assert made.masks[0].tolist() == [[True] * 4, [True, True, False, False]]
    assert made.labels is not None
    assert made.labels.tolist() == [1.0, 0.0]
    assert made.rows == [1, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_weighted_shares_add_up_to_the_whole_mean(world: int) -> None:
    rows = list(range(7))
    values = torch.tensor([1.0, 2, 4, 8, 16, 32, 64])
    mean = 0.0
    for part in micro_batches(rows, 3):
        for rank in range(world):
            own, weight = share(part, rank, world)
            mean += float(values[own].mean()) * weight / world * len(part) / len(rows)
    assert mean == pytest.approx(float(values.mean()))


def test_noise_depends_on_the_example_and_not_on_its_company() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    whole = SeededNoise(0.1, "rms", [mask], [7, 3, 5], (0, 2, "sst"))(embeddings)
    part = SeededNoise(0.1, "rms", [mask[1:, :4]], [3, 5], (0, 2, "sst"))(embeddings[1:, :4])
    assert torch.equal(whole[1:, :4], part)
    assert (whole[~mask] == 0).all()
    assert (whole[mask] != 0).all()
    for key, rows in (((0, 3, "sst"), [7, 3, 5]), ((1, 2, "sst"), [7, 3, 5]), ((0, 2, "sst"), [8, 4, 6])):
        assert not torch.equal(SeededNoise(0.1, "rms", [mask], rows, key)(embeddings), whole)
    twice = SeededNoise(0.1, "rms", [mask, mask], [7, 3, 5], (0, 2, "sst"))
    assert not torch.equal(twice(embeddings), twice(embeddings))  # two sentences, two noises


def test_the_size_of_the_noise() -> None:
    torch.manual_seed(0)
    embeddings = 3 * torch.randn(1, 400, 50)
    mask = torch.ones(1, 400, dtype=torch.bool)
    relative = SeededNoise(0.1, "rms", [mask], [0], (0,))(embeddings)
    absolute = SeededNoise(0.1, "absolute", [mask], [0], (0,))(embeddings)
    assert float(relative.std()) == pytest.approx(0.1 * float(embeddings.square().mean().sqrt()), rel=0.02)
    assert float(absolute.std()) == pytest.approx(0.1, rel=0.02)


def test_pair_features_do_not_depend_on_the_order() -> None:
    torch.manual_seed(0)
    u, v = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(pair_features(u, v), pair_features(v, u))
    torch.testing.assert_close(pair_features(u, v)[:, -1], F.cosine_similarity(u, v) * 8**0.5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_pooling_ignores_padding(pooling: str) -> None:
    net = model(pooling=pooling).eval()
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    longer, padded = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]]).bool()
    torch.testing.assert_close(net.sentence(longer, padded), net.sentence(ids, mask))
    hidden, pooled = net.encoder(ids, mask)
    expected = {"mean": hidden.mean(1), "cls": hidden[:, 0], "pooler": pooled}[pooling]
    torch.testing.assert_close(net.sentence(ids, mask), expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_heads(layers: int, activation: str) -> None:
    net = model(head_layers=layers, head_activation=activation)
    modules = list(net.heads["sst"])
    assert sum(isinstance(m, torch.nn.Linear) for m in modules) == layers
    assert sum(isinstance(m, torch.nn.ReLU) for m in modules) == (layers - 1 if activation == "relu" else 0)
    for name, task in TASKS.items():
        made = batch(name)
        expected = (4,) if task.outputs == 1 else (4, task.outputs)
        assert net(name, made.sentences, made.masks).shape == expected


def test_losses_and_predictions() -> None:
    logits, labels = torch.tensor([[2.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]), torch.tensor([0.0, 4.0])
    torch.testing.assert_close(task_loss(TASKS["sst"], logits, labels), F.cross_entropy(logits, labels.long()))
    assert predict(TASKS["sst"], logits).tolist() == [0, 1]
    single = torch.tensor([2.0, -1.0])
    expected = -(torch.sigmoid(single[0]).log() + torch.sigmoid(single[1]).log()) / 2
    torch.testing.assert_close(task_loss(TASKS["para"], single, torch.tensor([1.0, 1.0])), expected)
    likelihood = log_likelihood(TASKS["para"], single, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(-likelihood.mean(), expected.double())
    assert predict(TASKS["para"], single).tolist() == [1, 0]
    assert float(task_loss(TASKS["sts"], torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0]))) == 2.5
    assert predict(TASKS["sts"], torch.tensor([-1.0, 6.0])).tolist() == [0, 5]


def test_metrics() -> None:
    found = score(TASKS["sst"], torch.eye(5)[:3] * 9, torch.tensor([0.0, 1.0, 4.0]))
    assert found["n"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert score(TASKS["sts"], torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 6]))["pearson"] == pytest.approx(1)
    assert pearson(torch.ones(3), torch.tensor([1.0, 2, 3])) == 0.0
    assert pearson(torch.tensor([1.0, 2, 3]), torch.ones(3)) is None
    assert pearson(torch.ones(1), torch.ones(1)) is None


class Zero(torch.nn.Module):
    """Answers with the first class, whatever the sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.encoder = torch.nn.Parameter(torch.ones(1)), SimpleNamespace(config=TINY)

    def forward(self, task: str, sentences: tuple[torch.Tensor, ...], masks: object) -> torch.Tensor:
        return self.weight * F.one_hot(torch.zeros(len(sentences[0]), dtype=torch.long), TASKS[task].outputs)


def test_metrics_on_some_rows_are_those_of_a_draw() -> None:
    """In a file sorted by label the first rows are all of one class."""
    labels = [0.0] * 400 + [3.0] * 600
    sets = {"sst": TokenSet(TASKS["sst"], list(map(str, range(1000))), [([1, 2],)] * 1000, labels, 0)}
    found = evaluate(Zero(), sets, Place(CPU), 200)["sst"]
    assert found["n"] == 200
    assert found["accuracy"] == sum(row < 400 for row in drawn(TASKS["sst"], 1000, 200)) / 200
    assert found["accuracy"] == pytest.approx(0.4, abs=3 * (0.4 * 0.6 / 200) ** 0.5)  # of a binomial's deviations
    assert found == evaluate(Zero(), sets, Place(CPU), 200)["sst"]
    assert evaluate(Zero(), sets, Place(CPU))["sst"]["accuracy"] == 0.4
    assert evaluate(Zero(), sets, Place(CPU), 5000)["sst"]["n"] == 1000


def test_baselines() -> None:
    train = torch.tensor([0.0, 1, 1, 3])
    made = baseline(TASKS["sst"], train, torch.tensor([1.0, 1.0, 2.0, 3.0]))
    assert made["accuracy"] == 0.5
    only_ones = baseline(TASKS["sst"], train, torch.tensor([1.0]))
    assert only_ones["nll"] == pytest.approx(0.6931, abs=1e-3)
    assert baseline(TASKS["para"], torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1]))["accuracy"] == pytest.approx(
        2 / 3
    )
    assert baseline(TASKS["sts"], train, torch.tensor([1.0, 2]))["pearson"] == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("report", {0: 1.0, 50: 3.0, 125: 2.0, 200: 1.0}),
        ("howard-ruder", {0: 1 / 32, 20: 1.0, 200: 1 / 32}),
        ("constant", {0: 1.0, 199: 1.0}),
        ("equation3", {0: 1.0, 100: 2.0, 200: 3.5 - 200 / 300}),
    ],
)
def test_schedules(name: str, expected: dict[int, float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make_schedule(name, optimizer, 200)
    rates = []
    for _ in range(201):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    assert {step: pytest.approx(rates[step]) for step in expected} == expected
    assert equation3(1049) > 0 == equation3(1050) == equation3(5000)
    assert schedule_note("equation3", 1050) is schedule_note("report", 5000) is None
    assert "0 from step 1050 of 1051 on" in schedule_note("equation3", 1051)


def test_states_survive_packing() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    state = {"optimizer": optimizer.state_dict(), "list": [1, 2.5, None, True, "x"], "exact": 0.1 + 0.2}

    back = unpack(json.loads(json.dumps(pack(state, tensors))), tensors)
    assert back["list"] == state["list"]
    assert back["exact"] == 0.1 + 0.2
    assert back["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    with pytest.raises(TypeError, match=r"root\.bad: cannot be saved without pickle: set"):
        pack({"bad": {1}}, tensors)


def test_configurations_and_presets() -> None:
    settings = {
        name: resolve({"config": name}) for name in ("baseline", "vanilla", "t-vanilla", "t-bregman", "t-smart")
    }
    assert [(s.lr_schedule, s.proximal, s.smooth) for s in settings.values()] == [
        ("constant", False, False),
        ("constant", False, False),
        ("report", False, False),
        ("report", True, False),
        ("report", True, True),
    ]
    assert settings["baseline"].train_tasks == ("sst",)
    assert settings["baseline"].tasks == settings["vanilla"].train_tasks == ("sst", "para", "sts")
    assert resolve({"preset": "report"}).lr == resolve({"preset": "report"}).head_lr == 1e-5
    assert resolve({"preset": "report", "option": "pretrain"}).lr == 1e-3
    assert resolve({"preset": "report", "lr": 0.5}).lr == 0.5
    assert resolve({"preset": "report"}).epsilon == 1e-5
    assert resolve({"preset": "report"}).pooling == "pooler"
    assert resolve({"lr": 0.25}).head_lr == 0.25
    assert resolve({"option": "pretrain"}).lr == 1e-3
    assert resolve({"head_lr": 0.5}).lr == Settings().lr
    assert Settings.from_dict(settings["t-smart"].to_dict()) == settings["t-smart"]
    older = {name: value for name, value in settings["t-smart"].to_dict().items() if name != "start"}
    assert Settings.from_dict(older).start == "noise"  # what runs did before there was a choice
    with pytest.raises(InputError, match="--lambda-s: has no effect with --config t-bregman"):
        resolve({"config": "t-bregman", "lambda_s": 1.0})
    with pytest.raises(InputError, match="--mu: has no effect with --config vanilla"):
        resolve({"config": "vanilla", "mu": 1.0})
    with pytest.raises(InputError, match="baseline trains on sentiment only"):
        resolve({"config": "baseline", "tasks": ("sts",)})


def test_every_setting_of_the_regularizers_reaches_the_library() -> None:
    other = Settings(
        beta=0.5, epsilon=0.2, step_size=0.3, noise_std=0.4, ascent_steps=2, norm="inf", norm_over="token",
        start="noise", epsilon_scale="absolute", ascent="normalized", smart_dropout="independent",
        detach_reference=True, memory_efficient=True,
    )  # fmt: skip
    net = model()
    # One of the two is not what the library would do anyway; values have no uniform prediction to go towards.
    cases = ((Settings(), ("towards_uniform", "gradient"), suggested_beta(100)), (other, ("noise",), 0.5))
    for settings, starts, beta in cases:
        objective = Objective(net, net, settings, total_updates=100)
        assert objective.bregman is not None
        assert {start: smart.settings.start for start, smart in objective.smart.items()} == {s: s for s in starts}
        smart = objective.smart[settings.start]
        found = smart.settings
        for name in ("epsilon", "step_size", "noise_std", "norm", "norm_over", "epsilon_scale", "ascent"):
            assert getattr(found, name) == getattr(settings, name)
        assert found.steps == settings.ascent_steps
        assert found.dropout == settings.smart_dropout
        assert found.detach_reference == settings.detach_reference
        assert smart.memory_efficient == settings.memory_efficient
        assert objective.bregman.beta == beta


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("efficient", [False, True])
def test_every_term_of_the_loss_is_there_for_every_task(task: str, efficient: bool) -> None:
    net = model()
    objective = Objective(net, net, Settings(mu=0.7, lambda_s=0.4, memory_efficient=efficient), total_updates=10)
    assert objective.bregman is not None
    with torch.no_grad():
        for parameter in net.parameters():  # away from the teacher, or the proximal term is zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    losses = objective(batch(task), step=0)
    assert losses.smoothness is not None
    assert losses.proximal is not None
    assert losses.stats is not None
    assert losses.smoothness.item() > 0
    assert losses.proximal.item() > 0
    assert losses.stats.bad_examples == 0
    expected = losses.task + 0.4 * losses.smoothness + 0.7 * losses.proximal
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()
    assert net.get_input_embeddings().weight.grad is not None


def test_each_task_has_the_divergence_of_its_outputs() -> None:
    net = model(dropout=0.0).train()
    objective = Objective(net, net, Settings(config="t-bregman"), total_updates=10)
    assert objective.bregman is not None
    net.eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name in TASKS:
        made = batch(name)
        ours, theirs = (m(name, made.sentences, made.masks).detach().double() for m in (net, objective.bregman.teacher))
        if name == "sts":
            expected = (ours - theirs).square().mean()
        elif name == "para":  # each logit on its own, never a softmax over the batch
            expected = ((ours.sigmoid() - theirs.sigmoid()) * (ours - theirs)).mean()
        else:
            p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
            expected = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
        proximal = objective(made, step=0).proximal
        assert proximal is not None
        assert proximal.item() == pytest.approx(expected.item(), rel=1e-4), name


def test_the_teacher_moves_every_inner_steps() -> None:
    net = model()
    objective = Objective(net, net, Settings(config="t-bregman", inner_steps=3, beta=0.5), total_updates=10)
    assert objective.bregman is not None
    weight = objective.bregman.teacher.heads["sst"][1].weight
    before, moved = weight.clone(), []
    with torch.no_grad():
        net.heads["sst"][1].weight.add_(1.0)
    for step in range(6):
        objective.stepped(step)
        moved.append(round(float((objective.bregman.teacher.heads["sst"][1].weight - before).mean()), 4))
    assert moved == [0, 0, 0.5, 0.5, 0.5, 0.75]


def test_beta_may_follow_from_the_length_of_the_run() -> None:
    net, made = model(), {}
    for rule in BETAS:
        bregman = Objective(net, net, Settings(config="t-bregman", beta=rule), total_updates=100).bregman
        assert bregman is not None
        made[rule] = [bregman.beta(update) if callable(bregman.beta) else bregman.beta for update in (9, 10)]
    assert made == {"paper": [0.99, 0.999], "suggested": [pytest.approx(0.5**0.1)] * 2}


def test_terms_that_are_off_cost_nothing() -> None:
    net = model()
    plain = Objective(net, net, Settings(config="t-vanilla"), total_updates=10)
    assert plain.smart == {}
    assert plain.bregman is None
    silent = Objective(net, net, Settings(lambda_s=0.0, mu=0.0), total_updates=10)
    losses = silent(batch("sst"), step=0)
    assert losses.smoothness is None
    assert losses.proximal is None
    assert torch.equal(losses.total, losses.task)
