"""The penalty: its value, its gradient, what it calls and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from teacher_models import Net, X, shift
from torch import Tensor, nn

from smartreg.bregman import MomentumBregman
from smartreg.divergences import symmetric_kl
from smartreg.smart import SmartLoss

# Value and gradient


def test_penalty_equals_the_reference_and_its_gradient_reaches_the_student_alone() -> None:
    model = Net().double().eval()
    bregman = MomentumBregman(model)
    shift(model)
    x = X.double()
    outputs = model(x)
    penalty = bregman(lambda m: m(x), outputs)
    teacher = bregman.teacher(x)
    expected = reference.symmetric_kl(outputs.detach().numpy(), teacher.detach().numpy())
    assert penalty.item() == pytest.approx(float(expected), rel=1e-12)
    assert penalty.item() > 1e-4

    penalty.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    symmetric_kl(model(x), teacher.detach()).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name
    for parameter in bregman.teacher.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_the_teacher_computes_in_eval_mode_without_a_graph_and_draws_no_random_numbers() -> None:
    model = Net().train()
    bregman = MomentumBregman(model)
    seen = []

    def forward(module: nn.Module) -> Tensor:
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        seen.append(module)
        return module(X)

    outputs = model(X)
    state = torch.get_rng_state()
    first, second = bregman(forward, outputs), bregman(forward, outputs)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert seen == [bregman.teacher] * 2
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("meddle", ["train", "requires_grad_", "teacher"])
def test_the_teacher_stays_frozen_and_in_eval_mode(meddle: str) -> None:
    model = Net()
    model.hidden.requires_grad_(False)
    bregman = MomentumBregman(model)
    if meddle == "train":
        bregman.train()
    elif meddle == "requires_grad_":
        bregman.requires_grad_(True)
    else:
        bregman.teacher.train().requires_grad_(True)
    bregman(lambda m: m(X), model(X))
    teacher = bregman._teacher.module
    assert not any(part.training for part in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    bregman.update()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["hidden.weight", "hidden.bias"]


def test_gradients_of_the_model_are_left_alone() -> None:
    model = Net()
    bregman = MomentumBregman(model)
    model(X).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    bregman(lambda m: m(X), model(X))
    bregman.update()
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_nothing_is_registered() -> None:
    """So that no optimizer gets the teacher, or the model a second time."""

    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.weight * (first - second).abs().mean()

    bregman = MomentumBregman(Net(), divergence=Distance(), output_to_logits=nn.Identity())
    assert list(bregman.parameters()) == list(bregman.buffers()) == list(bregman.children()) == []
    assert bregman(lambda m: m(X), torch.zeros(2, 4)).item() > 0
    assert "beta=0.99" in repr(bregman)


def test_the_divergence_is_called_with_student_and_teacher_and_can_be_overridden() -> None:
    model = Net().eval()
    bregman = MomentumBregman(model, divergence=lambda student, teacher: (2 * student + teacher).mean())
    outputs = torch.full((2, 4), 3.0)
    teacher = model(X).detach().mean()
    torch.testing.assert_close(bregman(lambda m: m(X), outputs), 6 + teacher)
    torch.testing.assert_close(bregman(lambda m: m(X), outputs, divergence=lambda s, t: (t - s).mean()), teacher - 3)
    named = bregman(lambda m: m(X), outputs, divergence="mse")
    torch.testing.assert_close(named, (outputs - model(X).detach()).square().mean())


@pytest.mark.parametrize("as_method", [False, True])
def test_output_to_logits(as_method: bool) -> None:
    model = Net().eval()

    def outputs_of(module: nn.Module) -> Any:
        logits = module(X)
        return SimpleNamespace(logits=None, ends=(logits, logits + 1)) if as_method else {"logits": logits}

    bregman = MomentumBregman(model, divergence="mse", output_to_logits=(lambda out: out.ends) if as_method else None)
    shift(model)
    once = (model(X) - bregman.teacher(X)).square().mean()
    torch.testing.assert_close(bregman(outputs_of, outputs_of(model)), 2 * once if as_method else once)


def test_errors_of_the_outputs_come_before_the_teacher_runs() -> None:
    bregman = MomentumBregman(Net())
    calls = []
    with pytest.raises(TypeError, match="pass output_to_logits"):
        bregman(lambda m: calls.append(1) or m(X), (torch.zeros(2, 4),))
    assert calls == []
    with pytest.raises(ValueError, match=r"one shape to compare, got \(2, 3\) and \(2, 4\)"):
        bregman(lambda m: m(X), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"divergence must return a scalar"):
        bregman(lambda m: m(X), torch.zeros(2, 4), divergence=lambda s, t: s - t)
    with pytest.raises(TypeError, match=r"forward must be a function of the module, .* got Tensor"):
        bregman(torch.zeros(2, 4), lambda m: m(X))


# A forward that forgets the teacher


def test_a_forward_that_never_calls_the_teacher_is_an_error() -> None:
    model = Net()
    bregman = MomentumBregman(model)
    with pytest.raises(RuntimeError, match="never called the teacher given to it"):
        bregman(lambda m: model(X), model(X))
    with pytest.raises(RuntimeError, match="never called the teacher given to it"):
        bregman(lambda m: torch.zeros(2, 4), model(X))
    bregman(lambda m: m(X), model(X))
    with pytest.raises(RuntimeError, match="never called the teacher given to it"):
        bregman(lambda m: model(X), model(X))


def test_calling_any_part_of_the_teacher_counts() -> None:
    model = Net()
    bregman = MomentumBregman(model, divergence="mse")
    assert bregman(lambda m: m.encode(X), model.encode(X)).item() > 0
    assert bregman(lambda m: m.head(m.norm(m.hidden(X))), model(X)).item() > 0


def test_watching_leaves_no_hook_behind() -> None:
    model = Net()
    bregman = MomentumBregman(model)

    def fails(module: nn.Module) -> Tensor:
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        bregman(fails, model(X))
    bregman(lambda m: m(X), model(X))
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in bregman.teacher.modules())


# Construction


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model must be a module, got function"):
        MomentumBregman(test_bad_arguments)
    with pytest.raises(ValueError, match="divergence must be one of"):
        MomentumBregman(Net(), divergence="klull")
    with pytest.raises(TypeError, match="output_to_logits must be None or a function"):
        MomentumBregman(Net(), output_to_logits="logits")
    with pytest.raises(TypeError, match="positional"):
        MomentumBregman(Net(), 0.9)
    with pytest.raises(ValueError, match=r"must have run once.* lazy parameters: bias, weight"):
        MomentumBregman(nn.LazyLinear(2))


def test_a_model_that_cannot_be_copied() -> None:
    model = Net()
    model.last = model(X)  # a tensor on a graph
    with pytest.raises(RuntimeError, match=r"a Net as it is now cannot be copied .*pass it as teacher="):
        MomentumBregman(model)
    MomentumBregman(model, teacher=Net()).update()


# With the other half


def test_with_smart_loss_in_one_loop() -> None:
    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(11, 4)
            self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 3))

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids).mean(dim=1))

    model = Sentences()
    smart = SmartLoss(model, embedding="embedding")
    ids = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(1))
    smart(lambda m: m(ids))
    bregman = MomentumBregman(model, beta=0.9)  # copied with the hook of SmartLoss on it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    penalties = []
    for _ in range(4):
        outputs, smoothness = smart(lambda m: m(ids))
        assert smart.stats.max_perturbation > 0
        proximal = bregman(lambda m: m(ids), outputs)
        (nn.functional.cross_entropy(outputs, ids[:, 0] % 3) + smoothness + proximal).backward()
        optimizer.step()
        optimizer.zero_grad()
        bregman.update()
        penalties.append(proximal.item())
    model.eval()
    assert bregman.teacher(ids).equal(bregman.teacher(ids))
    assert penalties[-1] > 1e-5
    smart.remove()
    bregman(lambda m: m(ids), model(ids))


# torch asks tensors for their .grad when it resumes after a split, and hides the warning only where it is none.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_inside_a_compiled_training_step() -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = Net().eval()
        bregman = MomentumBregman(model, beta=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(model: nn.Module = model, bregman: MomentumBregman = bregman) -> Tensor:
            outputs = model(X)
            return outputs.square().mean() + bregman(lambda m: m(X), outputs)

        run = torch.compile(step, backend="eager") if compiled else step
        losses = []
        for _ in range(3):
            loss = run()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bregman.update()
            losses.append(loss.item())
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0][0] != results[0][2]


def test_in_inference_mode_and_under_autocast() -> None:
    model = Net().eval()
    model.hidden.requires_grad_(False)
    with torch.inference_mode():
        bregman = MomentumBregman(model)
    model.hidden.requires_grad_(True)
    with torch.inference_mode():
        assert bregman(lambda m: m(X), model(X)).item() == 0.0
    shift(model)
    bregman.update()
    assert not any(parameter.is_inference() for parameter in bregman.teacher.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(X)
        assert bregman.teacher(X).dtype == outputs.dtype == torch.bfloat16
        penalty = bregman(lambda m: m(X), outputs)
    penalty.backward()
    assert penalty.item() > 0
    assert model.head.weight.grad.abs().sum() > 0
