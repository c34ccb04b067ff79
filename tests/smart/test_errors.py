"""Misuse gets one clear error that names the argument, what was expected, what came, and the remedy."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from smart_models import FEATURES, VOCABULARY, Sentence, algorithm_1, batch, build
from torch import Tensor, nn

from smartreg import SmartLoss, SmartWarning, mse, smoothness_penalty, symmetric_kl
from smartreg._ascent.settings import SmartSettings

IDS, MASK = batch()

HYPERPARAMETERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"epsilon": -0.1}, ValueError, r"epsilon must be finite and not negative, got -0\.1"),
    ({"epsilon": float("nan")}, ValueError, r"epsilon must be finite and not negative, got nan"),
    ({"step_size": float("inf")}, ValueError, r"step_size must be finite and not negative, got inf"),
    ({"noise_std": -1}, ValueError, r"noise_std must be finite and not negative, got -1"),
    ({"epsilon": "0.1"}, TypeError, r"epsilon must be a number, got '0\.1'"),
    ({"step_size": None}, TypeError, r"step_size must be a number, got None"),
    ({"noise_std": True}, TypeError, r"noise_std must be a number, got True"),
    ({"steps": -1}, ValueError, r"steps must be 0 \(no ascent\) or more, got -1"),
    ({"steps": 1.0}, TypeError, r"steps must be an int, got 1\.0"),
    ({"steps": True}, TypeError, r"steps must be an int, got True"),
    ({"norm": "1"}, ValueError, r'norm must be "inf" \(or float\("inf"\)\) or "2" \(or 2\), got \'1\''),
    ({"norm": 1}, ValueError, r"norm must be .*, got 1"),
    ({"norm": True}, ValueError, r"norm must be .*, got True"),
    ({"norm": ["inf"]}, ValueError, r"norm must be .*, got \['inf'\]"),
    ({"norm_over": "batch"}, ValueError, r"norm_over must be one of \('example', 'token'\), got 'batch'"),
    ({"epsilon_scale": "relative"}, ValueError, r"epsilon_scale must be one of \('rms', 'absolute'\), got 'relative'"),
    ({"ascent": "fast"}, ValueError, r"ascent must be one of \('projected', 'steepest', 'normalized'\), got 'fast'"),
    ({"start": "clean"}, ValueError, r"start must be one of \('noise', 'gradient', 'towards_uniform'\), got 'clean'"),
    ({"dropout": "none"}, ValueError, r"dropout must be one of \('shared', 'independent'\), got 'none'"),
    ({"detach_reference": 1}, TypeError, r"detach_reference must be True or False, got 1"),
    ({"divergence": "symetric_kl"}, ValueError, r"divergence.*symetric_kl"),
    ({"divergence": 3}, TypeError, r"divergence.*got int"),
    ({"output_to_logits": "logits"}, TypeError, r"output_to_logits must be None or a function of the output, got str"),
]


@pytest.mark.parametrize(("options", "error", "message"), HYPERPARAMETERS)
def test_hyperparameters_are_checked_in_the_constructor(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SmartLoss(build(), **options)
    with pytest.raises(error, match=message):
        smoothness_penalty(lambda x: x.sum(dim=1), torch.ones(2, 3, 4), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_efficient": 1}, r"memory_efficient must be True or False, got 1"),
        ({"ascent_autocast": None}, r"ascent_autocast must be True or False, got None"),
        ({"generator": 5}, r"generator must be a torch\.Generator or None, got int"),
        ({"embedding": 5}, r"embedding must be a module, a dotted name or None, got int"),
    ],
)
def test_kinds_of_other_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SmartLoss(build(), **options)


def test_numpy_s_numbers_are_numbers() -> None:
    settings = SmartLoss(build(), epsilon=np.float32(0.25), steps=np.int64(2)).settings  # type: ignore[arg-type]  # they are
    assert (settings.epsilon, settings.steps) == (0.25, 2)
    assert (type(settings.epsilon), type(settings.steps)) == (float, int)


def test_model_is_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        SmartLoss(symmetric_kl)
    with pytest.raises(RuntimeError, match=r"one module a process, got torch\.nn\.DataParallel.*use Distributed"):
        SmartLoss(nn.DataParallel(build()))


def test_hyperparameters_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        SmartLoss(build(), "embedding")  # type: ignore[misc]  # on purpose
    with pytest.raises(TypeError, match="positional argument"):
        SmartLoss(build())(lambda m: m(IDS), MASK)


@pytest.mark.parametrize(("given", "kept"), [("inf", "inf"), (float("inf"), "inf"), ("2", "2"), (2, "2"), (2.0, "2")])
def test_spellings_of_the_norm(given: Any, kept: str) -> None:
    settings = SmartLoss(build(), norm=given).settings
    assert isinstance(settings, SmartSettings)
    assert settings.norm == kept


class Silent(nn.Module):
    def __init__(self, *, error: type[Exception] | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, FEATURES)
        self.types = nn.Embedding(2, FEATURES)
        self.error = error

    def get_input_embeddings(self) -> nn.Module:
        if self.error:
            raise self.error
        return None  # type: ignore[return-value]  # as some models answer


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError, None])
def test_a_model_that_does_not_tell_its_embedding(error: type[Exception] | None) -> None:
    message = r"Silent does not tell its input embedding: pass embedding=.*its nn\.Embedding modules are: words, types"
    with pytest.raises(ValueError, match=message):
        SmartLoss(Silent(error=error))
    with pytest.raises(ValueError, match=r"Linear does not tell .* it has no nn\.Embedding module"):
        SmartLoss(nn.Linear(2, 2))


def test_an_embedding_that_is_not_in_the_model() -> None:
    with pytest.raises(ValueError, match=r"must name a submodule of Sentence, got 'word_embeddings'.*are: embedding"):
        SmartLoss(build(), embedding="word_embeddings")
    with pytest.raises(ValueError, match=r"must be a submodule of Sentence, got a Embedding that is none"):
        SmartLoss(build(), embedding=nn.Embedding(2, 2))


def test_the_model_itself_is_no_embedding() -> None:
    """Its output would be perturbed, which is a penalty of nothing."""
    model = build()
    with pytest.raises(ValueError, match=r"must be a submodule of Sentence, got a Sentence that is none"):
        SmartLoss(model, embedding=model)
    with pytest.raises(ValueError, match=r"must name a submodule of Sentence, got ''.*are: embedding"):
        SmartLoss(model, embedding="")


def test_a_class_that_takes_the_method_back() -> None:
    class Without(Silent):
        get_input_embeddings = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"Without does not tell its input embedding: pass embedding="):
        SmartLoss(Without())


@pytest.mark.parametrize("forward", [None, IDS, "m(ids)"])
def test_forward_is_a_function(forward: Any) -> None:
    with pytest.raises(TypeError, match=r"forward must be a function of the module, as in lambda m: m\(\*\*batch\)"):
        SmartLoss(build())(forward)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_perturbation_that_cannot_reach_the_model(steps: int, memory_efficient: bool) -> None:
    model, another = build(), build(1)
    smart = SmartLoss(model, steps=steps, memory_efficient=memory_efficient)
    with pytest.raises(RuntimeError, match=r"forward never called the embedding that is perturbed.*pass embedding="):
        smart(lambda m: another(IDS))
    with pytest.raises(RuntimeError, match="forward never called the embedding"):
        smart(lambda m: m.head(torch.ones(2, 5).double()))


def test_an_output_that_does_not_depend_on_the_embedding() -> None:
    def forward(m: Sentence) -> Tensor:
        return m(IDS).detach() + m.head.bias

    with pytest.raises(RuntimeError, match="does not depend on the embeddings, so no perturbation can reach it"):
        SmartLoss(build())(forward)


def test_a_forward_that_is_not_repeatable() -> None:
    def forward_with(lookups: list[int]) -> Any:
        return lambda m: sum(m(IDS) for _ in range(lookups.pop(0)))

    with pytest.raises(RuntimeError, match="looked the embedding up 1 times in the clean pass and more often"):
        SmartLoss(build())(forward_with([1, 2]))
    with pytest.raises(RuntimeError, match="reached 1 embedding look-ups in a perturbed pass, expected 2"):
        SmartLoss(build())(forward_with([2, 1]))


def test_shapes_that_change_from_pass_to_pass() -> None:
    calls: list[None] = []

    def forward(m: Sentence) -> Tensor:
        calls.append(None)
        return m(IDS)[: len(calls)]

    with pytest.raises(ValueError, match=r"^two passes of one model must .* of one shape .* \(2, 3\) and \(1, 3\)"):
        SmartLoss(build())(forward)


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"the shape of the embeddings, \(3, 4, 4\), got \(3, 4\)"),
        (torch.zeros(3, 4, 5), ValueError, r"the shape of the embeddings, \(3, 4, 4\), got \(3, 4, 5\)"),
        ([torch.zeros(3, 4, 4)] * 2, ValueError, r"noise must be one tensor for each.*expected 1, got 2"),
        ([], ValueError, r"expected 1, got 0"),
        ([0.1], TypeError, r"noise must be a tensor for each embedding look-up, got float"),
        (lambda x: x.tolist(), TypeError, r"noise must be a tensor for each embedding look-up, got list"),
        (lambda x: x[0], ValueError, r"the shape of the embeddings, \(3, 4, 4\), got \(4, 4\)"),
    ],
)
def test_noise_that_does_not_fit(noise: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SmartLoss(build())(lambda m: m(IDS), noise=noise)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_an_output_without_logits(memory_efficient: bool) -> None:
    smart = SmartLoss(build(), memory_efficient=memory_efficient)
    with pytest.raises(TypeError, match=r"forward must return a tensor.*got tuple; pass output_to_logits"):
        smart(lambda m: (m(IDS),))
    with pytest.raises(TypeError, match=r"logits.*are None, as fused cross-entropy kernels leave them"):
        smart(lambda m: SimpleNamespace(logits=None, loss=m(IDS).sum()))
    SmartLoss(build(), output_to_logits=lambda out: out[0])(lambda m: (m(IDS),))


def test_a_divergence_that_is_no_scalar() -> None:
    smart = SmartLoss(build(), divergence=lambda a, b: symmetric_kl(a, b, reduction="none"))
    with pytest.raises(ValueError, match=r"divergence must return a scalar tensor, got shape \(3,\)"):
        smart(lambda m: m(IDS))
    with pytest.raises(ValueError, match=r"divergence.*squared"):
        SmartLoss(build())(lambda m: m(IDS), divergence="squared")


class Wrong(nn.Module):
    """Looks up something that is no embedding output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = {"tuple": nn.LSTM(2, 2), "integers": nn.Identity(), "vector": nn.Flatten(0)}[kind]
        self.given = torch.zeros(3, dtype=torch.long) if kind == "integers" else torch.zeros(2, 2, 2)[..., :2]

    def forward(self) -> Any:
        return self.layer(self.given)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("tuple", TypeError, r"returns one floating-point tensor, got tuple from LSTM"),
        ("integers", TypeError, r"returns one floating-point tensor, got torch\.int64 from Identity"),
        ("vector", ValueError, r"must return \(batch, \.\.\., feature\), got shape \(8,\) from Flatten"),
    ],
)
def test_a_layer_whose_output_cannot_be_perturbed(kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SmartLoss(Wrong(kind), embedding="layer")(lambda m: m())


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_inference_mode_forbids_the_ascent(memory_efficient: bool) -> None:
    smart = SmartLoss(build(), memory_efficient=memory_efficient)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode forbids: use torch\.no_grad, or"):
        smart(lambda m: m(IDS))
    assert smart(lambda m: m(IDS)).penalty.item() > 0


def flat() -> Any:
    return pytest.warns(SmartWarning, match=r"steps=2 with noise_std=0 has no gradient to follow.*Set noise_std above")


def test_steps_without_noise_have_nothing_to_follow() -> None:
    with flat():
        smart = algorithm_1(build(), noise_std=0.0, steps=2)
    penalty = smart(lambda m: m(IDS)).penalty  # said once, not again: warnings are errors here
    assert penalty.item() == 0.0
    assert smart.stats.bad_examples == 3


def test_that_warning_is_for_built_in_divergences_alone() -> None:
    def slanted(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).sum()

    smart = algorithm_1(build(), noise_std=0.0, steps=2, divergence=slanted)
    assert smart(lambda m: m(IDS)).penalty.item() > 0
    assert smart(lambda m: m(IDS), divergence=mse, noise=torch.ones(3, 4, FEATURES)).penalty.item() > 0
    with flat():
        smart(lambda m: m(IDS), divergence=mse)


@pytest.mark.parametrize("options", [{"noise_std": 0.0, "steps": 0}, {"noise_std": 0.0, "epsilon": 0.0}, {"steps": 2}])
def test_no_warning_where_there_is_nothing_wrong(options: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        SmartLoss(build(), **options)(lambda m: m(IDS))
    assert seen == []
    assert issubclass(SmartWarning, UserWarning)
