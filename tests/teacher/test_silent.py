"""A teacher whose average moves in `update()` alone, a model of two minds, and states that no teacher saved."""

import copy
import functools
import warnings
from typing import Any

import pytest
import reference
import torch
from teacher_models import Net, X, averages, mlp, normed, shift
from torch import Tensor, nn

from smartreg import MomentumBregman, SmartWarning

IDS = torch.tensor([[1, 2], [3, 4]])


def bounded(kind: type[nn.Module] = nn.Embedding) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(kind(7, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6 if kind is nn.Embedding else 3, 2))
    return model.double()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_max_norm_leaves_the_average_alone(kind: type[nn.Module]) -> None:
    model = bounded(kind)
    bregman = MomentumBregman(model, beta=0.5, divergence="mse")
    before = averages(bregman)["0.weight"].clone()
    assert before.norm(dim=1).max() > 1.0
    shift(model)
    penalty = bregman(lambda m: m(IDS), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(averages(bregman)["0.weight"], before)
    rows = before * (0.5 / before.norm(dim=1, keepdim=True).clamp_min(0.5))
    looked_up = rows[IDS].flatten(1) if kind is nn.Embedding else rows[IDS].mean(dim=1)
    last = averages(bregman)
    expected = (looked_up @ last["2.weight"].T + last["2.bias"]).square().mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)  # torch divides by the norm plus 1e-7
    bregman.update()
    wanted = 0.5 * before + 0.5 * model[0].weight
    torch.testing.assert_close(averages(bregman)["0.weight"], wanted.detach(), rtol=1e-12, atol=0)


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(max=1.0)
        return x * self.scale


def test_any_other_forward_that_writes_to_its_weights_is_an_error() -> None:
    model = Writing()
    bregman = MomentumBregman(model)
    with pytest.raises(RuntimeError, match=r"forward writes to parameters of the teacher.*update\(\) alone: scale\."):
        bregman(lambda m: m(X), model(X))


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        return self.weight * (p - q).square().mean()


def test_a_divergence_with_weights_of_its_own_is_looked_at_in_silence() -> None:
    model = mlp()
    bregman = MomentumBregman(model, divergence=Weighted())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's about a tensor with a gradient that becomes a number
        bregman(lambda m: m(X), model(X)).backward()


def test_what_hooks_keep_of_the_model_stays_the_model_s() -> None:
    model, kept = mlp(), {}
    model[0].register_forward_hook(lambda module, inputs, output: kept.update(features=output))
    bregman = MomentumBregman(model)
    for _ in range(2):
        outputs = model(X)
        features = kept["features"]
        bregman(lambda m: m(X), outputs)
        assert kept["features"] is features
    features.sum().backward()


class TwoMinds(nn.Module):
    """Logits in train mode, something else in eval mode."""

    def __init__(self, otherwise: str, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.dropout, self.otherwise = nn.Linear(3, 4), nn.Dropout(dropout), otherwise

    def forward(self, x: Tensor) -> Any:
        logits = self.body(self.dropout(x))
        if self.otherwise == "probabilities":
            return logits if self.training else logits.softmax(-1)
        return {"logits": torch.stack([logits, logits]) if self.training else logits}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_another_answer_in_eval_mode_is_told_once(dropout: float) -> None:
    model = TwoMinds("probabilities", dropout)
    bregman = MomentumBregman(model)
    with pytest.warns(SmartWarning, match=r"answers otherwise in eval mode.*logits and not probabilities") as told:
        bregman(lambda m: m(X), model(X))
    bregman(lambda m: m(X), model(X))  # warnings are errors here
    assert not bregman.teacher.training
    if not dropout:
        logits = model.body(X).detach().double()
        gap = reference.symmetric_kl(logits.numpy(), logits.softmax(-1).numpy())
        assert f"in the two modes is {gap:.3g}, that of two passes in train mode 0," in str(told[0].message)
    MomentumBregman(model, check_first_call=False)(lambda m: m(X), model(X))
    with pytest.raises(TypeError, match="check_first_call must be True or False, got 0"):
        MomentumBregman(model, check_first_call=0)  # type: ignore[arg-type]  # on purpose


def test_other_heads_in_eval_mode_are_one_error() -> None:
    model = TwoMinds("heads")
    message = r"one shape to compare, got \(2, 2, 4\) and \(2, 4\): .*more in train mode.*needs output_to_logits"
    with pytest.raises(ValueError, match=message):
        MomentumBregman(model)(lambda m: m(X), model(X))
    first = MomentumBregman(model, output_to_logits=lambda out: out["logits"].reshape(-1, 2, 4)[0])
    assert first(lambda m: m(X), model(X)).item() == 0.0


@pytest.mark.parametrize("build", [Net, normed, mlp])
def test_dropout_and_batch_statistics_are_no_other_answer(build: Any) -> None:
    model = build()
    bregman = MomentumBregman(model)
    state, buffers = torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))
    bregman(lambda m: m(X), model.eval()(X))
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert not any(module.training for module in bregman.teacher.modules())


def test_no_look_once_the_two_differ() -> None:
    model = TwoMinds("probabilities")
    bregman = MomentumBregman(model)
    shift(model)
    bregman(lambda m: m(X), model(X))
    other = MomentumBregman(model)
    other.update()
    other(lambda m: m(X), model(X))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": torch.tensor(-5)}, r"number of updates must be an integer of 0 or more, got -5"),
        ({"updates": torch.tensor(2.7)}, r"number of updates must be an integer of 0 or more, got 2\.7"),
        ({"updates": torch.tensor([1, 2])}, r"got \[1, 2\]; the state was changed or damaged"),
        ({"average.0.bias": torch.full((5,), torch.nan)}, r"averages hold NaN: 0\.bias; load a checkpoint from before"),
    ],
)
def test_states_that_no_teacher_saved(change: dict[str, Tensor], message: str) -> None:
    model = mlp()
    bregman = MomentumBregman(model)
    shift(model)
    bregman.update()
    kept = bregman.state_dict()
    with pytest.raises(RuntimeError, match=message):
        bregman.load_state_dict({**kept, **change})
    assert bregman.updates == 1
    for name, value in bregman.state_dict().items():
        assert torch.equal(value, kept[name]), name


def replaced_forward() -> Net:
    model = Net()
    original = model.forward
    model.forward = lambda *args: original(*args)  # type: ignore[method-assign]
    return model


def replaced_forward_of_a_layer() -> Net:
    model = Net()
    original = model.hidden.forward
    model.hidden.forward = lambda *args: original(*args)  # type: ignore[method-assign]
    return model


def hook_with_a_layer() -> Net:
    model = Net()
    adapter = model.adapter = nn.Linear(6, 6)
    model.hidden.register_forward_hook(lambda module, inputs, output: output + adapter(output))
    return model


def test_a_hook_of_the_copy_that_runs_the_model_is_an_error() -> None:
    """`deepcopy` leaves functions as they are, and with them the modules of the model that they hold."""
    model = hook_with_a_layer()
    bregman = MomentumBregman(model)
    with pytest.raises(RuntimeError, match="forward ran the model's Linear 'adapter', which is trained, in place of"):
        bregman(lambda m: m(X), model(X))


@pytest.mark.parametrize("make", [replaced_forward, replaced_forward_of_a_layer])
def test_a_forward_that_a_copy_takes_along_is_told_of(make: Any) -> None:
    model = make()
    with pytest.warns(SmartWarning, match=r"the forward of \w+ was replaced on the object by a function with"):
        bregman = MomentumBregman(model)
    if make is replaced_forward:  # the other runs the method of a layer, and not the layer
        with pytest.raises(RuntimeError, match="forward ran the model's Linear 'hidden', which is trained, in place"):
            bregman(lambda m: m(X), model(X))


def test_other_functions_of_a_model_are_of_no_concern() -> None:
    model, norms = Net(), []
    model.where = lambda: next(model.parameters()).device
    model.to = functools.wraps(model.to)(lambda *args: model.cpu())  # type: ignore[method-assign]  # as accelerate
    model.hidden.register_forward_hook(lambda module, inputs, output: norms.append(model.hidden.weight.norm()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MomentumBregman(model)(lambda m: m.eval()(X), model.eval()(X)) == 0
    assert norms
    frozen = replaced_forward_of_a_layer().requires_grad_(False)
    frozen.head.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MomentumBregman(frozen)  # what is frozen is shared, whichever of the two runs it


def test_a_teacher_that_is_passed_may_have_what_the_model_got_later() -> None:
    model, teacher = Net(), Net()
    original = model.forward
    model.forward = lambda *args: original(*args)  # type: ignore[method-assign]
    shift(model)
    assert MomentumBregman(model, teacher=teacher)(lambda m: m(X), model(X)) > 0


def test_a_forward_that_runs_the_model_in_part_is_an_error_and_frozen_parts_are_no_matter() -> None:
    model = Net()
    bregman = MomentumBregman(model)
    mixed = lambda m: model.head(m.encode(X))  # noqa: E731  # short
    with pytest.raises(RuntimeError, match="forward ran the model's Linear 'head', which is trained, in place of"):
        bregman(mixed, mixed(model))
    for module in model.modules():  # nothing stays behind
        assert not module._forward_pre_hooks
    model.head.requires_grad_(False)
    shift(model)
    assert MomentumBregman(model)(mixed, mixed(model)) >= 0
