"""How often and through what the model runs, which module is perturbed, and how several look-ups are told apart."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from smart_models import (
    CLASSES,
    FEATURES,
    HIDDEN,
    VOCABULARY,
    Sentence,
    algorithm_1,
    batch,
    build,
    counting,
    perturbations,
)
from torch import Tensor, nn

from smartreg import SmartLoss, SmartOutput, mse, symmetric_kl

IDS, MASK = batch()
OTHER, _ = batch(1, tokens=6)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_number_of_passes(steps: int, memory_efficient: bool, grad: bool) -> None:
    model = build()
    smart = algorithm_1(model, steps=steps, memory_efficient=memory_efficient)
    calls = []
    with counting(model) as passes, torch.set_grad_enabled(grad):
        outputs, penalty = smart(lambda m: (calls.append(m), m(IDS))[1])
    clean = 2 if memory_efficient and grad else 1
    assert passes() == clean + steps + 1
    assert calls == [model] * passes()
    with counting(model) as more:
        if grad:
            (outputs.sum() + penalty).backward()
    assert more() == 0


def test_epsilon_zero_needs_no_ascent() -> None:
    model = build()
    smart = SmartLoss(model, epsilon=0.0, steps=3)
    with counting(model) as passes:
        penalty = smart(lambda m: m(IDS)).penalty
    assert passes() == 2
    assert penalty.item() == 0.0
    assert all(not delta.any() for delta in perturbations(model)[0])


class Output(SimpleNamespace):
    pass


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_output_is_handed_on_unchanged(memory_efficient: bool) -> None:
    made = []

    def forward(m: Sentence) -> Output:
        made.append(Output(logits=m(IDS), extra=["anything"]))
        return made[-1]

    result = SmartLoss(build(), memory_efficient=memory_efficient)(forward)
    assert isinstance(result, SmartOutput)
    outputs, penalty = result
    assert outputs is made[-1 if memory_efficient else 0]
    assert (result.outputs, result.penalty) == (outputs, penalty)
    assert penalty.shape == ()
    assert outputs.logits.requires_grad


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_divergence_gets_perturbed_then_clean(memory_efficient: bool) -> None:
    pairs = []

    def divergence(perturbed: Tensor, clean: Tensor) -> Tensor:
        pairs.append((perturbed.detach().clone(), clean.detach().clone()))
        return (perturbed - clean).square().sum()

    smart = algorithm_1(build(), divergence=divergence, memory_efficient=memory_efficient)
    outputs, penalty = smart(lambda m: m(IDS))
    assert len(pairs) == 2  # one step, one final comparison
    assert all(torch.equal(clean, outputs) for _, clean in pairs)
    assert not any(torch.equal(perturbed, outputs) for perturbed, _ in pairs)
    assert penalty.item() == (pairs[-1][0] - outputs).square().sum().item()


def test_divergence_of_the_call_overrides_that_of_the_constructor() -> None:
    model, seen = build(), []

    def custom(a: Tensor, b: Tensor) -> Tensor:
        seen.append("custom")
        return mse(a, b)

    noise = torch.full((*IDS.shape, FEATURES), 0.01).double()
    smart = algorithm_1(model, divergence=custom)
    theirs = smart(lambda m: m(IDS), divergence="symmetric_kl", noise=noise).penalty
    assert seen == []
    assert theirs.item() == algorithm_1(model)(lambda m: m(IDS), noise=noise).penalty.item()
    assert smart(lambda m: m(IDS), noise=noise).penalty.item() == (
        algorithm_1(model, divergence="mse")(lambda m: m(IDS), noise=noise).penalty.item()
    )
    assert seen == ["custom", "custom"]


def test_several_outputs_are_summed() -> None:
    model = build(scale=3.0)
    noise = torch.full((*IDS.shape, FEATURES), 0.01).double()
    smart = SmartLoss(model, steps=0, output_to_logits=lambda out: (out["start"], out["end"]))
    outputs, penalty = smart(lambda m: {"start": m(IDS), "end": 2 * m(OTHER[:, :4])}, noise=[noise, noise])
    perturbed = [model.embedding(ids) + noise for ids in (IDS, OTHER[:, :4])]
    again = [model.head(torch.tanh(model.hidden(x)).mean(dim=1)) for x in perturbed]
    expected = symmetric_kl(again[0], outputs["start"]) + symmetric_kl(2 * again[1], outputs["end"])
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)


def test_each_look_up_has_its_own_perturbation() -> None:
    model, shapes = build(sentences=2), []

    def noise(embeddings: Tensor) -> Tensor:
        shapes.append(tuple(embeddings.shape))
        assert not embeddings.requires_grad
        return torch.full_like(embeddings, 0.01 * len(shapes))

    smart = SmartLoss(model, steps=0)
    smart(lambda m: m.compare(IDS, None, OTHER, None), noise=noise)
    assert shapes == [(3, 4, FEATURES), (3, 6, FEATURES)]  # once for each look-up, in order
    first, second = perturbations(model, lookups=2)[0]
    torch.testing.assert_close(first, torch.full_like(first, 0.01), rtol=0, atol=1e-15)
    torch.testing.assert_close(second, torch.full_like(second, 0.02), rtol=0, atol=1e-15)


def test_the_same_sentence_twice_is_perturbed_apart() -> None:
    model = build(sentences=2)
    SmartLoss(model)(lambda m: m.compare(IDS, None, IDS, None))
    first, second = perturbations(model, lookups=2)[0]
    assert not torch.equal(first, second)


class InPlace(Sentence):
    """Adds positions to the embeddings in place, as some models do."""

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded = self.embedding(ids)
        embedded += 100.0
        self.seen.append(embedded.detach().clone())
        return torch.tanh(self.hidden(embedded) / 100).mean(dim=1)


@pytest.mark.parametrize("options", [{}, {"memory_efficient": True}, {"dropout": "independent"}])
def test_embeddings_are_recorded_by_value(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = InPlace().double()
    recorded = []
    smart = SmartLoss(model, epsilon=0.5, steps=0, **options)
    smart(lambda m: m(IDS), noise=lambda x: (recorded.append(x), torch.full_like(x, 9.0))[1])
    assert torch.equal(recorded[0], model.embedding(IDS))
    rms = model.embedding(IDS).square().mean(dim=(1, 2)).sqrt()  # and the radius is theirs, not that of 100
    torch.testing.assert_close(perturbations(model)[0][0].amax(dim=(1, 2)), 0.5 * rms, rtol=1e-10, atol=0)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_with_a_detached_reference_each_has_a_backward_of_its_own(memory_efficient: bool) -> None:
    model = build()
    smart = SmartLoss(model, detach_reference=True, memory_efficient=memory_efficient)
    outputs, penalty = smart(lambda m: m(IDS), noise=torch.full((*IDS.shape, FEATURES), 0.01))
    outputs.sum().backward()
    penalty.backward()
    twin = build()
    outputs, penalty = SmartLoss(twin, detach_reference=True)(
        lambda m: m(IDS), noise=torch.full((*IDS.shape, FEATURES), 0.01)
    )
    (outputs.sum() + penalty).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", ["name", "module", "told"])
def test_ways_to_name_the_embedding(given: str) -> None:
    model = build()
    embedding: Any = {"name": "embedding", "module": model.embedding, "told": None}[given]
    SmartLoss(model, embedding=embedding)(lambda m: m(IDS))
    assert perturbations(model)[0][0].abs().max() > 0


def test_any_layer_may_be_perturbed() -> None:
    class Normed(Sentence):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(FEATURES)

        def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            normed = self.norm(self.embedding(ids))
            self.seen.append(normed.detach())
            return torch.tanh(self.hidden(normed)).mean(dim=1)

    torch.manual_seed(0)
    model = Normed()
    smart = algorithm_1(model, embedding="norm", steps=0, epsilon=0.25, epsilon_scale="absolute")
    smart(lambda m: m(IDS), noise=torch.full((*IDS.shape, FEATURES), 7.0))
    torch.testing.assert_close(perturbations(model)[0][0], torch.full((*IDS.shape, FEATURES), 0.25), rtol=0, atol=1e-6)


class Shared(nn.Module):
    """Tells a shared embedding that is never called; encoder and decoder look up in modules with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCABULARY, FEATURES)
        self.encoder, self.decoder = nn.Embedding(VOCABULARY, FEATURES), nn.Embedding(VOCABULARY, FEATURES)
        self.encoder.weight = self.decoder.weight = self.shared.weight
        self.unrelated = nn.Embedding(VOCABULARY, FEATURES)
        self.head = nn.Linear(FEATURES, VOCABULARY, bias=False)
        self.head.weight = self.shared.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.encoder(source).mean(dim=1, keepdim=True) + self.decoder(target) + self.unrelated(target)
        return self.head(torch.tanh(x))


def test_every_module_with_the_embedding_weight_is_perturbed() -> None:
    torch.manual_seed(0)
    model, shapes = Shared(), []
    smart = SmartLoss(model)
    smart(lambda m: m(IDS, OTHER), noise=lambda x: (shapes.append(x.shape[1]), torch.full_like(x, 0.1))[1])
    assert shapes == [4, 6]
    assert not model.head._forward_hooks  # a tied output projection is no look-up
    assert not model.unrelated._forward_hooks


def test_embeddings_of_other_shapes() -> None:
    """Example first, feature last: patches of a grid, or one vector an example."""
    torch.manual_seed(0)
    grid = nn.Sequential(nn.Embedding(VOCABULARY, FEATURES), nn.Flatten(), nn.Linear(6 * FEATURES, CLASSES))
    ids = torch.arange(12).reshape(2, 2, 3)
    smart = SmartLoss(grid, embedding="0", norm_over="token")
    assert smart(lambda m: m(ids), mask=torch.ones(2, 2, 3)).penalty.item() > 0
    bag = nn.Sequential(nn.EmbeddingBag(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, CLASSES))
    assert SmartLoss(bag, embedding="0")(lambda m: m(IDS), mask=torch.ones(3)).penalty.item() > 0


def test_penalty_is_float32_at_least() -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, None)):
        penalty = SmartLoss(build(dtype=dtype))(lambda m: m(IDS)).penalty
        assert penalty.dtype == (expected or torch.float32)
        own = SmartLoss(build(dtype=dtype), divergence=lambda p, q: (p - q).abs().mean())(lambda m: m(IDS)).penalty
        assert own.dtype == (expected or torch.float32)


def test_paper_values() -> None:
    settings = SmartLoss.paper(build()).settings
    assert (settings.epsilon, settings.step_size, settings.noise_std) == (1e-5, 1e-3, 1e-5)
    assert (settings.epsilon_scale, settings.norm, settings.norm_over, settings.steps) == (
        "absolute", "inf", "example", 1,
    )  # fmt: skip
    model = build()
    changed = SmartLoss.paper(model, epsilon=1e-2, memory_efficient=True)
    assert (changed.settings.epsilon, changed.settings.step_size, changed.memory_efficient) == (1e-2, 1e-3, True)
    assert changed.model is model
