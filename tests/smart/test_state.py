"""After a call nothing has changed but the graph, also when `forward` raises in any pass."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from smart_models import ALGORITHM_1, CLASSES, FEATURES, VOCABULARY, Sentence, algorithm_1, batch, both_modes, build
from torch import Tensor, nn

from smartreg import SmartLoss, symmetric_kl

IDS, _ = batch(examples=4, tokens=5)


class Stateful(nn.Module):
    """Everything that a pass may touch: buffers written, replaced, shared and made on the way, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.quiet = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.3)).eval()
        self.quiet.requires_grad_(False)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(FEATURES))
        self.register_buffer("absent", None)
        self.quiet.register_buffer("shared", self.calls)
        self.auxiliary: Any = "before"
        self.first_ids: Any = None
        self.fail: Callable[[], None] = lambda: None

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        self.calls.add_(1)
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.linspace(0.0, 1.0, ids.shape[1]).unsqueeze(-1))
            self.made_on_the_way = True
        h = self.dropout(self.embedding(ids)) + self.positions
        h = h * self.average * (1 + 0.1 * self.quiet.shared)  # the graph saves a buffer
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(dim=(0, 1))
        self.auxiliary = h.square().mean()
        self.fail()
        h = self.norm(self.quiet(h).transpose(1, 2)).mean(dim=-1)
        return self.head(h)


def make() -> Stateful:
    torch.manual_seed(0)
    model = Stateful().double()
    model.quiet.shared = model.calls  # .double() parted them
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    return model


def after_one_clean_pass() -> tuple[Stateful, Tensor]:
    model = make()
    torch.manual_seed(1)
    return model, model(IDS)


def call(model: Stateful, forward: Callable[[Any], Any] = lambda m: m(IDS), **options: Any) -> Any:
    options = {"noise_std": 0.1, "generator": torch.Generator().manual_seed(2), **options}
    smart = SmartLoss(model, **options)
    torch.manual_seed(1)
    return smart(forward)


def check_unchanged(model: Stateful, before: dict[str, Any]) -> None:
    """All but what a clean pass makes of the buffers and attributes, which is compared with a twin."""
    assert torch.equal(torch.get_rng_state(), before["clean_rng"])  # first of all: the twin seeds it anew
    twin, _ = after_one_clean_pass()
    for name, parameter in model.named_parameters():
        assert parameter.grad is before["grad"][name]
        assert torch.equal(parameter.grad, dict(twin.named_parameters())[name].grad)
        assert torch.equal(parameter, dict(twin.named_parameters())[name])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before["requires_grad"]
    assert [module.training for module in model.modules()] == before["training"]
    buffers, expected = dict(model.named_buffers()), dict(twin.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)
    for name in ("calls", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert buffers[name] is before["buffers"][name]  # written in place by the clean pass, so the object stays
    assert model.quiet.shared is model.calls
    assert model.absent is None
    assert torch.equal(model.auxiliary, twin.auxiliary)
    assert model.made_on_the_way is True
    assert vars(model).keys() == vars(twin).keys()
    assert [hook.active for hook in model.embedding._forward_hooks.values()] == [None] * before["hooks"]


def snapshot(model: Stateful, hooks: int = 1) -> dict[str, Any]:
    after_one_clean_pass()
    return {
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "buffers": dict(model.named_buffers()),
        "clean_rng": torch.get_rng_state(),
        "hooks": hooks,
    }


@both_modes
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_nothing_has_changed(steps: int, memory_efficient: bool) -> None:
    model = make()
    before = snapshot(model, hooks=0)
    outputs, penalty = call(model, steps=steps, memory_efficient=memory_efficient)
    check_unchanged(model, before)  # the hook is gone with its SmartLoss
    assert torch.equal(outputs, after_one_clean_pass()[1])
    (outputs.sum() + penalty + model.auxiliary).backward()  # no saved tensor was written over
    assert model.quiet[0].weight.grad is before["grad"]["quiet.0.weight"]


@both_modes
def test_buffers_and_attributes_start_every_pass_as_before_the_call(memory_efficient: bool) -> None:
    model, seen = make(), []

    def forward(m: Stateful) -> Tensor:
        seen.append((int(m.calls), m.average.clone(), m.auxiliary))
        return m(IDS)

    call(model, forward, **ALGORITHM_1)
    call(model, forward, memory_efficient=memory_efficient, **ALGORITHM_1)
    assert [count for count, _, _ in seen] == [0, 0, 0] + [1] * (4 if memory_efficient else 3)
    assert all(torch.equal(average, seen[0][1]) for _, average, _ in seen[:3])
    assert all(torch.equal(average, seen[3][1]) for _, average, _ in seen[3:])
    assert not torch.equal(seen[0][1], seen[3][1])
    assert [attribute for _, _, attribute in seen[:3]] == ["before"] * 3
    assert all(attribute is seen[3][2] for _, _, attribute in seen[3:])
    assert int(model.calls) == 2


@both_modes
def test_zero_perturbation_is_zero_with_batch_norm_in_train_mode(memory_efficient: bool) -> None:
    assert call(make(), epsilon=0.0, memory_efficient=memory_efficient).penalty.item() == 0.0


@both_modes
def test_auxiliary_loss_has_a_live_graph(memory_efficient: bool) -> None:
    model = make()
    twin, _ = after_one_clean_pass()
    call(model, memory_efficient=memory_efficient)
    for one in (model, twin):
        one.zero_grad()
        one.auxiliary.backward()
    torch.testing.assert_close(model.embedding.weight.grad, twin.embedding.weight.grad, rtol=0, atol=0)
    assert model.embedding.weight.grad.abs().max() > 0


class Failure(Exception):
    pass


def failing_at(number: int) -> Callable[[], None]:
    calls = []

    def fail() -> None:
        calls.append(None)
        if len(calls) == number:
            raise Failure("on purpose")

    return fail


@pytest.mark.parametrize("where", ["inside the model", "after the model"])
@pytest.mark.parametrize(
    ("failing", "memory_efficient"), [(2, False), (3, False), (4, False), (2, True), (3, True), (4, True), (5, True)]
)
def test_forward_raises_in_a_later_pass(failing: int, where: str, memory_efficient: bool) -> None:
    """Passes: clean, two of ascent, perturbed, and clean again if memory-efficient."""
    model = make()
    smart = SmartLoss(model, steps=2, generator=torch.Generator().manual_seed(2), memory_efficient=memory_efficient)
    before = snapshot(model)
    fail = failing_at(failing)
    if where == "inside the model":
        model.fail = fail
    torch.manual_seed(1)
    with pytest.raises(Failure, match="on purpose"):
        smart(lambda m: (m(IDS), fail())[0] if where == "after the model" else m(IDS))
    check_unchanged(model, before)
    model.fail = lambda: None
    assert torch.isfinite(smart(lambda m: m(IDS)).penalty)  # and it can be called again


@both_modes
def test_forward_raises_in_the_clean_pass(memory_efficient: bool) -> None:
    model = make()
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    before = snapshot(model)
    torch.manual_seed(1)
    fail = failing_at(1)
    with pytest.raises(Failure, match="on purpose"):
        smart(lambda m: (m(IDS), fail())[0])
    check_unchanged(model, before)


@both_modes
@pytest.mark.parametrize("culprit", ["divergence", "noise", "output_to_logits", "mask"])
def test_something_else_raises(culprit: str, memory_efficient: bool) -> None:
    model = make()
    fail = failing_at(2 if culprit in ("divergence", "output_to_logits") else 1)

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        fail()
        return symmetric_kl(a, b)

    def noise(embeddings: Tensor) -> Tensor:
        fail()
        return torch.zeros_like(embeddings)

    def to_logits(outputs: Tensor) -> Tensor:
        fail()
        return outputs

    smart = algorithm_1(
        model, memory_efficient=memory_efficient, output_to_logits=to_logits if culprit == "output_to_logits" else None,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    before = snapshot(model)
    torch.manual_seed(1)
    with pytest.raises((Failure, ValueError), match=r"on purpose|mask must have the shape"):
        smart(
            lambda m: m(IDS),
            divergence=divergence if culprit == "divergence" else None,
            noise=noise if culprit == "noise" else None,
            mask=IDS[:, 1:] if culprit == "mask" else None,
        )
    check_unchanged(model, before)


def test_arguments_are_left_alone() -> None:
    model, mask, noise = make(), (IDS > 3).long(), torch.full((*IDS.shape, FEATURES), 0.1).double()
    kept = copy.deepcopy((IDS, mask, noise))
    SmartLoss(model, steps=2)(lambda m: m(IDS), mask=mask, noise=noise)
    for now, then in zip((IDS, mask, noise), kept, strict=True):
        assert torch.equal(now, then)
        assert not now.requires_grad


@both_modes
def test_a_model_in_eval_mode_stays_there(memory_efficient: bool) -> None:
    model = make().eval()
    model(IDS)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.norm.named_buffers()}
    penalty = call(model, memory_efficient=memory_efficient).penalty
    assert not any(module.training for module in model.modules())
    assert penalty.requires_grad
    assert penalty.item() > 0
    for name, buffer in model.norm.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


@both_modes
@pytest.mark.filterwarnings("ignore:`?torch.jit.script:DeprecationWarning")
def test_a_scripted_part_of_the_model(memory_efficient: bool) -> None:
    """Its buffers are no plain dict."""
    torch.manual_seed(0)
    norm = torch.jit.script(nn.BatchNorm1d(5 * FEATURES))
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, FEATURES), nn.Flatten(), norm, nn.Linear(5 * FEATURES, CLASSES)
    ).double()
    twin = copy.deepcopy(model)
    twin(IDS)
    SmartLoss(model, embedding="0", memory_efficient=memory_efficient)(lambda m: m(IDS)).penalty.backward()
    for (name, buffer), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=0, atol=0, msg=name)
    assert int(norm.num_batches_tracked) == 1
    zero = SmartLoss(model, embedding="0", epsilon=0.0, memory_efficient=memory_efficient)
    assert zero(lambda m: m(IDS)).penalty.item() == 0.0


def test_the_state_of_a_generator_travels_with_the_regularizer() -> None:
    def seeded(seed: int | None) -> SmartLoss:
        drawn = None if seed is None else torch.Generator().manual_seed(seed)
        torch.manual_seed(1)
        return SmartLoss(Sentence(), start="noise", generator=drawn)

    def penalty(smart: SmartLoss) -> float:
        return smart(lambda m: m(IDS)).penalty.item()

    first = seeded(2)
    penalty(first)
    state, expected = first.state_dict(), penalty(first)
    other = seeded(3)
    other.load_state_dict(state)
    assert penalty(other) == expected != penalty(other)
    assert seeded(None).state_dict() == {}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"generator"'):
        seeded(None).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"generator"'):
        seeded(3).load_state_dict({})


class Rotating(Sentence):
    """Holds a dict whose first key goes last in every pass, as caches do that drop what was used longest ago."""

    def __init__(self) -> None:
        super().__init__()
        self.recent = {"a": 1, "b": 2, "c": 3}

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        first = next(iter(self.recent))
        self.recent[first] = self.recent.pop(first)
        return super().forward(ids, mask)


@both_modes
def test_the_order_of_a_dict_is_as_after_one_pass(memory_efficient: bool) -> None:
    torch.manual_seed(0)
    model = Rotating()
    SmartLoss(model, memory_efficient=memory_efficient)(lambda m: m(IDS))
    assert list(model.recent.items()) == [("b", 2), ("c", 3), ("a", 1)]


def test_what_a_partial_hook_collects_is_as_after_one_pass() -> None:
    torch.manual_seed(0)
    model, features = Sentence(), {}

    def collect(into: dict[str, Tensor], module: Any, args: Any, output: Tensor) -> None:
        into["out"] = output

    model.hidden.register_forward_hook(functools.partial(collect, features))
    clean = model.hidden(model.dropout(model.embedding(IDS)))
    SmartLoss(model)(lambda m: m(IDS))
    assert torch.equal(features["out"], clean)


class Detached(Sentence):
    """Tells an embedding that is not among its modules, as models do that share one by a plain reference."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = (self.embedding,)
        del self.embedding

    def get_input_embeddings(self) -> nn.Module:
        return self.lent[0]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.lent[0](ids))).mean(dim=1))


def test_an_embedding_that_the_model_tells_and_does_not_register_is_perturbed() -> None:
    torch.manual_seed(0)
    model = Detached()
    assert not any(module is model.lent[0] for module in model.modules())
    assert SmartLoss(model)(lambda m: m(IDS)).penalty > 0


def test_modules_among_the_arguments_are_not_registered() -> None:
    model = build()
    head = nn.Linear(3, 3, dtype=torch.float64)
    smart = SmartLoss(model, embedding="embedding", output_to_logits=head, divergence=Learned())
    assert list(smart.parameters()) == []
    assert not any("output_to_logits" in name or "divergence" in name for name in smart.state_dict())


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        return (self.temperature * (p - q)).square().mean()


def test_a_ball_without_extent_draws_nothing() -> None:
    model = build()
    smart = SmartLoss(model, epsilon=0.0, check_first_call=False)
    before = torch.get_rng_state()
    _, penalty = smart(lambda m: m(IDS, torch.ones_like(IDS)))
    assert torch.equal(torch.get_rng_state(), before)
    assert penalty == 0.0
    assert smart.stats.bad_examples == 0


class Pair(NamedTuple):
    hidden: Tensor
    cell: Tensor


class Counted(Pair):
    """A named tuple that is made of something else than its items."""

    def __new__(cls, cells: int) -> "Counted":
        return cls._make(torch.zeros(cells, 1))


class Own(tuple[Tensor, ...]):
    """No tuple of which anybody knows how it is made."""

    __slots__ = ()

    @property
    def first(self) -> Tensor:
        return self[0]


@both_modes
def test_a_tuple_stays_of_its_kind(memory_efficient: bool) -> None:
    model = build()
    model.best, model.counted, model.own = torch.zeros(2, 3).max(dim=1), Counted(2), Own((torch.zeros(1),))

    def forward(m: Any) -> Tensor:
        m.best.values.add_(1)
        m.counted.cell.add_(1)
        return m(IDS) + m.own.first

    SmartLoss(model, memory_efficient=memory_efficient)(forward)
    assert type(model.best) is torch.return_types.max
    assert (type(model.counted), type(model.own)) == (Counted, Own)
    assert (model.best.values[0], model.counted.cell) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["tuple", "named", "list of tuples", "dict of tuples", "nested"])
@both_modes
def test_what_stands_in_a_tuple_is_as_after_one_pass(memory_efficient: bool, kind: str) -> None:
    """As the state of a recurrent layer, which torch hands out as a tuple."""
    model, counter = build(), torch.zeros(2, 1)
    held = Pair(*counter) if kind == "named" else tuple(counter)
    model.held = {"list of tuples": [held], "dict of tuples": {"a": held}, "nested": ((held,),)}.get(kind, held)

    def forward(m: Any) -> Tensor:
        found = {"list of tuples": lambda h: h[0], "dict of tuples": lambda h: h["a"], "nested": lambda h: h[0][0]}
        state = found.get(kind, lambda h: h)(m.held)
        assert type(state) is type(held)
        state[0].add_(1)
        return m(IDS) * (1 + state[0])

    _, penalty = SmartLoss(model, memory_efficient=memory_efficient, epsilon=0.0)(forward)
    assert penalty == 0.0  # every pass began with the same state
    assert counter.flatten().tolist() == [1.0, 0.0]
    before = model.held
    SmartLoss(model, memory_efficient=memory_efficient)(forward)
    assert counter.flatten().tolist() == [2.0, 0.0]
    assert memory_efficient or model.held is before


def test_a_default_device_of_the_user_is_not_where_ours_is_made() -> None:
    model = build()
    with torch.device("meta"):
        _, penalty = SmartLoss(model)(lambda m: m(IDS))
    assert penalty > 0
