"""`memory_efficient=True`: the same values and gradients as the standard mode, from one graph at a time."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from smart_models import CLASSES, FEATURES, HIDDEN, VOCABULARY, Sentence, algorithm_1, batch, build, gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from smartreg import SmartLoss, mse, symmetric_kl

IDS, MASK = batch(examples=4, tokens=5)
OTHER, OTHER_MASK = batch(1, examples=4, tokens=3)
LABELS = torch.tensor([0, 1, 2, 0])

Scene = tuple[nn.Module, Callable[[Any], Any], dict[str, Any], dict[str, Any]]


class Checkpointed(Sentence):
    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded = self.embedding(ids)
        return checkpoint(lambda x: torch.tanh(self.hidden(self.dropout(x))).mean(dim=1), embedded, use_reentrant=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(VOCABULARY, FEATURES), nn.Dropout(0.2)
        self.vocabulary = nn.Linear(FEATURES, VOCABULARY, bias=False)
        self.vocabulary.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.vocabulary(torch.tanh(self.dropout(self.embedding(ids)).cumsum(dim=1)))


class Normalized(nn.Sequential):
    def __init__(self) -> None:
        layers = [nn.Embedding(VOCABULARY, FEATURES), nn.Flatten(), nn.BatchNorm1d(5 * FEATURES), nn.Dropout(0.2)]
        super().__init__(*layers, nn.Linear(5 * FEATURES, CLASSES))


def plain(model: nn.Module, **options: Any) -> Scene:
    return model, lambda m: m(IDS, MASK), options, {"mask": MASK}


def frozen_embedding() -> Scene:
    scene = plain(build(dropout=0.2))
    scene[0].embedding.requires_grad_(False)
    return scene


def frozen_but_the_head() -> Scene:
    scene = plain(build(dropout=0.2))
    scene[0].requires_grad_(False)
    scene[0].head.requires_grad_(True)
    return scene


def checkpointed() -> Scene:
    torch.manual_seed(0)
    return plain(Checkpointed(dropout=0.2).double())


def tied() -> Scene:
    torch.manual_seed(0)
    return Tied().double(), lambda m: m(IDS).mean(dim=1)[:, :CLASSES], {}, {}


def batch_norm() -> Scene:
    torch.manual_seed(0)
    return Normalized().double(), lambda m: m(IDS), {"embedding": "0"}, {}


def two_look_ups() -> Scene:
    model = build(dropout=0.2, sentences=2)
    return model, lambda m: m.compare(IDS, MASK, OTHER, OTHER_MASK), {}, {"mask": [MASK, OTHER_MASK]}


def outside_head_and_temperature() -> Scene:
    model = build(dropout=0.2)
    torch.manual_seed(3)
    outside, temperature = nn.Linear(CLASSES, CLASSES).double(), nn.Parameter(torch.tensor(0.7).double())
    both = nn.ModuleDict({"model": model, "outside": outside})
    both.register_parameter("temperature", temperature)

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return symmetric_kl(a / temperature, b / temperature)

    forward = lambda m: outside(m(IDS, MASK))  # noqa: E731
    return both, forward, {"divergence": divergence}, {"mask": MASK, "model": model}


def two_outputs() -> Scene:
    model = build(dropout=0.2)
    return model, lambda m: m(IDS, MASK), {"output_to_logits": lambda o: (o, 2 * o[:, :2])}, {}


def spectral_norm() -> Scene:
    scene = plain(build(dropout=0.2))
    parametrizations.spectral_norm(scene[0].hidden)
    return scene


def dropout_inside_the_embedding(dropout: str) -> Scene:
    scene = plain(build(), dropout=dropout)
    scene[0].embedding = nn.Sequential(scene[0].embedding, nn.Dropout(0.3))
    return scene


SCENES: dict[str, Callable[[], Scene]] = {
    "plain": lambda: plain(build(dropout=0.2)),
    "no steps": lambda: plain(build(dropout=0.2), steps=0),
    "two steps, norm 2 per token": lambda: plain(build(dropout=0.2), steps=2, norm="2", norm_over="token"),
    "independent dropout": lambda: plain(build(dropout=0.2), dropout="independent"),
    "detached reference": lambda: plain(build(dropout=0.2), detach_reference=True),
    "mse": lambda: plain(build(dropout=0.2), divergence=mse),
    "sparse": lambda: plain(build(dropout=0.2, sparse=True)),
    "frozen embedding": frozen_embedding,
    "frozen but the head": frozen_but_the_head,
    "checkpointed": checkpointed,
    "tied": tied,
    "batch norm": batch_norm,
    "two look-ups": two_look_ups,
    "outside head": outside_head_and_temperature,
    "dropout inside, shared": lambda: dropout_inside_the_embedding("shared"),
    "dropout inside, independent": lambda: dropout_inside_the_embedding("independent"),
    "two outputs": two_outputs,
    "spectral norm": spectral_norm,
}


def train_step(scene: Scene, *, memory_efficient: bool, accumulate: int = 3) -> tuple[list[float], Any]:
    """Gradient accumulation over calls; returns the penalties, and the gradients of everything with parameters."""
    everything, forward, options, arguments = scene
    arguments = dict(arguments)
    smart = SmartLoss(arguments.pop("model", everything), memory_efficient=memory_efficient, **options)
    torch.manual_seed(7)
    penalties = []
    for _ in range(accumulate):
        outputs, penalty = smart(forward, **arguments)
        loss = nn.functional.cross_entropy(outputs, LABELS) + 0.3 * penalty
        (loss / accumulate).backward()
        penalties.append(penalty.item())
    return penalties, gradients(everything)


def dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_same_penalty_and_gradients_as_the_standard_mode(scene: Callable[[], Scene]) -> None:
    (first, standard), (second, efficient) = (
        train_step(scene(), memory_efficient=False),
        train_step(scene(), memory_efficient=True),
    )
    assert first == second
    assert min(first) > 0
    assert [name for name, g in standard.items() if g is None] == [name for name, g in efficient.items() if g is None]
    for name, gradient in standard.items():
        if gradient is not None:
            assert efficient[name].is_sparse == gradient.is_sparse
            torch.testing.assert_close(dense(efficient[name]), dense(gradient), rtol=1e-12, atol=1e-12)


def test_those_gradients_are_more_than_the_task_loss() -> None:
    """So that the comparison above is not one of the task loss alone."""
    for name in ("plain", "outside head", "sparse"):
        everything, forward, options, arguments = SCENES[name]()
        arguments = dict(arguments)
        smart = SmartLoss(arguments.pop("model", everything), memory_efficient=True, **options)
        smart(forward, **arguments).penalty.backward()
        assert all(dense(g).abs().max() > 1e-6 for g in gradients(everything).values())


class Ignore(torch.autograd.Function):
    """Has its second argument in the graph, and no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def test_what_no_gradient_reaches_keeps_none() -> None:
    """A search for unused parameters must find them unused: the penalty's node has only leaves with a gradient."""
    model = build()
    model.unused = nn.Linear(2, 2)
    model.ignored = nn.Parameter(torch.ones(()).double())
    smart = SmartLoss(model, memory_efficient=True, detach_reference=True)
    _, penalty = smart(lambda m: Ignore.apply(m(IDS, MASK), m.ignored))
    entered, node = [], penalty.grad_fn
    while node is not None:
        entered += [leaf for leaf, _ in node.next_functions[1:] if leaf is not None]
        node = node.next_functions[0][0]
    leaves = [leaf.variable for leaf in entered if hasattr(leaf, "variable")]
    assert any(leaf is model.head.weight for leaf in leaves)
    assert not any(leaf is model.ignored for leaf in leaves)
    penalty.backward()
    assert model.unused.weight.grad is None
    assert model.ignored.grad is None
    assert model.head.weight.grad is not None


def test_retain_graph() -> None:
    model = build()
    _, penalty = SmartLoss(model, memory_efficient=True)(lambda m: m(IDS, MASK))
    penalty.backward(retain_graph=True)
    once = gradients(model)
    penalty.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-12, atol=0)


def test_gradient_scales_with_what_comes_from_above() -> None:
    model = build()
    _, penalty = SmartLoss(model, memory_efficient=True)(lambda m: m(IDS, MASK))
    parameters = list(model.parameters())
    once = torch.autograd.grad(penalty, parameters, retain_graph=True)
    scaled = torch.autograd.grad((penalty * 3).square(), parameters)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(b, 18 * penalty.item() * a, rtol=1e-12, atol=0)


def test_tensor_hooks_run_once_in_the_backward_of_the_user() -> None:
    model = build()
    seen: dict[str, list[Tensor]] = {"hidden": [], "embedding": [], "accumulated": []}
    model.hidden.weight.register_hook(lambda g: seen["hidden"].append(g.clone()))
    model.embedding.weight.register_hook(lambda g: seen["embedding"].append(g.clone()) or 2 * g)
    model.head.weight.register_post_accumulate_grad_hook(lambda p: seen["accumulated"].append(p.grad.clone()))
    twin = build()
    _, penalty = SmartLoss(model, memory_efficient=True, noise_std=0.1, generator=torch.Generator().manual_seed(1))(
        lambda m: m(IDS, MASK)
    )
    assert seen == {"hidden": [], "embedding": [], "accumulated": []}
    penalty.backward()
    assert {name: len(calls) for name, calls in seen.items()} == {"hidden": 1, "embedding": 1, "accumulated": 1}

    SmartLoss(twin, noise_std=0.1, generator=torch.Generator().manual_seed(1))(lambda m: m(IDS, MASK))[1].backward()
    torch.testing.assert_close(seen["hidden"][0], twin.hidden.weight.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(seen["accumulated"][0], twin.head.weight.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(model.embedding.weight.grad, 2 * twin.embedding.weight.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_no_more_than_one_graph_at_a_time(memory_efficient: bool) -> None:
    """Whether the activations that earlier passes saved are alive when a pass begins, and when it has ended."""
    model, activations, alive = build(), [], []

    def activate(embedded: Tensor) -> Tensor:
        activation = model.hidden(embedded)
        activations.append(weakref.ref(activation))
        return activation.square()  # saves the activation, which nobody else holds

    def forward(m: Sentence) -> Tensor:
        earlier = [a() is not None for a in activations]
        logits = m.head(activate(m.embedding(IDS)).mean(dim=1))
        alive.append((earlier, activations[-1]() is not None))
        return logits

    outputs, penalty = algorithm_1(model, steps=2, memory_efficient=memory_efficient)(forward)
    if memory_efficient:  # reference, two of ascent, perturbed, clean
        assert [earlier for earlier, _ in alive] == [[False] * number for number in range(5)]
        assert [own for _, own in alive] == [False, True, True, True, True]
    else:
        assert [earlier for earlier, _ in alive] == [[], [True], [True, False], [True, False, False]]
        assert [own for _, own in alive] == [True] * 4
    (outputs.sum() + penalty).backward()


def test_copy_of_the_model_has_the_same_gradients() -> None:
    """The stored gradients belong to the model that was called, not to a copy made since."""
    model = build()
    _, penalty = SmartLoss(model, memory_efficient=True)(lambda m: m(IDS, MASK))
    twin = copy.deepcopy(model)
    penalty.backward()
    assert twin.hidden.weight.grad is None
    assert model.hidden.weight.grad is not None
    assert model.hidden.weight.shape == (HIDDEN, FEATURES)
