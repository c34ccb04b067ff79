"""Masks, outputs and objects that would give a plausible number that is wrong are refused, and the remedy named."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from smart_models import CLASSES, FEATURES, VOCABULARY, batch, both_modes, build
from torch import Tensor, nn

from smartreg import (  # fmt: skip
    MomentumBregman,
    SlantedTriangularLR,
    SmartLoss,
    SmartWarning,
    binary_symmetric_kl,
    diagnose,
    mse,
    smoothness_penalty,
    symmetric_kl,
)

IDS, MASK = batch()

Use = Callable[[Any], Tensor]


def as_mask(mask: Any) -> Tensor:
    return SmartLoss(build())(lambda m: m(IDS), mask=mask).penalty


def as_function_mask(mask: Any) -> Tensor:
    return smoothness_penalty(lambda x: x.sum(dim=1), torch.arange(24.0).reshape(3, 4, 2) / 50, mask=mask).penalty


def as_output_mask(mask: Any) -> Tensor:
    return SmartLoss(build())(lambda m: m.hidden(m.embedding(IDS)), output_mask=mask).penalty


def as_mask_of_a_divergence(mask: Any) -> Tensor:
    return mse(torch.ones(3, 4), torch.zeros(3, 4), mask=mask)


ADDITIVE = (1.0 - MASK.float()) * -1e4
WRONG: list[tuple[Any, type[Exception], str]] = [
    (ADDITIVE, ValueError, r"hold 0 and 1 \(or booleans\) alone, got -1e\+04; an additive mask.*=\(additive == 0\)"),
    (torch.where(MASK == 1, 0.0, -torch.inf), ValueError, r"alone, got -inf"),
    (0.5 * MASK, ValueError, r"alone, got 0\.5"),
    (torch.where(MASK == 1, 1.0, torch.nan), ValueError, r"alone, got nan"),
    (2 * MASK, ValueError, r"alone, got 2"),
    (-MASK, ValueError, r"alone, got -1"),
    (MASK.tolist(), TypeError, r"got (a list with a )?list; pass torch\.as_tensor"),
    (MASK.numpy(), TypeError, r"got ndarray; pass torch\.as_tensor"),
    (True, TypeError, r"got bool"),
    (MASK.to("meta"), TypeError, r"be a tensor of 0 and 1 or booleans, got one on the meta device, without values"),
    (MASK.to_sparse(), TypeError, r"got a sparse_coo one; pass its to_dense"),
    (MASK + 0j, TypeError, r"got one of torch\.complex64"),
]


@pytest.mark.parametrize("use", [as_mask, as_function_mask, as_output_mask, as_mask_of_a_divergence])
@pytest.mark.parametrize(("mask", "error", "message"), WRONG, ids=[message[:24] for _, _, message in WRONG])
def test_a_mask_is_zeros_and_ones(
    use: Callable[[Any], Tensor], mask: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"mask must .*" + message):
        use(mask)
    for fine in (MASK, MASK.bool(), MASK.float(), MASK.to(torch.uint8), MASK.half()):
        assert use(fine).item() == use(MASK.bool()).item() > 0


@both_modes
def test_a_mask_of_the_other_convention_is_told_once(memory_efficient: bool) -> None:
    model = build()
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    with pytest.warns(SmartWarning, match=r"no example.*other convention: it must be 1 or True.* marks 25% of the"):
        penalty = smart(lambda m: m(IDS, MASK), mask=1 - MASK).penalty
    assert penalty.item() == 0.0
    smart(lambda m: m(IDS, MASK), mask=1 - MASK)  # warnings are errors here
    SmartLoss(model, memory_efficient=memory_efficient)(lambda m: m(IDS, MASK), mask=MASK)


def test_examples_without_a_gradient_are_told_for_a_function_too() -> None:
    with pytest.warns(
        SmartWarning, match=r"no example of this call.* marks 100% of the positions.*or its gradients are not finite"
    ):
        smoothness_penalty(lambda x: torch.sign(x).sum(dim=1) + 0 * x.sum(dim=1), torch.ones(3, 2, 3))


def test_one_example_of_several_may_be_bad() -> None:
    mask = MASK.clone()
    mask[1:] = 0
    assert SmartLoss(build())(lambda m: m(IDS, MASK), mask=mask).penalty.item() > 0


def score(m: Any) -> Tensor:
    return m(IDS)[:, 0]  # (batch,)


@both_modes
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl", "jensen_shannon", "hellinger"])
def test_scores_of_a_batch_are_no_classes(divergence: str, memory_efficient: bool) -> None:
    model = build()
    message = rf"{divergence} needs logits \(batch, \.\.\., classes\), got \(3,\).*binary_symmetric_kl, or mse"
    with pytest.raises(ValueError, match=message):
        SmartLoss(model, divergence=divergence, memory_efficient=memory_efficient)(score)
    with pytest.raises(ValueError, match=message):
        MomentumBregman(model, divergence=divergence)(score, score(model))
    with pytest.raises(ValueError, match=message):
        smoothness_penalty(lambda x: x.sum(dim=(1, 2)), torch.ones(3, 2, 2), divergence=divergence)
    with pytest.raises(ValueError, match=message):
        diagnose(model, score, divergence=divergence)


@pytest.mark.parametrize("name", ["mse", "binary_symmetric_kl"])
def test_scores_of_a_batch_have_divergences_of_their_own(name: str) -> None:
    model, delta = build(), torch.full((*IDS.shape, FEATURES), 0.01, dtype=torch.float64)
    smart = SmartLoss(model, divergence=name, start="noise", steps=0, epsilon=5.0)
    moved = model.head(torch.tanh(model.hidden(model.embedding(IDS) + delta)).mean(dim=1))[:, 0]
    expected = getattr(reference, name)(moved.detach().numpy(), score(model).detach().numpy())
    assert smart(score, noise=delta).penalty.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["epsilon", "step_size", "noise_std"])
def test_sizes_whose_norm_overflows(name: str) -> None:
    """In float32 the norm of a perturbation of 1e30 is infinite, and its projection would be 0."""
    for size in (1e30, 10**30, 1.1e9):
        with pytest.raises(
            ValueError, match=rf"{name} must be at most 1e\+09, got 1\.?1?e\+\d+: norms of much more overf"
        ):
            SmartLoss(build(), **{name: size})
        with pytest.raises(ValueError, match=rf"{name} must be at most 1e\+09, got"):
            smoothness_penalty(lambda x: x, torch.ones(2, 2, 3), **{name: size})


@pytest.mark.parametrize("start", ["noise", "towards_uniform"])
@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_largest_sizes_fill_the_ball(start: str, norm: str, steps: int) -> None:
    sizes = {"epsilon": 1e9, "step_size": 1e9, "noise_std": 1e9, "epsilon_scale": "absolute"}
    smart = SmartLoss(build(dtype=torch.float32), start=start, norm=norm, steps=steps, **sizes, divergence="mse")
    smart(lambda m: m.hidden(torch.tanh(1e-9 * m.embedding(IDS).mean(1))))  # the ball ends where tanh does
    assert smart.stats.radius_used == pytest.approx(1, rel=1e-5)
    assert smart.stats.bad_examples == 0


def test_what_cannot_be_perturbed_or_run() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    words = torch.nested.nested_tensor([torch.ones(2).long(), torch.ones(4).long()], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"embeds must be a dense tensor, got a nested one: pad it"):
        smoothness_penalty(lambda x: x, ragged)
    with pytest.raises(
        TypeError, match=r"input of symmetric_kl must be a dense tensor, got a nested one; pad or densify it"
    ):
        symmetric_kl(ragged, ragged)
    with pytest.raises(TypeError, match=r"target of binary_symmetric_kl must be a dense tensor, got a sparse_coo one"):
        binary_symmetric_kl(torch.ones(2), torch.ones(2).to_sparse())
    with pytest.raises(TypeError, match=r"embedding must return a dense tensor, got a nested one from Embedding: pad"):
        SmartLoss(build())(lambda m: m.embedding(words).values())
    with pytest.raises(TypeError, match=r"fn must be a function of the embeddings, got NoneType"):
        smoothness_penalty(None, torch.ones(2, 3))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"noise must be a tensor, or a sequence of tensors, got float"):
        SmartLoss(build())(lambda m: m(IDS), noise=0.1)
    with pytest.raises(ValueError, match=r"epsilon must be finite and not negative, got an int that no float can hold"):
        SmartLoss(build(), epsilon=10**400)
    with pytest.raises(TypeError, match=r"forward must be a function of the module.*got int"):
        diagnose(build(), 3)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        smoothness_penalty(lambda x: x, torch.ones(2, 3), generator=3)  # type: ignore[arg-type]  # on purpose


def test_function_transforms_cannot_hold_a_search() -> None:
    smart = SmartLoss(build())
    with pytest.raises(RuntimeError, match=r"torch\.func transforms \(vmap, grad\) forbid: call it outside of them"):
        torch.func.vmap(lambda ids: smart(lambda m: m(ids)).penalty)(IDS.unsqueeze(0))
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda x: smoothness_penalty(lambda y: y, x).penalty)(torch.ones(2, 2, 3))


@pytest.mark.filterwarnings("ignore:`?torch.jit.script:DeprecationWarning")
def test_scripted_models_cannot_be_perturbed() -> None:
    def plain() -> nn.Sequential:
        return nn.Sequential(nn.Embedding(VOCABULARY, FEATURES), nn.Flatten(), nn.Linear(4 * FEATURES, CLASSES))

    with pytest.raises(TypeError, match=r"model must run in Python.*got a scripted one: make"):
        SmartLoss(torch.jit.script(plain()), embedding="0")
    part = nn.Sequential(torch.jit.script(nn.Sequential(nn.Embedding(3, 2))), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"embedding must run in Python.*leave the embedding out of the scripted part"):
        SmartLoss(part, embedding="0.0")


def schedule(steps: int = 2) -> tuple[torch.optim.Optimizer, SlantedTriangularLR]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = SlantedTriangularLR(optimizer, 10)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def test_a_schedule_that_no_longer_fits_its_optimizer() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got NoneType"):
        SlantedTriangularLR(None, 10)  # type: ignore[arg-type]  # on purpose
    optimizer, scheduler = schedule()
    rate = optimizer.param_groups[0]["lr"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.2, "initial_lr": 0.2})
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"made for 1 parameter groups, and the optimizer has 2 now: make the"
    ) as found:
        scheduler.step()
    (last,) = re.findall(r"last_epoch=(\d+)", str(found.value))
    again = SlantedTriangularLR(optimizer, 10, last_epoch=int(last))  # the remedy, followed
    _, expected = schedule(3)
    assert again.get_last_lr() == [expected.get_last_lr()[0], 2 * expected.get_last_lr()[0]]
    assert rate != again.get_last_lr()[0]


def test_states_that_are_none() -> None:
    _, scheduler = schedule()
    kept = scheduler.state_dict()
    with pytest.raises(ValueError, match=r"state of a SlantedTriangularLR, got one without last_epoch"):
        scheduler.load_state_dict({name: value for name, value in kept.items() if name != "last_epoch"})
    with pytest.raises(TypeError, match=r"state of a SlantedTriangularLR, got list"):
        scheduler.load_state_dict([kept])  # type: ignore[arg-type]  # on purpose
    assert scheduler.state_dict() == kept


@both_modes
def test_a_clean_output_that_is_not_finite_is_told_once(memory_efficient: bool) -> None:
    model = build()
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    smart(lambda m: m(IDS))
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.warns(SmartWarning, match=r"clean output of the model is not finite, before any perturbation.*is nan"):
        smart(lambda m: m(IDS))
    smart(lambda m: m(IDS))  # warnings are errors here
    assert smart.stats.penalty != smart.stats.penalty


def test_an_overflow_of_the_perturbed_pass_alone_is_told_apart() -> None:
    with pytest.warns(SmartWarning, match=r"penalty is (inf|nan), and the clean output is finite: the perturbed pass"):
        SmartLoss(build(dtype=torch.float32), epsilon=1e9, divergence="mse")(lambda m: m.embedding(IDS) ** 4)


def test_a_class_that_is_out_of_the_question_is_finite_enough() -> None:
    absent = torch.tensor([0.0, -torch.inf, 0.0]).double()
    assert SmartLoss(build())(lambda m: m(IDS) + absent).penalty.item() > 0
