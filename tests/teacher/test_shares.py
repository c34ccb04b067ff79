"""What the teacher shares with the model: frozen parameters, tied weights, and no memory beyond the averages."""

import copy

import numpy as np
import pytest
import torch
from teacher_models import averages, mlp, shift
from torch import Tensor, nn

from smartreg._teacher.sharing import frozen_copy, own_copy
from smartreg.bregman import MomentumBregman


class Tied(nn.Module):
    """An embedding tied to the output layer, and a bias that may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mixer = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.mixer(self.embedding(ids)))


def own_bytes(bregman: MomentumBregman, model: nn.Module) -> int:
    """Memory of the teacher that is not the model's."""
    theirs = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    tensors = [*bregman.teacher.parameters(), *bregman.teacher.buffers()]
    mine = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in mine.items() if address not in theirs)


def test_frozen_parameters_are_shared_and_the_rest_is_all_the_memory() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 2))
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model)
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert own_bytes(bregman, model) == trainable == 4 * (80 + 82)
    assert bregman.teacher[0].weight.data_ptr() == model[0].weight.data_ptr()
    for step in range(3):
        shift(model, step)
        bregman.update()
        bregman(lambda m: m(torch.ones(2, 30)), model(torch.ones(2, 30)))
        assert own_bytes(bregman, model) == trainable
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    assert (bregman.teacher[0].weight == 0.5).all()


def test_what_is_frozen_is_never_copied_even_while_the_teacher_is_made() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    nn.init.constant_(model[0].weight, torch.nan)  # equal to nothing, so that it cannot be found equal later
    for teacher in (frozen_copy(model), MomentumBregman(model).teacher):
        for name, parameter in model.named_parameters():
            own = teacher.get_parameter(name)
            assert own is not parameter
            assert (own.data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad)
        for name, buffer in model.named_buffers():
            assert teacher.get_buffer(name) is buffer


def test_a_copy_of_a_parameter_is_frozen_and_its_own() -> None:
    parameter = nn.Parameter(torch.ones(3))
    copied = own_copy(parameter)
    assert torch.equal(copied, parameter)
    assert not copied.requires_grad
    assert copied.data_ptr() != parameter.data_ptr()


def test_lora_costs_the_adapters_alone() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0", "2"], r=2))
    bregman = MomentumBregman(model)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert own_bytes(bregman, model) == sum(4 * p.numel() for p in adapters.values())
    assert averages(bregman).keys() == adapters.keys()
    x = torch.randn(4, 3)
    assert bregman(lambda m: m(x), model(x)).item() == 0.0
    shift(model)
    assert bregman(lambda m: m(x), model(x)).item() > 1e-6
    bregman.update()
    for name, own in bregman.teacher.named_parameters():
        assert (name in adapters) != (own.data_ptr() == model.get_parameter(name).data_ptr())


def test_a_parameter_thawed_later_is_unshared_at_the_next_call_and_averaged_from_there() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model, beta=0.5)
    model[0].requires_grad_(True)
    x = torch.ones(2, 3)
    bregman(lambda m: m(x), model(x))
    start = model[0].weight.detach().clone()
    assert bregman.teacher[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert torch.equal(bregman.teacher[0].weight, start)
    shift(model)
    assert torch.equal(bregman.teacher[0].weight, start)
    bregman.update()
    torch.testing.assert_close(bregman.teacher[0].weight, start.lerp(model[0].weight.detach(), 0.5))


def test_a_parameter_thawed_without_a_call_is_an_error_that_moves_nothing() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    bregman = MomentumBregman(model, beta=0.5)
    model[0].requires_grad_(True)
    shift(model)
    before = averages(bregman)
    with pytest.raises(RuntimeError, match=r"trains parameters that were frozen.* 0\.bias, 0\.weight\. .*unfreezing"):
        bregman.update()
    assert bregman.updates == 0
    for name, average in averages(bregman).items():
        assert torch.equal(average, before[name])
    assert model[0].weight.requires_grad  # reading the teacher has not frozen the model


def test_a_parameter_frozen_later_keeps_converging() -> None:
    model = mlp()
    bregman = MomentumBregman(model, beta=0.5)
    shift(model)
    model[0].requires_grad_(False)
    distance = [(bregman.teacher[0].weight - model[0].weight).abs().max().item()]
    for _ in range(3):
        bregman.update()
        distance.append((bregman.teacher[0].weight - model[0].weight).abs().max().item())
    np.testing.assert_allclose(distance, [distance[0] / 2**k for k in range(4)], rtol=1e-5)
    assert distance[0] > 0.01


def test_freezing_and_thawing_again_is_no_error() -> None:
    model = mlp()
    bregman = MomentumBregman(model, beta=0.5)
    model[0].requires_grad_(False)
    bregman.update()
    model[0].requires_grad_(True)
    shift(model)
    bregman.update()
    assert bregman.updates == 2


class Quantized(nn.Parameter):
    """As quantized weights are: a subclass with state beside its values."""

    scale: float = 1.0

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "Quantized":
        return super().__new__(cls, data, requires_grad)


def test_a_frozen_parameter_with_a_class_of_its_own_is_the_same_object() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Quantized(torch.tensor([1, 2, 3], dtype=torch.int8))
            self.weight.scale = 0.25
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.weight.scale + self.bias

    model = Model()
    bregman = MomentumBregman(model, divergence="mse")
    assert bregman.teacher.weight is model.weight
    bregman.update()
    assert bregman(lambda m: m(torch.ones(3)), model(torch.ones(3))).item() == 0.0
    assert list(averages(bregman)) == ["bias"]
    alike = MomentumBregman(model, teacher=copy.deepcopy(bregman.teacher), divergence="mse")
    alike.update()
    assert alike.teacher.weight is model.weight
    assert list(averages(alike)) == ["bias"]


def test_quantized_weights_of_a_teacher_passed_in_stay_what_they_are() -> None:
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    model.weight = Quantized(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8))
    teacher.weight = Quantized(torch.tensor([[5, 6], [7, 8]], dtype=torch.int8))
    bregman = MomentumBregman(model, teacher=teacher, beta=0)
    bregman.update()
    assert teacher.weight.tolist() == [[5, 6], [7, 8]]
    assert torch.equal(teacher.bias, model.bias)


def test_looking_at_the_teacher_never_freezes_the_model() -> None:
    model = nn.Linear(2, 2)
    model.weight = Quantized(torch.ones(2, 2))
    bregman = MomentumBregman(model)
    model.weight.requires_grad_(True)
    assert bregman.teacher.weight is model.weight
    assert model.weight.requires_grad
    x = torch.ones(1, 2)
    bregman(lambda m: m(x), model(x))
    assert bregman.teacher.weight is not model.weight
    assert model.weight.requires_grad


@pytest.mark.parametrize("given_teacher", [False, True])
def test_tied_weights_stay_tied(given_teacher: bool) -> None:
    torch.manual_seed(4)
    model = Tied()
    bregman = MomentumBregman(model, beta=0.5, teacher=copy.deepcopy(model) if given_teacher else None)
    start = model.embedding.weight.detach().clone()
    shift(model)
    bregman.update()
    teacher = bregman.teacher
    assert teacher.output.weight is teacher.embedding.weight
    torch.testing.assert_close(teacher.embedding.weight, start.lerp(model.embedding.weight.detach(), 0.5))
    assert sorted(averages(bregman)) == ["embedding.weight", "mixer.bias", "mixer.weight"]


def test_frozen_tied_weights_stay_tied_when_thawed() -> None:
    model = Tied()
    model.embedding.requires_grad_(False)
    bregman = MomentumBregman(model)
    assert bregman.teacher.output.weight is bregman.teacher.embedding.weight
    model.embedding.requires_grad_(True)
    ids = torch.tensor([[1, 2]])
    bregman(lambda m: m(ids), model(ids))
    assert bregman.teacher.output.weight is bregman.teacher.embedding.weight
    assert bregman.teacher.output.weight.data_ptr() != model.output.weight.data_ptr()


def test_a_teacher_with_two_copies_of_a_tied_weight_moves_both() -> None:
    model, teacher = Tied(), Tied()
    teacher.output.weight = nn.Parameter(torch.zeros(7, 4))
    bregman = MomentumBregman(model, teacher=teacher, beta=0.5)
    bregman.update()
    torch.testing.assert_close(teacher.output.weight.detach(), 0.5 * model.embedding.weight.detach())
