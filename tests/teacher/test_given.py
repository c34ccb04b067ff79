"""A teacher that the user made."""

import copy
from collections.abc import Callable

import pytest
import torch
from teacher_models import X, normed, train
from torch import nn

from smartreg.bregman import MomentumBregman


def test_a_teacher_passed_in_is_used_unchanged() -> None:
    model, teacher = normed(0), normed(1)
    before = copy.deepcopy(teacher.state_dict())
    bregman = MomentumBregman(model, teacher=teacher, beta=0.5)
    assert bregman.teacher is teacher
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])
    assert bregman(lambda m: m(X), model(X)).item() > 1e-3
    bregman.update()
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name].lerp(model.get_parameter(name).detach(), 0.5))


def test_frozen_parameters_of_a_teacher_passed_in_are_shared_where_equal_and_kept_where_not() -> None:
    model = normed(0)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher[0].bias.add_(1)
    model.requires_grad_(False)
    model[2].requires_grad_(True)
    bregman = MomentumBregman(model, teacher=teacher, beta=0.5)
    assert teacher[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert teacher[0].bias.data_ptr() != model[0].bias.data_ptr()
    torch.testing.assert_close(teacher[0].bias, model[0].bias + 1)
    bregman.update()
    torch.testing.assert_close(teacher[0].bias, model[0].bias + 0.5)  # converges as what is frozen later does


def test_a_frozen_parameter_held_by_both_is_shared_and_not_frozen_for_ever() -> None:
    model = normed(0)
    model[0].requires_grad_(False)
    teacher = copy.deepcopy(model)
    teacher[0].weight = model[0].weight
    bregman = MomentumBregman(model, teacher=teacher, beta=0.5)
    assert bregman.teacher[0].weight.data_ptr() == model[0].weight.data_ptr()
    model[0].requires_grad_(True)
    assert bregman.teacher[0].weight.requires_grad is False
    assert model[0].weight.requires_grad
    train(model, bregman, 1)
    assert bregman.teacher[0].weight.data_ptr() != model[0].weight.data_ptr()


def test_a_wider_teacher_keeps_its_precision() -> None:
    model, teacher = normed(0).bfloat16(), normed(1)
    before = teacher[0].weight.detach().clone()
    bregman = MomentumBregman(model, teacher=teacher)
    assert bregman.teacher[0].weight.dtype == torch.bfloat16
    assert torch.equal(bregman.state_dict()["average.0.weight"], before)


def test_a_wrapped_teacher_pairs_with_a_plain_model() -> None:
    model, teacher = normed(0), torch.compile(normed(1), backend="eager")
    bregman = MomentumBregman(model, teacher=teacher, beta=0)
    bregman.update()
    assert torch.equal(teacher._orig_mod[0].weight, model[0].weight)


def without_bias() -> nn.Module:
    teacher = normed()
    teacher[2].bias = None
    return teacher


def with_extra() -> nn.Module:
    return normed().append(nn.Linear(2, 2))


def of_another_shape() -> nn.Module:
    teacher = normed()
    teacher[2] = nn.Linear(5, 3)
    return teacher


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_bias, r"teacher must have the parameters of the model: only in the model: 2\.bias$"),
        (with_extra, r"only in the teacher: 3\.bias, 3\.weight$"),
        (of_another_shape, r"of another shape: 2\.bias is \(2,\) in the model, \(3,\) in the teacher, 2\.weight is"),
    ],
)
def test_names_and_shapes_of_the_teacher_must_match(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MomentumBregman(normed(), teacher=make())


def test_a_teacher_that_is_the_model_is_refused() -> None:
    model = normed()
    with pytest.raises(ValueError, match="another module than model, got the model itself"):
        MomentumBregman(model, teacher=model)
    with pytest.raises(ValueError, match="another module than model, got the model itself"):
        MomentumBregman(model, teacher=torch.compile(model, backend="eager"))
    sharing = copy.deepcopy(model)
    sharing[0].weight.data = model[0].weight.data
    sharing[2].weight = model[2].weight
    with pytest.raises(ValueError, match=r"must not share what the model trains.*: 0\.weight, 2\.weight; pass"):
        MomentumBregman(model, teacher=sharing)
    sharing[1] = model[1]
    with pytest.raises(ValueError, match=r"must not hold modules of the model, got its 1\.; pass a copy"):
        MomentumBregman(model, teacher=sharing)
    with pytest.raises(TypeError, match="teacher must be a module or None, got OrderedDict"):
        MomentumBregman(model, teacher=model.state_dict())
