"""Random state: which dropout masks the passes see, and what a call leaves of torch's generators."""

from typing import Any

import pytest
import torch
from smart_models import CLASSES, FEATURES, VOCABULARY, Sentence, algorithm_1, batch, both_modes, build, perturbations
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from smartreg import SmartLoss, smoothness_penalty

IDS, MASK = batch(examples=4, tokens=5)


class Attentive(nn.Module):
    """One attention layer whose dropout is an argument of `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = 3 * self.embedding(ids).unsqueeze(1)  # (batch, one head, sequence, feature)
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)
        return self.head(x.squeeze(1).mean(dim=1))


def with_dropout_layers() -> tuple[nn.Module, Any]:
    return build(dtype=torch.float32, scale=3.0, dropout=0.3), lambda m: m(IDS, MASK)


def with_sdpa_dropout() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Attentive(), lambda m: m(IDS)


def with_hugging_face_bert() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    return model, lambda m: m(input_ids=IDS, attention_mask=MASK)


models = pytest.mark.parametrize("make", [with_dropout_layers, with_sdpa_dropout, with_hugging_face_bert])


@models
@both_modes
@pytest.mark.parametrize("how", ["epsilon", "noise and no steps"])
def test_shared_dropout_gives_exactly_zero_without_a_perturbation(make: Any, memory_efficient: bool, how: str) -> None:
    model, forward = make()
    options = {"epsilon": 0.0} if how == "epsilon" else {"noise_std": 0.0, "steps": 0}
    smart = algorithm_1(model, embedding=embedding_of(model), memory_efficient=memory_efficient, **options)
    for _ in range(3):
        assert smart(forward).penalty.item() == 0.0


@models
@both_modes
def test_independent_dropout_compares_two_masks(make: Any, memory_efficient: bool) -> None:
    model, forward = make()
    smart = SmartLoss(
        model, embedding=embedding_of(model), epsilon=0.0, dropout="independent", memory_efficient=memory_efficient
    )
    assert all(smart(forward).penalty.item() > 1e-3 for _ in range(3))
    model.eval()
    assert smart(forward).penalty.item() == 0.0


def embedding_of(model: nn.Module) -> str | None:
    return "embedding" if isinstance(model, Attentive) else None


def masks_of(model: Sentence, **options: Any) -> list[Tensor]:
    """Which entries the dropout layer let through in every pass of one call."""
    masks: list[Tensor] = []
    handle = model.dropout.register_forward_hook(lambda module, args, output: masks.append(output != 0))
    SmartLoss(model, **options)(lambda m: m(IDS, MASK))
    handle.remove()
    return list(masks)


@both_modes
def test_every_pass_sees_the_masks_of_the_clean_one(memory_efficient: bool) -> None:
    model = build(dropout=0.5)
    masks = masks_of(model, steps=2, memory_efficient=memory_efficient)
    assert len(masks) == 5 if memory_efficient else 4
    assert not masks[0].all()
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@both_modes
def test_independent_passes_see_masks_of_their_own(memory_efficient: bool) -> None:
    model = build(dropout=0.5)
    masks = masks_of(model, steps=2, dropout="independent", memory_efficient=memory_efficient)
    if memory_efficient:
        assert torch.equal(masks[-1], masks[0])  # the clean pass once more, in the user's graph
        del masks[-1]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks) == 4


@both_modes
def test_output_is_that_of_a_plain_pass(memory_efficient: bool) -> None:
    model = build(dropout=0.3)
    torch.manual_seed(5)
    plain = model(IDS, MASK)
    torch.manual_seed(5)
    outputs, _ = SmartLoss(model, memory_efficient=memory_efficient)(lambda m: m(IDS, MASK))
    assert torch.equal(outputs, plain)


@both_modes
@pytest.mark.parametrize("steps", [0, 2])
def test_random_state_afterwards(steps: int, memory_efficient: bool) -> None:
    """As after one clean pass and one draw of the noise."""
    model = build(dropout=0.3)
    torch.manual_seed(5)
    model(IDS, MASK)
    noise = torch.randn(*IDS.shape, FEATURES, dtype=torch.float64)
    expected = torch.get_rng_state()

    torch.manual_seed(5)
    model.seen.clear()
    smart = algorithm_1(model, steps=steps, noise_std=1e-3, epsilon_scale="absolute", memory_efficient=memory_efficient)
    smart(lambda m: m(IDS, MASK))
    assert torch.equal(torch.get_rng_state(), expected)
    torch.testing.assert_close(perturbations(model)[0][0], 1e-3 * noise, rtol=0, atol=1e-15)  # and this is the draw


@both_modes
@pytest.mark.parametrize("how", ["generator", "noise", "noise_std"])
def test_random_state_afterwards_when_nothing_is_drawn_from_it(how: str, memory_efficient: bool) -> None:
    model = build(dropout=0.3)
    torch.manual_seed(5)
    model(IDS, MASK)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"generator": {"generator": generator}, "noise_std": {"noise_std": 0.0, "steps": 0}}
    smart = algorithm_1(model, memory_efficient=memory_efficient, **options.get(how, {}))
    smart(lambda m: m(IDS, MASK), noise=torch.ones_like if how == "noise" else None)
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state()) == (how != "generator")


@both_modes
def test_independent_dropout_advances_the_random_state_by_every_pass(memory_efficient: bool) -> None:
    model = build(dropout=0.3)
    torch.manual_seed(5)
    model(IDS, MASK)
    torch.randn(*IDS.shape, FEATURES, dtype=torch.float64)
    for _ in range(3):
        model(IDS, MASK)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    smart = algorithm_1(model, steps=2, dropout="independent", memory_efficient=memory_efficient)
    smart(lambda m: m(IDS, MASK))
    assert torch.equal(torch.get_rng_state(), expected)


def test_generator_decides_the_noise_and_nothing_else() -> None:
    model = build(dropout=0.3)

    def call(seed_of_noise: int, seed_of_dropout: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed_of_dropout)
        model.seen.clear()
        smart = algorithm_1(model, generator=torch.Generator().manual_seed(seed_of_noise))
        return smart(lambda m: m(IDS, MASK)).outputs, perturbations(model)[0][0]

    (outputs, noise), (others, same), (outputs_again, other) = call(1, 1), call(1, 2), call(2, 1)
    assert torch.equal(noise, same)
    assert not torch.equal(noise, other)
    assert torch.equal(outputs, outputs_again)
    assert not torch.equal(outputs, others)


def test_a_second_call_draws_other_noise() -> None:
    model = build()
    smart = algorithm_1(model, generator=torch.Generator().manual_seed(1))
    smart(lambda m: m(IDS, MASK))
    smart(lambda m: m(IDS, MASK))
    passes = [model.seen[index] - model.seen[0] for index in (1, 4)]
    assert not torch.equal(passes[0], passes[1])


def test_noise_has_the_standard_deviation_asked_for() -> None:
    ids = torch.randint(1, VOCABULARY, (2, 4000), generator=torch.Generator().manual_seed(0))
    for scale in ("rms", "absolute"):
        model = build(scale=3.0)
        smart = algorithm_1(model, noise_std=0.02, epsilon=9.0, steps=0, epsilon_scale=scale)
        smart(lambda m: m(ids), mask=torch.ones_like(ids))
        (noise,) = perturbations(model)[0]
        unit = model.seen[0].square().mean(dim=(1, 2)).sqrt() if scale == "rms" else torch.ones(2)
        # 16,000 draws: a standard error of 0.6 %
        torch.testing.assert_close(noise.std(dim=(1, 2)) / unit, torch.full((2,), 0.02).double(), rtol=0.03, atol=0)


def test_smoothness_penalty_shares_dropout_too() -> None:
    model = build(scale=3.0, dropout=0.3)
    embeds = model.embedding(IDS).detach()

    def fn(x: Tensor) -> Tensor:
        return model.head(torch.tanh(model.hidden(model.dropout(x))).mean(dim=1))

    torch.manual_seed(5)
    plain = fn(embeds)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    outputs, penalty = smoothness_penalty(fn, embeds, epsilon=0.0, noise_std=0.0)
    assert torch.equal(outputs, plain)
    assert penalty.item() == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert smoothness_penalty(fn, embeds, epsilon=0.0, dropout="independent").penalty.item() > 1e-3
    assert smoothness_penalty(fn, embeds, reference=fn(embeds), dropout="independent", epsilon=0.0).penalty > 1e-3
