"""`diagnose`: each column against its definition, the recommendation, and that nothing is left behind."""

import builtins
import math
from dataclasses import replace
from typing import Any

import numerics_models as models
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smartreg import SmartLoss, diagnose, symmetric_kl
from smartreg._ascent.verdict import ENOUGH, gentle, recommended_range, wilson
from smartreg.results import Diagnosis

IDS = models.sentences()
PRINTED: dict[str, Any] = {"norm": "inf", "start": "noise", "steps": 1}  # Algorithm 1
SIZES = (1e-3, 1e-2, 0.1, 1.0)


def run(model: nn.Module, **options: Any) -> Diagnosis:
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return diagnose(model, lambda m: m(IDS), **{"epsilons": SIZES, "reference_steps": 0, **PRINTED, **options})


def unit_noise() -> Tensor:
    return torch.randn(*IDS.shape, 32, generator=torch.Generator().manual_seed(0))


def scaled_noise(model: models.Encoder) -> Tensor:
    return model.words(IDS).square().mean((1, 2), keepdim=True).sqrt().detach() * unit_noise()


def test_penalty_and_random_divergence_are_those_of_smart_loss() -> None:
    model = models.build()
    result = run(model)
    for row, size in enumerate(SIZES):
        for steps, expected in ((1, result.penalty[row]), (0, result.random_divergence[row])):
            smart = SmartLoss(model, epsilon=size, step_size=size, noise_std=size, **PRINTED | {"steps": steps})
            penalty = smart(lambda m: m(IDS), noise=size * scaled_noise(model)).penalty
            assert penalty.item() == pytest.approx(expected, rel=1e-3)
    gains = [p / r for p, r in zip(result.penalty, result.random_divergence, strict=True)]
    assert result.ascent_gain == pytest.approx(gains)
    assert min(gains) > 1.5


def test_flips_are_the_changed_predictions() -> None:
    model = models.build()
    clean = model(IDS).argmax(-1)
    result = run(model, epsilons=[1.0, 3.0])
    seen: list[Tensor] = []
    model.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    for row, size in enumerate((1.0, 3.0)):
        smart = SmartLoss(model, epsilon=size, step_size=size, noise_std=size, **PRINTED)
        smart(lambda m: m(IDS), noise=size * scaled_noise(model))
        assert result.flips is not None
        assert result.flips[row] == pytest.approx((seen[-1].argmax(-1) != clean).float().mean().item())
    assert result.flips[1] > 0


class Signs(nn.Module):
    """One logit each, small enough for a large perturbation to turn the sign."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.build()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)[:, :1]


def test_flips_of_single_logits_are_changed_signs_and_a_regression_has_none() -> None:
    binary = diagnose(
        Signs(), lambda m: m(IDS), embedding="inner.words", divergence="binary_symmetric_kl", epsilons=[1e-3, 5.0]
    )
    assert binary.flips is not None
    assert binary.flips[0] == 0.0 < binary.flips[1]
    regression = diagnose(Signs(), lambda m: m(IDS), embedding="inner.words", divergence="mse", epsilons=[1e-3, 0.1])
    assert regression.flips is None
    assert regression.recommended == (1e-3, 0.1)
    assert "  -" in str(regression)


def test_a_divergence_of_the_users_own() -> None:
    def doubled(a: Tensor, b: Tensor) -> Tensor:
        return 2 * symmetric_kl(a, b)

    model = models.build()
    ours, own = run(model), run(model, divergence=doubled)
    assert own.penalty == pytest.approx([2 * p for p in ours.penalty], rel=1e-3)
    assert own.flips == ours.flips


def test_rounding_share_and_cosine_follow_the_truth() -> None:
    """bfloat16 autocast: where the penalty is mostly wrong the share is near 1, where it is right near 0."""
    model = models.build()
    with torch.no_grad():
        model.head.bias[0] = 4.0  # predictions that do not change
    sizes = (1e-5, 1e-3, 0.1, 0.3)
    exact = diagnose(
        models.in_float64(model),
        lambda m: m(IDS),
        epsilons=sizes,
        generator=torch.Generator().manual_seed(0),
        **PRINTED,
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model, epsilons=sizes)
    assert max(exact.rounding_share) < 1e-6
    assert min(exact.direction_cosine) > 0.999
    assert half.penalty[0] > 100 * exact.penalty[0]
    assert half.rounding_share[0] > 0.5
    assert half.direction_cosine[0] < 0.9
    assert half.penalty[2] == pytest.approx(exact.penalty[2], rel=0.2)
    assert half.rounding_share[2] < 0.05
    assert half.direction_cosine[2] > 0.9
    assert sorted(half.rounding_share, reverse=True) == list(half.rounding_share)
    assert half.sound == (False, False, True, True)
    assert exact.sound == (True,) * 4
    assert exact.useful == (False, False, True, True)  # in float64 too: 1e-10 is no penalty to train with
    assert half.recommended is not None
    assert half.recommended[0] == 0.1
    assert exact.recommended is not None
    assert exact.recommended[0] == 0.1


def test_dropout_share_is_what_other_masks_add() -> None:
    model = models.build(dropout=0.3)
    torch.manual_seed(4)
    result = run(model)
    shares = result.dropout_share
    assert shares[0] > 0.99 > shares[-1] > 0
    between = [share * penalty / (1 - share) for share, penalty in zip(shares, result.penalty, strict=True)]
    assert between == pytest.approx([between[0]] * len(between), rel=1e-3)  # one D for every ε
    independent = SmartLoss(model, epsilon=0, dropout="independent")
    draws = [independent(lambda m: m(IDS)).penalty.item() for _ in range(20)]
    assert min(draws) / 2 < between[0] < 2 * max(draws)
    assert run(model.eval()).dropout_share == (0.0,) * len(SIZES)


def test_a_mask_and_options_reach_the_search() -> None:
    model = models.build()
    mask = torch.ones_like(IDS)
    mask[:, 3:] = 0
    assert run(model, mask=mask).penalty[2] < run(model).penalty[2]
    absolute = run(model, epsilon_scale="absolute")
    assert absolute.epsilon_scale == "absolute"
    assert "abs." in str(absolute)


def test_default_sizes_are_half_decades_and_the_default_of_smart_loss() -> None:
    model = models.build()
    result = diagnose(model, lambda m: m(IDS), reference_steps=0)
    default = SmartLoss(model).settings.epsilon
    assert len(result.epsilons) == 12
    assert result.epsilons[0] == pytest.approx(1e-5)
    assert result.epsilons[-1] == 1.0
    assert default in result.epsilons
    marked = [line for line in str(result).splitlines() if line.endswith("<- the default")]
    assert [line.split()[0] for line in marked] == [f"{default:g}"]
    assert f"the default, {default:g}: changes " in str(result)
    # Where ε is absolute, 0.15 means something else.
    absolute = diagnose(model, lambda m: m(IDS), reference_steps=0, epsilon_scale="absolute")
    assert len(absolute.epsilons) == 11
    assert absolute.default_epsilon is None
    assert "default" not in str(absolute)
    assert "default" not in str(run(model))  # not swept


class Counting(models.Encoder):
    """Has a buffer that counts passes and an attribute that holds the last output."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.register_buffer("passes", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        self.passes += 1
        self.last = super().forward(ids)
        return self.last


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(5)
    model, generator = Counting(), torch.Generator().manual_seed(6)
    state, random, drawn = model.state_dict(), torch.get_rng_state(), generator.get_state()
    weights = {name: value.clone() for name, value in state.items()}
    buffer, hooks = model.passes, dict(model.words._forward_hooks)
    run(model, generator=generator)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert model.passes is buffer
    assert model.last is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(generator.get_state(), drawn)
    assert dict(model.words._forward_hooks) == hooks


@pytest.mark.parametrize("epsilons", [[], [0.0, 0.1], [float("inf")], [float("nan")], [1e30], [10**400], 0.1, "ab"])
def test_sizes_must_be_above_zero(epsilons: Any) -> None:
    with pytest.raises(ValueError, match=r"epsilons must be one or more numbers above 0 and at most 1e\+09, got"):
        run(models.build(), epsilons=epsilons)


def test_swept_arguments_cannot_be_given() -> None:
    with pytest.raises(ValueError, match=r'got dropout="independent": leave it out, and read from dropout_share'):
        run(models.build(), dropout="independent")
    with pytest.raises(ValueError, match="pass epsilons, not step_size"):
        run(models.build(), step_size=0.1)


def test_a_model_that_has_come_apart_is_refused() -> None:
    model = models.build()
    with torch.no_grad():
        model.words.weight[:] = float("nan")
    with pytest.raises(RuntimeError, match=r"needs a model whose output is finite, got NaN or inf in the clean pass"):
        run(model)


def test_an_absent_class_is_no_sign_of_a_model_that_came_apart() -> None:
    """Its logit is −∞ by design, in the clean pass and in every other."""
    absent = torch.tensor([0.0, 0.0, -torch.inf])
    options = {"epsilons": [0.1], "reference_steps": 0, "start": "towards_uniform"}
    model = models.build()
    found = diagnose(model, lambda m: m(IDS)[..., :3] + absent, **options)
    assert found.penalty[0] > 0


def test_autocast_is_switched_off_for_steps_alone() -> None:
    """Without a step there is nothing of the search that would run without it, so that nothing looks more exact."""
    found = {}
    for steps in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            options = {"epsilons": [0.01], "start": "towards_uniform", "steps": steps}
            found[steps] = [run(models.build(), ascent_autocast=on, **options).direction_cosine for on in (True, False)]
    assert found[0][0] == found[0][1]
    assert found[1][0] < found[1][1]


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode forbids: use torch\.no_grad"):
        run(models.build())
    with torch.no_grad():
        assert run(models.build()).penalty[0] > 0


def test_recommendation_rules() -> None:
    sizes, yes = (0.01, 0.1, 1.0), (True, True, True)
    assert recommended_range(sizes, yes, yes) == (0.01, 1.0)
    assert recommended_range(sizes, (False, True, True), yes) == (0.1, 1.0)
    assert recommended_range(sizes, (False, False, True), yes) == (1.0, 1.0)
    assert recommended_range(sizes, yes, (True, True, False)) == (0.01, 0.1)
    assert recommended_range(sizes, yes, (True, False, True)) == (0.01, 0.01)
    assert recommended_range(sizes, (False, True, True), (False, True, True)) == (0.1, 1.0)  # rounding flips too
    assert recommended_range(sizes, (False, False, False), yes) is None


def test_without_predictions_the_penalty_must_grow_at_least_as_fast_as_epsilon() -> None:
    sizes = (0.01, 0.1, 1.0)
    assert gentle(None, sizes, (1e-4, 1e-2, 1.0)) == (True, True, True)
    assert gentle(None, sizes, (1e-4, 1e-2, 0.05)) == (True, True, False)


def test_one_flip_of_eight_does_not_set_the_limit_and_eight_of_sixty_four_neither_but_sixteen_do() -> None:
    one, eight, sixteen = wilson(1 / 8, 8), wilson(8 / 64, 64), wilson(16 / 64, 64)
    assert gentle([one, eight, sixteen], (1, 2, 3), (1, 2, 3)) == (True, True, False)


def test_wilsons_interval_holds_the_shares_from_which_what_was_seen_is_not_two_standard_errors_away() -> None:
    for k, n in ((0, 8), (1, 8), (4, 8), (20, 40), (40, 40)):
        low, high = wilson(k / n, n)
        assert 0 <= low <= k / n <= high <= 1
        for end in (low, high):  # the definition: (p − end)² n = z² end (1 − end), at both ends
            assert (k / n - end) ** 2 * n == pytest.approx(1.959964**2 * end * (1 - end), abs=1e-9)
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_enough_predictions_are_those_of_which_none_changed_shows_that_few_change() -> None:
    assert wilson(0.0, ENOUGH)[1] <= 0.1 < wilson(0.0, ENOUGH - 1)[1]


def test_the_flips_have_an_interval_and_too_few_of_them_are_told() -> None:
    model = models.build()
    few = run(model)
    assert few.predictions == len(IDS) == 6
    assert few.flips is not None
    assert few.flips_interval == tuple(wilson(share, 6) for share in few.flips)
    assert (
        f"too few predictions: of 6, even none changed would not show that fewer than 10% change; take {ENOUGH} or"
        in (str(few))
    )
    many = models.sentences(examples=ENOUGH)
    enough = diagnose(model, lambda m: m(many), epsilons=[0.1], reference_steps=0)
    assert enough.predictions == ENOUGH
    assert "too few" not in str(enough)


def test_only_compared_positions_count_as_predictions() -> None:
    class Tagger(models.Encoder):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layers(self.norm(self.words(ids))))

    torch.manual_seed(7)
    kept = torch.arange(IDS.numel()).reshape(IDS.shape) % 3 == 0
    assert run(Tagger(), output_mask=kept).predictions == int(kept.sum()) < IDS.numel()
    assert run(Tagger()).predictions == IDS.numel()


def test_a_penalty_below_a_thousandth_of_the_loss_is_called_useless() -> None:
    model = models.build()
    plain = run(model)
    assert plain.task_loss == pytest.approx(math.log(3))  # three classes; no loss is given
    assert plain.useful == tuple(penalty >= 1e-3 * math.log(3) for penalty in plain.penalty)
    assert set(plain.useful) == {True, False}
    row = plain.useful.index(True)
    just, above = 1000 * plain.penalty[row] * 0.999, 1000 * plain.penalty[row] * 1.001
    assert run(model, loss=just).useful == plain.useful
    assert run(model, loss=above).useful == tuple(k > row for k in range(len(SIZES)))
    assert plain.recommended is not None
    assert plain.recommended[0] == SIZES[row]
    assert (
        f"useful: from {SIZES[row]:g} on (penalty at least 0.1% of a loss of 1.1; below, not even a lambda_s of 100"
        in (str(plain))
    )


def test_values_and_a_divergence_of_the_users_own_have_no_scale_of_their_own() -> None:
    values = diagnose(Signs(), lambda m: m(IDS), embedding="inner.words", divergence="mse", epsilons=[1e-3, 0.1])
    assert values.task_loss is values.useful is values.predictions is None
    assert "useful" not in str(values).replace("sound, useful", "")
    assert "the penalty grows at least as fast as epsilon: all" in str(values)
    own = run(models.build(), divergence=lambda a, b: (a - b).square().mean())
    assert own.useful is None
    assert own.flips is not None
    assert run(models.build(), divergence=lambda a, b: (a - b).square().mean(), loss=1.0).useful is not None
    single = diagnose(
        Signs(), lambda m: m(IDS), embedding="inner.words", divergence="binary_symmetric_kl", epsilons=[0.1]
    )
    assert single.task_loss == pytest.approx(math.log(2))


def test_the_summary_names_ranges_of_epsilon() -> None:
    found = run(models.build())
    yes, no = True, False
    for sound, words in [
        ((yes, yes, yes, yes), "all"), ((no, no, no, no), "none"), ((no, no, yes, yes), "from 0.1 on"),
        ((yes, yes, no, no), "up to 0.01"), ((no, yes, yes, no), "0.01 to 0.1"), ((yes, no, yes, no), "0.001, 0.1"),
    ]:  # fmt: skip
        assert f"sound in this precision: {words} (cosine" in str(replace(found, sound=sound))
    nothing = replace(found, recommended=None)
    assert "recommended: none of these; no epsilon is sound, useful and changes few predictions" in str(nothing)


def test_progress_is_told_after_each_epsilon() -> None:
    lines: list[str] = []
    result = run(models.build(), progress=lines.append)
    assert [line.split(" after ")[0] for line in lines] == [
        f"epsilon {size:.3g}: {k} of 4" for k, size in enumerate(SIZES, 1)
    ]
    assert lines[-1].endswith(" s, about 0 s to go")
    assert 0 < result.seconds < 60
    with pytest.raises(TypeError, match="progress must be None or a function of a line of text, got bool"):
        run(models.build(), progress=True)


def test_the_picture() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    result = replace(run(models.build()), default_epsilon=0.15)
    upper, lower = result.plot()
    labels = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in (upper, lower)]
    assert labels[0] == ["penalty", "random noise", "useful from here on", "recommended", "the default"]
    assert [label.split(",")[0] for label in labels[1]] == [
        "changed predictions", "rounding in the penalty (at most)", "other dropout masks would add",
    ]  # fmt: skip
    assert list(upper.get_lines()[0].get_ydata()) == list(result.penalty)
    assert len(upper.figure.axes) == 2  # no second scale beside one of them
    upper.figure.canvas.draw()
    for panel in (upper, lower):  # the legends lie above the panels, where no curve is
        legend = panel.get_legend().get_window_extent()
        assert legend.y0 >= panel.get_window_extent().y1 - 1
        assert legend.x1 <= upper.figure.bbox.x1  # and none is cut off
    _, given = pyplot.subplots(2)
    assert tuple(result.plot(given)) == tuple(given)
    pyplot.close("all")
    with pytest.raises(TypeError, match="axes must be two matplotlib Axes, upper and lower, got"):
        result.plot(upper)
    values = diagnose(Signs(), lambda m: m(IDS), embedding="inner.words", divergence="mse", epsilons=[1e-3, 0.1])
    panels = replace(values, recommended=None, epsilon_scale="absolute").plot()
    assert len(panels[1].get_lines()) == 3  # rounding, dropout, the default
    assert panels[1].get_xlabel() == "ε"
    pyplot.close("all")


def test_without_matplotlib_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **options)

    result = run(models.build())
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result.plot()


def test_the_table() -> None:
    text = str(run(models.build()))
    assert text.splitlines()[0].split() == [
        *("epsilon", "(x", "RMS)", "penalty", "random", "gain", "of", "max", "flips", "cosine", "rounding"),
        *("dropout", "lambda_s"),
    ]
    assert "recommended: epsilon from" in text


@pytest.mark.parametrize("start", ["noise", "towards_uniform"])
def test_the_share_of_the_maximum_is_that_of_a_longer_ascent(start: str) -> None:
    model = models.build()
    options = {"start": start, "norm": "2", "steps": 0, "epsilons": [0.1, 0.5]}
    short = run(model, reference_steps=10, **options)
    longer = run(model, reference_steps=40, **options)
    assert short.share_of_maximum is not None
    assert longer.share_of_maximum is not None
    for row, size in enumerate((0.1, 0.5)):
        assert 0 < longer.share_of_maximum[row] <= short.share_of_maximum[row] * 1.02 <= 1.02
        assert short.share_of_maximum[row] == pytest.approx(longer.share_of_maximum[row], rel=0.1)
        # The same by ascent through SmartLoss itself, in steps of one size.
        smart = SmartLoss(model, epsilon=size, step_size=size, steps=40, start="towards_uniform", norm="2")
        reached = smart(lambda m: m(IDS)).penalty.item()
        assert short.penalty[row] / reached == pytest.approx(longer.share_of_maximum[row], rel=0.15)
    assert f"{short.share_of_maximum[0]:.0%}" in str(short).splitlines()[1].split()
    assert run(model, reference_steps=0, **options).share_of_maximum is None


@pytest.mark.parametrize(
    ("options", "points"), [({}, 1), ({"steps": 1}, 2), ({"start": "noise"}, 2), ({"divergence": "mse"}, 2)]
)
def test_a_longer_ascent_begins_at_each_point_once(options: dict[str, Any], points: int) -> None:
    """At the end of the search and at the start towards uniform, which are one without a step; values draw theirs."""
    model = models.build()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))

    def passes(steps: int) -> int:
        calls.clear()
        diagnose(model, lambda m: m(IDS), epsilons=[0.1], reference_steps=steps, **options)
        return len(calls)

    assert passes(7) - passes(0) == points * (7 + 1)  # and one to see where it has ended


def test_a_better_search_reaches_more_of_the_maximum() -> None:
    model = models.build()
    ball = {"norm": "2", "epsilons": [0.2], "reference_steps": 20}
    shares = [
        run(model, start=start, steps=steps, **ball).share_of_maximum[0]  # type: ignore[index]  # there is one
        for start, steps in (("noise", 0), ("towards_uniform", 0), ("towards_uniform", 1))
    ]
    assert shares[0] < 0.5 * shares[1] < 0.5 * shares[2]


def test_the_suggested_lambda_weighs_a_tenth_of_the_loss() -> None:
    model = models.build()
    loss = nn.functional.cross_entropy(model(IDS), torch.zeros(len(IDS), dtype=torch.long))
    result = run(model, loss=loss)
    assert result.lambda_s == pytest.approx([0.1 * loss.item() / p for p in result.penalty])
    assert run(model).lambda_s is None
    assert run(model, loss=np.float32(0.5)).lambda_s == pytest.approx([0.05 / p for p in result.penalty])
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="loss must be a finite number above 0, the task loss on this batch, got"):
            run(model, loss=wrong)
    with pytest.raises(TypeError, match=r"loss must be a number or a tensor of one, got list"):
        run(model, loss=[1.0])
    with pytest.raises(TypeError, match=r"loss must be a number or a tensor of one, got shape \(2,\)"):
        run(model, loss=torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="reference_steps must be 0 or more, got -1"):
        run(model, reference_steps=-1)
    with pytest.raises(TypeError, match=r"reference_steps must be an int, got 1\.5"):
        run(model, reference_steps=1.5)
