"""The warning for perturbations that the dtype in use cannot carry: when, how often, and whether its number is true."""

import copy
import math
import re
import warnings
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numerics_models as models
import pytest
import torch
from smart_models import algorithm_1
from torch import nn

from smartreg import SmartLoss, SmartWarning, smoothness_penalty
from smartreg._ascent.precision import cosine_from, resolution

SETTINGS = {
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float16),
    "bf16 weights": (torch.bfloat16, None),
}
TINY = {"epsilon": 1e-5, "step_size": 1e-5, "noise_std": 1e-5}


def call(smart: SmartLoss, autocast: torch.dtype | None = None, **options: Any) -> list[str]:
    """One call; the texts of the warnings."""
    ids = models.sentences()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            smart(lambda m: m(ids), **options)
    assert all(issubclass(w.category, SmartWarning) for w in caught)
    return [str(w.message) for w in caught]


def smallest(text: str, name: str = "epsilon") -> float:
    found = re.search(rf"dtype is .*?{name}=([0-9.e+-]+)", text)
    assert found is not None
    return float(found.group(1).rstrip(","))


def crossing(model: models.Encoder, autocast: torch.dtype | None, wanted: float = 0.9) -> float:
    """The size of the noise, in root mean squares, where the cosine with float64 reaches 0.9, over three directions."""
    ids, exact = models.sentences(), models.in_float64(model)
    rms = model.words(ids).float().square().mean().sqrt().item()
    sizes = [10 ** (-3 + k / 5) for k in range(15)]
    generator = torch.Generator().manual_seed(3)
    units = [rms * torch.randn(*ids.shape, 32, generator=generator) for _ in range(3)]
    for size in sizes:
        cosines = [
            models.cosine(
                models.direction(model, ids, size * unit, autocast),
                models.direction(exact, ids, size * unit.double()),
            )
            for unit in units
        ]
        if sum(cosines) / len(cosines) >= wanted:
            return size
    raise AssertionError("the cosine never reaches 0.9")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_warned_size_is_where_the_cosine_falls_under_nine_tenths(name: str) -> None:
    """On two models whose embeddings differ tenfold, in the unit that the user uses."""
    weights, autocast = SETTINGS[name]
    absolute, relative = {}, {}
    for scale in (1.0, 10.0):
        model = models.build(scale).to(weights)
        truth = crossing(model, autocast)
        torch.manual_seed(2)
        (text,) = call(algorithm_1(model, epsilon_scale="absolute", **TINY), autocast)
        absolute[scale] = smallest(text)
        (text,) = call(algorithm_1(model, **TINY), autocast)
        relative[scale] = smallest(text)
        assert truth / 2.5 < relative[scale] < truth * 2.5
        assert truth / 2.5 < absolute[scale] / scale < truth * 2.5
    assert 4.0 < absolute[10.0] / absolute[1.0] < 25.0
    assert 0.4 < relative[10.0] / relative[1.0] < 2.5


def test_the_estimate_of_the_cosine() -> None:
    """Signal and three roundings of one power, drawn: the agreement tells the cosine."""
    generator = torch.Generator().manual_seed(4)
    signal, *noise = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(4))
    for power in (0.1, 0.5, 1.0):
        clean, up, down = (math.sqrt(power) * n for n in noise)
        plus, minus = signal + up - clean, -signal + down - clean
        estimated = cosine_from(models.cosine(plus, -minus))
        assert estimated == pytest.approx(models.cosine(plus, signal), abs=0.01)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_said_at_the_defaults(name: str) -> None:
    weights, autocast = SETTINGS[name]
    assert call(SmartLoss(models.build().to(weights)), autocast) == []


@pytest.mark.parametrize("smart", [SmartLoss, SmartLoss.paper])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_further_pass_in_full_precision(smart: Any, dtype: torch.dtype) -> None:
    """Clean, the ascent steps, perturbed: also at the published sizes, on embeddings of ordinary size."""
    model = models.build(scale=0.05).to(dtype)
    with models.counted_passes(model) as passes:
        regularizer = smart(model)
        assert call(regularizer) == []
        assert passes() == 2 + regularizer.settings.steps


def test_float32_is_measured_where_it_may_be_too_coarse() -> None:
    model = models.build()
    with models.counted_passes(model) as passes:
        (text,) = call(algorithm_1(model, epsilon=1e-8, step_size=1e-8, noise_std=1e-8))
        assert passes() == 13
    assert "float32" in text
    assert 1e-8 < smallest(text) < 1e-4


def test_once_for_each_dtype() -> None:
    model = models.build()
    smart = algorithm_1(model, **TINY)
    with models.counted_passes(model) as passes:
        assert len(call(smart, torch.bfloat16)) == 1
        assert passes() == 13
        assert call(smart, torch.bfloat16) == []
        assert passes() == 16
        assert len(call(smart, torch.float16)) == 1
        assert call(smart, torch.float16) == []
        model.bfloat16()
        assert len(call(smart)) == 1
        assert passes() == 16 + 13 + 3 + 13


@pytest.mark.parametrize("size", [1e-5, 0.01, 0.15])
def test_the_number_of_passes_is_the_same_whatever_the_numbers_are(size: float) -> None:
    """Ranks of a distributed model must not part."""
    model = models.build()
    with models.counted_passes(model) as passes:
        call(algorithm_1(model, epsilon=size, step_size=size, noise_std=size), torch.bfloat16)
        assert passes() == 13


def test_warnings_as_errors_leave_everything_as_it_was() -> None:
    model, ids = models.build(dropout=0.1), models.sentences()
    smart = SmartLoss(model, **TINY)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(SmartWarning, match="too small for bfloat16 autocast"):
            smart(lambda m: m(ids))
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert model.training
        smart(lambda m: m(ids))[1].backward()  # once is once


def test_looking_draws_no_random_number() -> None:
    states = []
    for size in (1e-5, 0.15):
        model, ids = models.build(dropout=0.1), models.sentences()
        smart = SmartLoss(model, epsilon=size, step_size=size, noise_std=size, dropout="independent")
        for _ in range(2):  # the first looks, the second does not
            torch.manual_seed(6)
            with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
                warnings.simplefilter("ignore", SmartWarning)
                smart(lambda m, ids=ids: m(ids))
            states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_independent_dropout_is_not_taken_for_rounding() -> None:
    assert call(SmartLoss(models.build(dropout=0.3), dropout="independent"), torch.bfloat16) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epsilon": 1e-4, "noise_std": 0.2}, ["epsilon"]),
        ({"epsilon": 0.2, "noise_std": 1e-4}, ["noise_std"]),
        ({"epsilon": 1e-4, "noise_std": 1e-4}, ["noise_std", "epsilon"]),
        ({"epsilon": 1e-4, "noise_std": 0.2, "ascent": "normalized"}, []),
        ({"epsilon": 1e-4, "noise_std": 0.2, "steps": 0}, ["epsilon"]),
        ({"epsilon": 0.0, "noise_std": 0.2}, []),
    ],
)
def test_what_is_named(options: dict[str, Any], named: list[str]) -> None:
    torch.manual_seed(7)
    texts = call(algorithm_1(models.build(), **options), torch.bfloat16)
    assert len(texts) == bool(named)
    asked = texts[0].split(": too small")[0] if texts else ""
    assert [name for name in ("noise_std", "epsilon") if name in asked] == named


def test_given_noise_counts_with_its_own_size() -> None:
    model, ids = models.build(), models.sentences()
    noise = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(8))
    (text,) = call(algorithm_1(model), torch.bfloat16, noise=1e-4 * noise)
    size = float(text.removeprefix("noise_std=").split(":")[0])
    assert size == pytest.approx(1e-4, rel=0.1)
    assert call(algorithm_1(model), torch.bfloat16, noise=0.15 * noise) == []


def test_two_norm_is_counted_in_entries() -> None:
    """An absolute 2-norm of the sentence is spread over its 6 · 32 entries."""
    texts = {}
    for norm in ("inf", "2"):
        torch.manual_seed(9)
        (texts[norm],) = call(algorithm_1(models.build(), norm=norm, epsilon_scale="absolute", **TINY), torch.bfloat16)
    ratio = smallest(texts["2"]) / smallest(texts["inf"])
    assert ratio == pytest.approx(math.sqrt(6 * 32), rel=0.1)
    assert smallest(texts["2"], "noise_std") == smallest(texts["inf"], "noise_std")


def test_ascent_without_autocast_still_warns_of_the_penalty() -> None:
    model = models.build()
    torch.manual_seed(10)
    (text,) = call(SmartLoss(model, epsilon=1e-4, steps=1, ascent_autocast=False), torch.bfloat16)
    assert text.startswith("epsilon=0.0001")
    assert "ascent_autocast" not in text
    (text,) = call(SmartLoss(model, epsilon=1e-4, steps=1), torch.bfloat16)
    assert "ascent_autocast=False" in text


def test_without_a_step_autocast_has_no_ascent_to_be_switched_off_in() -> None:
    """Neither is it a remedy then, nor is a pass run for it."""
    model, passes = models.build(), []
    model.register_forward_hook(lambda *_: passes.append(torch.is_autocast_enabled("cpu")))
    (text,) = call(SmartLoss(model, epsilon=1e-4), torch.bfloat16)
    assert text.endswith("Remedy: use larger values, or switch autocast off for this call")
    counts = []
    for ascent_autocast in (True, False):
        smart = SmartLoss(model, ascent_autocast=ascent_autocast, check_first_call=False)
        call(smart, torch.bfloat16)  # which looks at the precision
        passes.clear()
        assert call(smart, torch.bfloat16) == []
        counts.append(list(passes))
    assert counts == [[True, True]] * 2


def test_another_size_is_another_question() -> None:
    """A function has no object that goes with its settings: each call may have its own."""
    weights, embeds = torch.randn(8, 3), torch.randn(4, 5, 8)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x).mean(1) @ weights

    with torch.autocast("cpu", torch.bfloat16):
        assert smoothness_penalty(fn, embeds, epsilon=0.3).penalty > 0
        with pytest.warns(SmartWarning, match="epsilon=0.0001: too small for bfloat16 autocast"):
            smoothness_penalty(fn, embeds, epsilon=1e-4)
        smoothness_penalty(fn, embeds, epsilon=1e-4)  # it has been said


def test_a_perturbation_that_vanishes_altogether() -> None:
    """bfloat16 weights: x + δ rounds to x, both gradients are exactly zero."""

    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 4)
            self.head = nn.Linear(4, 3)
            nn.init.ones_(self.words.weight)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head((self.words(ids) * 8).round().mean(1))

    ids = models.sentences()
    smart = algorithm_1(Rounds(), embedding="words", **TINY)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(SmartWarning, match="no larger value up to a quarter of the embeddings"),
    ):
        smart(lambda m: m(ids))


def test_a_copy_looks_again_and_memory_efficient_mode_looks_too() -> None:
    model = models.build()
    smart = SmartLoss(model, memory_efficient=True, **TINY)
    assert len(call(smart, torch.bfloat16)) == 1
    assert call(smart, torch.bfloat16) == []
    assert len(call(copy.deepcopy(smart), torch.bfloat16)) == 1


def test_under_inference_mode_nothing_is_measured() -> None:
    model = models.build()
    with torch.inference_mode(), models.counted_passes(model) as passes:
        assert call(algorithm_1(model, steps=0, epsilon=1e-5, noise_std=1e-5), torch.bfloat16) == []
        assert passes() == 2


class Bound:
    """The part of a model after its embedding, as a method that counts its calls."""

    def __init__(self, model: models.Encoder) -> None:
        self.model, self.calls = model, 0

    def run(self, embeds: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.model.head(self.model.layers(self.model.norm(embeds / self.model.scale)).mean(1))


def functional(fn: Any, embeds: torch.Tensor, autocast: torch.dtype | None, **options: Any) -> list[str]:
    """One call of `smoothness_penalty`; the texts of the warnings, each of which points here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            smoothness_penalty(fn, embeds, **options)
    assert all(issubclass(w.category, SmartWarning) and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_the_functional_form_warns_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartreg.functional._looks", WeakKeyDictionary())
    for scale in (1.0, 10.0):
        model = models.build(scale)
        embeds = model.words(models.sentences())
        torch.manual_seed(2)
        (theirs,) = call(SmartLoss(model, **TINY), torch.bfloat16)
        torch.manual_seed(2)
        (ours,) = functional(Bound(model).run, embeds, torch.bfloat16, **TINY)
        assert smallest(ours) == smallest(theirs)
        monkeypatch.setattr("smartreg.functional._looks", WeakKeyDictionary())


def test_the_functional_form_looks_once_for_each_place_in_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartreg.functional._looks", WeakKeyDictionary())
    bound, embeds = Bound(models.build()), models.sentences()
    embeds = bound.model.words(embeds)
    found = [len(functional(lambda x: bound.run(x), embeds, torch.bfloat16, **TINY)) for _ in range(3)]
    assert found == [1, 0, 0]
    assert bound.calls == 13 + 3 + 3
    assert len(functional(lambda x: bound.run(x), embeds, torch.float16, **TINY)) == 1, "another line, another dtype"
    assert [len(functional(bound.run, embeds, torch.bfloat16, **TINY)) for _ in range(2)] == [1, 0], "a bound method"
    assert [len(functional(partial(bound.run), embeds, torch.bfloat16, **TINY)) for _ in range(2)] == [0, 0]
    assert functional(lambda x: bound.run(x), embeds, None, **TINY) == []
    assert functional(lambda x: bound.run(x), embeds, torch.bfloat16) == [], "nothing is said at the defaults"


def test_the_functional_form_does_not_take_dropout_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smartreg.functional._looks", WeakKeyDictionary())
    bound = Bound(models.build(dropout=0.3))
    embeds = bound.model.words(models.sentences())
    options = {"dropout": "independent"}
    torch.manual_seed(3)
    assert functional(lambda x: bound.run(x), embeds, torch.bfloat16, **options) == []
    reference = bound.run(embeds)
    assert functional(lambda x: bound.run(x), embeds, torch.bfloat16, reference=reference, **options, **TINY) == []


def test_tensor_float_32_has_the_resolution_of_float16() -> None:
    cuda, before = torch.device("cuda"), torch.get_float32_matmul_precision()
    full, short = torch.finfo(torch.float32).eps, torch.finfo(torch.float16).eps
    try:
        torch.set_float32_matmul_precision("highest")
        assert resolution(cuda, [torch.float32]) == full
        torch.set_float32_matmul_precision("high")
        assert resolution(cuda, [None, torch.float32]) == short
        assert resolution(cuda, [torch.float64]) == torch.finfo(torch.float64).eps
        assert resolution(torch.device("cpu"), [torch.float32]) == full
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_depends_on_no_perturbation_cannot_be_judged() -> None:
    from types import SimpleNamespace

    from smartreg._ascent.precision import agreement, smallest_useful

    flat: Any = SimpleNamespace(gradient=lambda deltas: (torch.zeros(()), None), dtypes=[torch.bfloat16])
    balls: Any = [SimpleNamespace(embeddings=torch.zeros(1, 2, 3))]
    assert agreement(flat, balls, [torch.zeros(1, 2, 3)]) is None
    assert smallest_useful(flat, balls, [torch.zeros(1, 2, 3)]) is None


def test_an_autocast_inside_of_forward_cannot_be_switched_off_and_that_is_told_once() -> None:
    model, ids = models.build(), models.sentences()
    smart = SmartLoss(model, ascent_autocast=False, steps=1, check_first_call=False)

    def inside(m: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return m(ids)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            smart(inside)
    assert [str(w.message).split(":")[0] for w in caught] == ["ascent_autocast=False has no effect"]
    assert call(smart, torch.bfloat16) == []


def test_a_loss_scale_that_settles_is_no_news_where_autocast_is_inside_of_forward() -> None:
    torch.manual_seed(0)
    model, ids, bad = (
        nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 3)),
        torch.arange(20).view(4, 5),
        [],
    )
    with torch.no_grad():
        model[2].weight.mul_(300)

    def inside(m: nn.Module) -> Any:
        with torch.autocast("cpu", torch.float16):
            return m(ids).float()

    smart = SmartLoss(model, embedding="0", check_first_call=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            smart(inside)
            bad.append(smart.stats.bad_examples)
    assert bad[0] == len(ids)  # the first scale was too large
    assert bad[-1] == 0
