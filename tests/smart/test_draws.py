"""Dropout masks that replays copy rather than draw: how often they are drawn, and that nothing else shows it."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from smart_models import CLASSES, FEATURES, VOCABULARY, algorithm_1, both_modes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smartreg import SmartLoss, smoothness_penalty
from smartreg._model import replay, sources
from smartreg._model.replay import WORTHWHILE_ENTRIES, RememberedDraws

# Dynamo looks at `.grad` of what enters a graph, and hides this warning in a way that does not reach pytest's filter.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

TOKENS = 64
LARGE = WORTHWHILE_ENTRIES // (TOKENS * FEATURES)
IDS = torch.randint(VOCABULARY, (LARGE, TOKENS), generator=torch.Generator().manual_seed(3))
SMALL = IDS[: LARGE // 2]
needs_modes_beside_compile = pytest.mark.skipif(
    not RememberedDraws.available(), reason="this torch would switch torch.compile off in such a block"
)
Layer = Callable[[Tensor], Tensor]


class Model(nn.Module):
    """Embedding, dropout, what the test asks for, dropout, mean over the tokens, head."""

    def __init__(self, between: Layer = torch.tanh, *, compiled: Any = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.between = between
        self.block: Layer = compiled(self._block) if compiled else self._block

    def _block(self, x: Tensor) -> Tensor:
        return F.dropout(self.between(self.linear(x)), 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(F.dropout(self.embedding(ids), 0.2)).mean(dim=1))


def model(between: Layer = torch.tanh, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(between, **options)


def other_draws(x: Tensor) -> Tensor:
    """Every kind of draw between two dropouts, one of them from a generator of its own."""
    x = x + 0.1 * torch.rand_like(x)
    x = F.alpha_dropout(x, 0.1, training=True)
    x = F.dropout1d(x, 0.1)
    x = x[:, torch.randperm(x.shape[1])]
    x = x * torch.empty_like(x).bernoulli_(0.9, generator=torch.Generator().manual_seed(1))
    return x * torch.bernoulli(torch.full_like(x, 0.9))


def one_draw_more_where_perturbed(x: Tensor) -> Tensor:
    """Draws on the clean embeddings and the perturbed ones that differ in number."""
    crowded = (x.detach().abs().amax() * 1e4).long() % 2
    return F.dropout(x, 0.1) if crowded else torch.tanh(x)


def half_the_shape(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    return torch.cat([F.dropout(left, 0.3), F.dropout(right.transpose(0, 1), 0.3).transpose(0, 1)], dim=1)


def attention(x: Tensor) -> Tensor:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask, dropout_p=0.2)[:, 0]


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(lambda x: F.dropout(torch.tanh(x), 0.3) * torch.rand_like(x), x, use_reentrant=False)


def higher_order(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, torch.tanh, torch.sin, (x,))


LAYERS = [
    torch.tanh, other_draws, one_draw_more_where_perturbed, half_the_shape, attention, checkpointed, higher_order
]  # fmt: skip


class Draws(TorchDispatchMode):
    """Counts the draws that reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.bernoulli_.float
        return func(*args, **(kwargs or {}))


def draws_of(call: Callable[[], Any]) -> int:
    with Draws() as draws:
        call()
    return draws.count


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[RememberedDraws]]:
    """Every memory of draws that the test has had made."""
    references: list[weakref.ref[RememberedDraws]] = []

    class Watched(RememberedDraws):
        def __init__(self) -> None:
            super().__init__()
            references.append(weakref.ref(self))

    monkeypatch.setattr(replay, "RememberedDraws", Watched)
    return references


@needs_modes_beside_compile
@both_modes
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_large_batch_draws_each_mask_once(memory_efficient: bool, steps: int) -> None:
    smart = SmartLoss(model(), embedding="embedding", steps=steps, memory_efficient=memory_efficient)
    assert [draws_of(lambda: smart(lambda m: m(IDS))) for _ in range(2)] == [2, 2]


@needs_modes_beside_compile
@both_modes
def test_small_batches_are_left_alone_after_the_first(memory_efficient: bool) -> None:
    smart = algorithm_1(model(), embedding="embedding", memory_efficient=memory_efficient)
    every_pass = 2 * (4 if memory_efficient else 3)
    counts = [draws_of(lambda ids=ids: smart(lambda m: m(ids))) for ids in (SMALL, SMALL, IDS, IDS, SMALL, SMALL)]
    assert counts == [2, every_pass, every_pass, 2, 2, every_pass]


@needs_modes_beside_compile
def test_the_function_of_embeddings_draws_each_mask_once() -> None:
    embedded = torch.randn(LARGE, TOKENS, FEATURES)
    assert draws_of(lambda: smoothness_penalty(lambda x: F.dropout(x, 0.2).mean(dim=1), embedded)) == 1
    assert draws_of(lambda: smoothness_penalty(lambda x: F.dropout(x, 0.2).mean(dim=1), embedded[1:])) == 3


def test_independent_masks_are_drawn_in_every_pass_and_not_kept(made: list[weakref.ref[RememberedDraws]]) -> None:
    smart = SmartLoss(model(), embedding="embedding", dropout="independent", epsilon=0.0)
    assert draws_of(lambda: smart(lambda m: m(IDS))) == 4
    assert smart.stats.penalty > 0
    embedded = torch.randn(LARGE, TOKENS, FEATURES)
    smoothness_penalty(lambda x: F.dropout(x, 0.2).mean(dim=1), embedded, dropout="independent")
    assert made == []


def test_nothing_is_watched_where_an_accelerator_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation that is looked at on the CPU would keep the accelerator waiting, which draws fast anyway."""
    monkeypatch.setattr(replay, "has_generator", lambda device: device.type == "cuda")
    monkeypatch.setattr(sources, "_get_state", lambda device: torch.zeros(1))
    for devices in ({"cuda:0"}, {"cpu", "cuda:0"}):
        state = replay.RandomState(map(torch.device, devices), remember_draws=True)
        assert not isinstance(state.draws, RememberedDraws)


def everything(made: Model, forward: Callable[[Any], Tensor], **options: Any) -> list[Tensor]:
    """What a user can see of two steps: outputs, penalties, gradients, and the state of the generator."""
    smart = SmartLoss(made, embedding="embedding", **options)
    torch.manual_seed(7)
    seen: list[Tensor] = []
    for _ in range(2):
        outputs, penalty = smart(forward)
        seen += [outputs.detach(), penalty.detach(), torch.get_rng_state()]
        (outputs.float().square().mean() + penalty).backward()
        seen.append(torch.get_rng_state())
    return seen + [parameter.grad for parameter in made.parameters()]


@both_modes
@pytest.mark.parametrize("between", LAYERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_else_shows_it(
    between: Layer, memory_efficient: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"memory_efficient": memory_efficient, "steps": steps}
    remembered = everything(model(between), lambda m: m(IDS), **options)
    monkeypatch.setattr(RememberedDraws, "available", lambda: False)
    drawn = everything(model(between), lambda m: m(IDS), **options)
    assert len(drawn) == len(remembered)
    assert all(torch.equal(a, b) for a, b in zip(drawn, remembered, strict=True))


@both_modes
def test_nothing_else_shows_it_under_autocast(memory_efficient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: nn.Module) -> Tensor:
        return m(IDS)

    def steps() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return everything(model(), forward, memory_efficient=memory_efficient, ascent_autocast=False)

    remembered = steps()
    monkeypatch.setattr(RememberedDraws, "available", lambda: False)
    assert all(torch.equal(a, b) for a, b in zip(steps(), remembered, strict=True))


@both_modes
@pytest.mark.parametrize("between", [torch.tanh, attention, checkpointed, other_draws])
def test_without_a_perturbation_the_penalty_is_exactly_zero(between: Layer, memory_efficient: bool) -> None:
    smart = SmartLoss(model(between), embedding="embedding", epsilon=0.0, memory_efficient=memory_efficient)
    assert [smart(lambda m: m(IDS)).penalty.item() for _ in range(2)] == [0.0, 0.0]


@both_modes
def test_the_masks_are_gone_after_the_call(memory_efficient: bool, made: list[weakref.ref[RememberedDraws]]) -> None:
    smart = SmartLoss(model(), embedding="embedding", memory_efficient=memory_efficient)
    _, penalty = smart(lambda m: m(IDS))
    assert len(made) == 1
    assert made[0]() is None
    penalty.backward()


@needs_modes_beside_compile
@both_modes
def test_a_compiled_function_inside_stays_compiled(memory_efficient: bool) -> None:
    """Such a function draws for itself, and no module tells that it is compiled."""
    torch._dynamo.reset()
    counter = CompileCounter()
    made = model(compiled=lambda function: torch.compile(function, backend=counter, fullgraph=True))
    smart = SmartLoss(made, embedding="embedding", epsilon=0.0, memory_efficient=memory_efficient)
    assert [smart(lambda m: m(IDS)).penalty.item() for _ in range(3)] == [0.0, 0.0, 0.0]
    ours = counter.frame_count
    torch._dynamo.reset()
    made(IDS)
    assert ours == counter.frame_count - ours  # no more graphs than the model alone


def test_draws_and_generator_are_as_without() -> None:
    """One block entered twice: each draw by probability, dtype, shape and strides, from the state that it starts at."""

    def draw() -> list[Tensor]:
        torch.manual_seed(5)
        made = []
        for probability in (0.3, 0.3, 0.9):
            for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
                for empty in (torch.empty(40, 7, dtype=dtype), torch.empty(7, 40, dtype=dtype).t()):
                    state = torch.get_rng_state()
                    made.append(empty.bernoulli_(probability))
                    torch.set_rng_state(state)
                    made.append(torch.empty(20, 14, dtype=dtype).bernoulli_(probability))
                    made.append(torch.rand(3))
        return [*made, torch.get_rng_state()]

    expected = draw()
    remembered = RememberedDraws()
    for _ in range(2):
        with remembered:
            found = draw()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_what_the_caller_does_with_a_draw_stays_his(dtype: torch.dtype) -> None:
    """The first draw is written over; the second, from the same state, is what torch draws."""
    torch.manual_seed(5)
    expected = torch.empty(40, 7, dtype=dtype).bernoulli_(0.5)
    with RememberedDraws():
        for _ in range(3):
            torch.manual_seed(5)
            found = torch.empty(40, 7, dtype=dtype).bernoulli_(0.5)
            assert torch.equal(found, expected)
            found.copy_(found == 0)


@pytest.mark.parametrize("other", ["meta device", "tensor subclass"])
def test_only_plain_tensors_of_the_cpu_are_remembered(other: str) -> None:
    """A draw of another kind from the same state, of the same shape, is not copied to one, nor from one."""
    torch.manual_seed(5)
    expected = torch.empty(40, 7).bernoulli_(0.5)
    with RememberedDraws():
        for _ in range(2):
            torch.manual_seed(5)
            empty = torch.empty(40, 7)
            unlike = torch.empty(40, 7, device="meta") if other == "meta device" else TwoTensor(empty, empty.clone())
            drawn = unlike.bernoulli_(0.5)
            assert type(drawn) is type(unlike)
            torch.manual_seed(5)
            found = torch.empty(40, 7).bernoulli_(0.5)
            assert type(found) is Tensor
            assert torch.equal(found, expected)
