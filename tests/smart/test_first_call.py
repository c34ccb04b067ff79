"""Forwards that are not repeatable: what can be replayed is, and the first call tells of the rest."""

import random
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from smart_models import FEATURES, VOCABULARY, Sentence, batch, both_modes, build, counting
from torch import Tensor, nn

from smartreg import SmartLoss, SmartWarning, diagnose, smoothness_penalty

IDS, MASK = batch()
TOLD = r"forward is not repeatable: when it runs once more without a perturbation.*would be part of every penalty"


class Scaled(Sentence):
    """The hidden state is scaled by a number that `draw` gives anew in every pass."""

    draw: Callable[[], float]

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().encode(ids, mask) * (1.0 + self.draw())


def scaled(draw: Callable[[], float], **held: Any) -> Scaled:
    torch.manual_seed(0)
    model = Scaled().double()
    for name, value in held.items():
        setattr(model, name, value)
    model.draw = draw
    return model


def legacy() -> float:
    return float(np.random.uniform())  # noqa: NPY002  # what augmentation code draws from


def sources() -> dict[str, Scaled]:
    own, private = torch.Generator().manual_seed(3), random.Random(3)
    bits, old = np.random.default_rng(3), np.random.RandomState(3)
    return {
        "python": scaled(random.random),
        "numpy": scaled(legacy),
        "generator": scaled(lambda: float(torch.rand((), generator=own)), own=own),
        "in a list": scaled(lambda: float(torch.rand((), generator=own)), pool=[None, {"own": own}]),
        "random.Random": scaled(private.random, private=private),
        "numpy generator": scaled(bits.random, bits=bits),
        "numpy RandomState": scaled(old.uniform, old=old),
    }


@both_modes
@pytest.mark.parametrize("name", sources())
def test_randomness_that_is_replayed(name: str, memory_efficient: bool) -> None:
    model, twin = sources()[name], sources()[name]
    smart = SmartLoss(model, epsilon=0.0, memory_efficient=memory_efficient)
    for _ in range(2):
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        outputs, penalty = smart(lambda m: m(IDS))
        found = model.draw()
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        assert torch.equal(outputs, twin(IDS))
        assert found == twin.draw()  # as after one clean pass
        assert penalty.item() == 0.0


@both_modes
def test_a_penalty_under_replayed_randomness_is_exact(memory_efficient: bool) -> None:
    random.seed(0)
    model = scaled(random.random)
    delta = torch.full((*IDS.shape, FEATURES), 0.01, dtype=torch.float64)
    smart = SmartLoss(model, start="noise", steps=0, epsilon=9.0, memory_efficient=memory_efficient)
    penalty = smart(lambda m: m(IDS), noise=delta).penalty
    random.seed(0)
    factor = 1.0 + random.random()
    x = model.embedding(IDS)
    outputs = [model.head(factor * torch.tanh(model.hidden(y)).mean(dim=1)) for y in (x + delta, x)]
    expected = reference.symmetric_kl(*(output.detach().numpy() for output in outputs))
    assert penalty.item() == pytest.approx(expected, rel=1e-9)


class Keeping(Sentence):
    """Changes in place what it holds, and its output depends on all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[Any] = []
        self.nested = {"last": deque([0.0], maxlen=2), "counts": {"passes": 0}}
        self.kinds: set[int] = set()
        self.total = torch.zeros(2, dtype=torch.float64)
        self.totals = [torch.zeros(2, dtype=torch.float64)]

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.trace.append(len(self.trace))
        self.nested["counts"]["passes"] += 1
        self.nested["last"].append(float(len(self.trace)))
        self.kinds.add(len(self.trace))
        self.total += 1.0
        self.totals[0] += 2.0
        known = len(self.trace) + len(self.kinds) + sum(self.nested["last"]) + self.nested["counts"]["passes"]
        return super().encode(ids, mask) * (known + self.total.sum() + self.totals[0].sum())

    def state(self) -> list[Any]:
        last = list(self.nested["last"]), self.nested["counts"], self.total.tolist(), self.totals[0].tolist()
        return [list(self.trace), sorted(self.kinds), *last]


def keeping() -> Keeping:
    torch.manual_seed(0)
    return Keeping().double()


@both_modes
@pytest.mark.parametrize("steps", [0, 2])
def test_what_modules_change_in_place_is_as_after_one_pass(steps: int, memory_efficient: bool) -> None:
    model, twin = keeping(), keeping()
    held = [model.trace, model.nested["last"], model.kinds, model.total, model.totals[0]]
    smart = SmartLoss(model, epsilon=0.0, memory_efficient=memory_efficient)
    perturbing = SmartLoss(model, steps=steps, memory_efficient=memory_efficient)
    for call in (smart, perturbing, smart):
        outputs, penalty = call(lambda m: m(IDS))
        assert torch.equal(outputs, twin(IDS))
        assert model.state() == twin.state()
        assert (penalty.item() == 0.0) == (call is smart)
        (outputs.sum() + penalty).backward()
    now = [model.trace, model.nested["last"], model.kinds, model.total, model.totals[0]]
    assert all(one is other for one, other in zip(held, now, strict=True))


def test_diagnose_leaves_what_modules_hold_as_it_was() -> None:
    random.seed(5)
    model, before = keeping(), (keeping().state(), random.getstate())
    model.draw_once = random.random
    diagnose(model, lambda m: m(IDS) * (1 + m.draw_once()), epsilons=[0.1])
    assert (model.state(), random.getstate()) == before


def test_a_large_tensor_that_is_no_buffer_is_told_apart() -> None:
    model = keeping()
    model.total = torch.zeros(2**20 + 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"changes Keeping\.total in place.*\(1048577,\).*register_buffer"):
        SmartLoss(model)(lambda m: m(IDS))
    model = keeping()
    model.unused = torch.zeros(2**20 + 1)
    SmartLoss(model)(lambda m: m(IDS))


class Cache:
    """An argument that every pass extends, as a key-value cache is."""

    def __init__(self) -> None:
        self.entries: list[Tensor] = []

    def extended(self, x: Tensor) -> Tensor:
        self.entries.append(x.detach())
        return torch.stack(self.entries).sum(dim=0) + x - x.detach()


def unrepeatable() -> dict[str, Callable[[Sentence], Tensor]]:
    cache, image, numbers = Cache(), [0.5 * torch.ones(3, 1, dtype=torch.float64)], iter(range(100))
    fresh = random.SystemRandom()
    return {
        "cache": lambda m: m.head(cache.extended(m.encode(IDS))),
        "in place": lambda m: m(IDS) * image[0].mul_(0.5).add_(1.0).clone(),
        "iterator": lambda m: m(IDS) * (1 + next(numbers)),
        "entropy": lambda m: m(IDS) * (1 + fresh.random()),
        "reseeds": lambda m: (torch.manual_seed(fresh.randrange(2**30)), m(IDS) * torch.rand(()))[1],
    }


@both_modes
@pytest.mark.parametrize("name", unrepeatable())
def test_what_cannot_be_replayed_is_told_in_the_first_call(name: str, memory_efficient: bool) -> None:
    forward = unrepeatable()[name]
    smart = SmartLoss(build(), memory_efficient=memory_efficient)
    with pytest.warns(SmartWarning, match=TOLD):
        smart(forward)
    smart(forward)  # once: warnings are errors here
    SmartLoss(build(), memory_efficient=memory_efficient, check_first_call=False)(unrepeatable()[name])
    with pytest.warns(SmartWarning, match=TOLD):
        diagnose(build(), unrepeatable()[name], epsilons=[0.1])


def test_how_far_it_is_off_is_told() -> None:
    model, factors = build(), iter([1.0, 3.0, 1.0])
    with pytest.warns(SmartWarning, match=TOLD) as told:
        SmartLoss(model)(lambda m: m(IDS) * next(factors))
    output = model(IDS).detach()
    largest, off = output.abs().max().item(), 2 * output.abs().max().item()
    divergence = reference.symmetric_kl((3 * output).numpy(), output.numpy())
    text = str(told[0].message)
    assert f"outputs of up to {largest:.3g} are off by up to {off:.3g}" in text
    assert f"divergence of the two, {divergence:.3g}," in text


def test_other_shapes_are_told() -> None:
    parts = iter([slice(3), slice(2), slice(3)])
    with pytest.warns(SmartWarning, match=r"outputs are of shape \[\(3, 3\)\], and \[\(2, 3\)\] when"):
        SmartLoss(build())(lambda m: m(IDS)[next(parts)])


@both_modes
@pytest.mark.parametrize("dropout", ["shared", "independent"])
def test_a_repeatable_forward_is_no_news(dropout: Any, memory_efficient: bool) -> None:
    model = build(dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SmartLoss(model, dropout=dropout, memory_efficient=memory_efficient)(lambda m: m(IDS))


@both_modes
def test_the_look_is_one_pass_once_for_each_forward_and_mode(memory_efficient: bool) -> None:
    model = build()
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    passes = []
    for train, call in ((True, lambda m: m(IDS)), (True, lambda m: m(IDS, MASK)), (False, lambda m: m(IDS))):
        model.train(train)
        for _ in range(2):
            with counting(model) as count:
                smart(call)
            passes.append(count())
    usual = 3 if memory_efficient else 2
    assert passes[:4] == [usual + 1, usual, usual + 1, usual]
    assert passes[4:] == [usual + 1, usual]


@both_modes
def test_the_look_changes_nothing(memory_efficient: bool) -> None:
    found = []
    for check in (True, False):
        model = nn.Sequential(
            nn.Embedding(VOCABULARY, FEATURES), nn.Flatten(), nn.BatchNorm1d(4 * FEATURES), nn.Dropout(0.5)
        ).double()
        torch.manual_seed(1)
        nn.init.normal_(model[0].weight)
        smart = SmartLoss(
            model, embedding="0", start="noise", check_first_call=check, memory_efficient=memory_efficient
        )
        outputs, penalty = smart(lambda m: m(IDS))
        (outputs.square().sum() + penalty).backward()
        found.append([outputs, penalty, model[0].weight.grad, *model.buffers(), torch.rand(1)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_functions_are_looked_at_too() -> None:
    fresh = random.SystemRandom()
    with pytest.warns(SmartWarning, match=TOLD):
        smoothness_penalty(lambda x: x[:, 0] * fresh.random(), torch.rand(3, 2, 4))
    smoothness_penalty(lambda x: x[:, 0] * fresh.random(), torch.rand(3, 2, 4), check_first_call=False)
    smoothness_penalty(lambda x: x[:, 0] * (1 + random.random()), torch.rand(3, 2, 4))  # replayed


def test_the_switch_is_a_switch() -> None:
    with pytest.raises(TypeError, match="check_first_call must be True or False, got 1"):
        SmartLoss(build(), check_first_call=1)  # type: ignore[arg-type]  # on purpose
