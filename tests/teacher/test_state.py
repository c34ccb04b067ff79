"""The teacher saved, resumed, copied and written into other models."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from teacher_models import normed, train
from torch import Tensor, nn

from smartreg.bregman import MomentumBregman, paper_beta


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for (name, one), (other_name, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


# Saved and resumed


def save_torch(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def save_safetensors(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    safetensors.torch.save_file(state, path)
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("save", [save_torch, save_safetensors])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frozen", [[], ["0.weight", "0.bias"]])
def test_a_resumed_run_equals_an_uninterrupted_one(
    save: Callable[..., dict[str, Tensor]], dtype: torch.dtype, frozen: list[str], tmp_path: Path
) -> None:
    def make(seed: int) -> tuple[nn.Module, MomentumBregman]:
        model = normed(seed).to(dtype)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        return model, MomentumBregman(model, beta=paper_beta(40))

    model, bregman = make(0)
    train(model, bregman, 5)
    state = save(bregman.state_dict(), tmp_path / "teacher")
    weights = save(model.state_dict(), tmp_path / "model")
    train(model, bregman, 6)

    resumed, again = make(1)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.updates == 5
    train(resumed, again, 6)
    assert_same(resumed, model)
    assert_same(again.teacher, bregman.teacher)
    assert again.updates == bregman.updates == 11
    for name, value in bregman.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_state_holds_the_averages_the_counter_and_nothing_of_what_is_shared() -> None:
    model = normed()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model)
    bregman.update()
    state = bregman.state_dict()
    expected = {"updates", "shared_names", *(f"average.{n}" for n in ("1.weight", "1.bias", "2.weight", "2.bias"))}
    assert set(state) == expected
    assert state["updates"] == 1
    assert bytes(state["shared_names"].tolist()) == b"0.bias\n0.weight"
    assert all(isinstance(value, Tensor) and not value.requires_grad for value in state.values())


def test_a_state_is_a_copy() -> None:
    model = normed()
    bregman = MomentumBregman(model)
    state = bregman.state_dict()
    before = copy.deepcopy(state)
    train(model, bregman, 3)
    other = MomentumBregman(model)
    other.load_state_dict(state)
    train(model, other, 2)
    for name, value in state.items():
        assert torch.equal(value, before[name])


def test_resume_of_a_run_that_froze_and_thawed() -> None:
    model = normed(0)
    model[2].requires_grad_(False)
    bregman = MomentumBregman(model, beta=0.5)
    model[2].requires_grad_(True)
    train(model, bregman, 2)  # 2 is unshared
    model[0].requires_grad_(False)
    train(model, bregman, 2)  # 0 keeps converging
    state, weights = copy.deepcopy((bregman.state_dict(), model.state_dict()))
    assert bytes(state["shared_names"].tolist()) == b""
    train(model, bregman, 3)

    resumed = normed(1)
    resumed.load_state_dict(weights)
    resumed[0].requires_grad_(False)
    again = MomentumBregman(resumed, beta=0.5)
    assert again.teacher[0].weight.data_ptr() == resumed[0].weight.data_ptr()
    again.load_state_dict(state)
    train(resumed, again, 3)
    assert_same(resumed, model)
    assert_same(again.teacher, bregman.teacher)


def test_resume_of_a_run_saved_before_what_it_shared_was_thawed() -> None:
    """Gradual unfreezing: saved at the end of an epoch, thawed at the start of the next, which is where one resumes."""
    model = normed(0)
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model, beta=0.5)
    train(model, bregman, 2)
    state, weights = copy.deepcopy((bregman.state_dict(), model.state_dict()))
    model[0].requires_grad_(True)
    train(model, bregman, 3)

    resumed = normed(1)
    again = MomentumBregman(resumed, beta=0.5)
    again.load_state_dict(state)
    resumed.load_state_dict(weights)
    train(resumed, again, 3)
    assert_same(resumed, model)
    assert_same(again.teacher, bregman.teacher)


def test_what_a_loaded_state_shares_is_no_longer_kept_twice() -> None:
    model = normed().bfloat16()
    model[0].requires_grad_(False)
    state = MomentumBregman(model).state_dict()
    model[0].requires_grad_(True)
    bregman = MomentumBregman(model)
    assert "0.weight" in bregman._teacher.wide
    bregman.load_state_dict(state)
    assert set(bregman._teacher.wide) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("average.2.bias"), r"averages are of other parameters.*only in the model: 2\.bias"),
        (drop("updates"), r'Missing key\(s\) in state_dict: "updates"'),
        (drop("shared_names"), r'Missing key\(s\) in state_dict: "shared_names"'),
        (lambda state: state.update({"average.3.bias": torch.zeros(2)}), r"only in the state: 3\.bias"),
        (lambda state: state.update({"average.2.bias": torch.zeros(3)}), r"2\.bias is \(3,\) in the state, \(2,\)"),
        (lambda state: state.update(other=torch.zeros(3)), r'Unexpected key\(s\) in state_dict: "other"'),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_that_names_why(change: Callable[..., Any], message: str) -> None:
    model = normed()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model)
    train(model, bregman, 2)
    state = copy.deepcopy(bregman.state_dict())
    other = MomentumBregman(model)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)


def test_the_state_of_something_that_holds_it() -> None:
    """As Lightning and Accelerate keep it: an attribute of a larger module."""

    class Holder(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model = normed(seed)
            self.bregman = MomentumBregman(self.model, beta=0.5)

    holder = Holder(0)
    train(holder.model, holder.bregman, 3)
    assert len(list(holder.parameters())) == len(list(holder.model.parameters()))
    other = Holder(1)
    other.load_state_dict(holder.state_dict())
    for each in (holder, other):
        train(each.model, each.bregman, 2)
    assert_same(other.model, holder.model)
    assert_same(other.bregman.teacher, holder.bregman.teacher)
    assert other.bregman.updates == 5
    weights = {name: value for name, value in holder.state_dict().items() if name.startswith("model.")}
    before = other.bregman.state_dict()
    assert "bregman.updates" in other.load_state_dict(weights, strict=False).missing_keys
    assert other.bregman.state_dict()["updates"] == before["updates"]


def test_pickle_and_deepcopy_of_model_and_teacher_go_on_alike() -> None:
    model = normed()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model, beta=0.5)
    train(model, bregman, 2)
    file = io.BytesIO()
    torch.save((model, bregman), file)
    file.seek(0)
    copies = [
        copy.deepcopy((model, bregman)),
        pickle.loads(pickle.dumps((model, bregman))),
        torch.load(file, weights_only=False),
    ]
    train(model, bregman, 3)
    for copied, follower in copies:
        train(copied, follower, 3)
        assert_same(copied, model)
        assert_same(follower.teacher, bregman.teacher)
        assert follower.teacher[0].weight.data_ptr() == copied[0].weight.data_ptr()
        assert follower.teacher[0].weight.data_ptr() != model[0].weight.data_ptr()


class Rebuilding(nn.Linear):
    """Keeps its parameters elsewhere after it was copied."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_parameters": dict(state["_parameters"])})


def test_a_copy_looks_at_its_own_model() -> None:
    model = Rebuilding(2, 2)
    bregman = MomentumBregman(model, beta=0.5)
    bregman.update()
    copied, follower = copy.deepcopy((model, bregman))
    copied.weight = nn.Parameter(torch.zeros(2, 2))
    follower.update()
    torch.testing.assert_close(follower.teacher.weight, 0.5 * bregman.teacher.weight)


# Written into a model


def test_copy_to_another_model_and_back_into_the_model_itself() -> None:
    model = normed()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model, beta=0.5)
    train(model, bregman, 3)
    expected = copy.deepcopy(bregman.teacher.state_dict())
    other = normed(1)
    flags = [parameter.requires_grad for parameter in other.parameters()]
    bregman.copy_to(other)
    assert_same(other, bregman.teacher)
    assert [parameter.requires_grad for parameter in other.parameters()] == flags
    assert other[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert other[1].running_mean.abs().sum() > 0
    bregman.copy_to(torch.compile(model, backend="eager"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    assert bregman.teacher[2].weight.data_ptr() != model[2].weight.data_ptr()


def test_copy_to_right_after_something_was_thawed() -> None:
    model = normed()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model, beta=0.5)
    model[0].requires_grad_(True)
    train(model, bregman, 2)
    other = normed(1)
    bregman.copy_to(other)
    assert_same(other, bregman.teacher)
    assert not torch.equal(other[0].weight, model[0].weight)


def test_copy_to_a_wider_model_gives_the_average_itself() -> None:
    model = normed().bfloat16()
    bregman = MomentumBregman(model)
    train(model, bregman, 3)
    wide = normed(1)
    bregman.copy_to(wide)
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter, bregman.state_dict()[f"average.{name}"])
    assert not np.array_equal(wide[0].weight.detach().numpy(), bregman.teacher[0].weight.float().numpy())


def test_copy_to_a_model_of_other_parameters_changes_nothing() -> None:
    bregman = MomentumBregman(normed(0))
    other = normed(1)
    other[2] = nn.Linear(5, 3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"model must have the parameters of the teacher: of another shape: 2\.bias"):
        bregman.copy_to(other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])
