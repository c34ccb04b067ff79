"""What else a call touches: look-ups that follow the output, the user's hooks, interruptions wherever they come."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import reference
import torch
from smart_models import CLASSES, FEATURES, VOCABULARY, Sentence, batch, both_modes, build
from torch import Tensor, nn

import smartreg
from smartreg import SmartLoss

IDS, MASK = batch()


class Decoder(nn.Module):
    """The second token is what the model predicts from the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.head = nn.Linear(FEATURES, VOCABULARY)
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        first = self.head(torch.tanh(self.embedding(ids)))
        return self.head(torch.tanh(self.embedding(first.argmax(-1)))) + first


@both_modes
def test_a_head_with_batch_norm_counts_one_pass_as_part_of_the_model(memory_efficient: bool) -> None:
    """Beside the model it counts every pass, as `forward` of `SmartLoss` says."""
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    counted = {}
    for inside in (True, False):
        encoder = nn.Sequential(nn.Embedding(VOCABULARY, FEATURES), nn.Flatten())
        head = nn.Sequential(nn.BatchNorm1d(2 * FEATURES), nn.Linear(2 * FEATURES, CLASSES))
        model = nn.ModuleDict({"encoder": encoder, "head": head}) if inside else encoder
        smart = SmartLoss(model, embedding=encoder[0], memory_efficient=memory_efficient, check_first_call=False)
        smart((lambda m: m["head"](m["encoder"](ids))) if inside else (lambda m, head=head: head(m(ids))))
        counted[inside] = int(head[0].num_batches_tracked)
    assert counted == {True: 1, False: 3 if memory_efficient else 2}  # the passes that the docs count


@both_modes
@pytest.mark.parametrize("dropout", ["shared", "independent"])
def test_a_look_up_that_follows_the_output_is_its_own(dropout: Any, memory_efficient: bool) -> None:
    model, ids = Decoder().eval(), torch.arange(1, 7)
    delta = 0.9 * torch.randn(6, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smart = SmartLoss(model, start="noise", steps=0, epsilon=50.0, dropout=dropout, memory_efficient=memory_efficient)
    penalty = smart(lambda m: m(ids), noise=[delta, torch.zeros_like(delta)]).penalty

    first = model.head(torch.tanh(model.embedding(ids) + 0.0))
    moved = model.head(torch.tanh(model.embedding(ids) + delta))
    assert not torch.equal(first.argmax(-1), moved.argmax(-1))
    outputs = [model.head(torch.tanh(model.embedding(f.argmax(-1)))) + f for f in (moved, first)]
    expected = reference.symmetric_kl(*(output.detach().numpy() for output in outputs))
    assert penalty.item() == pytest.approx(expected, rel=1e-9)

    penalty.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    smartreg.symmetric_kl(*outputs).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_ids_that_forward_computes_anew_still_share_the_look_up() -> None:
    model = build()
    smart = SmartLoss(model)
    seen: list[Tensor] = []
    smart(lambda m: m(IDS))
    model.embedding.weight.register_hook(lambda gradient: seen.append(gradient))
    for forward in (lambda m: m(IDS), lambda m: m(IDS.clone()), lambda m: m(IDS + 0)):
        seen.clear()
        outputs, penalty = smart(forward)
        (outputs.sum() + penalty).backward()
        assert len(seen) == 1


def collecting(model: Sentence) -> dict[str, Any]:
    """What several kinds of hooks have collected."""
    collected: dict[str, Any] = {"last": None, "all": []}

    class Extractor:
        def __init__(self) -> None:
            self.features: Tensor | None = None
            self.calls = 0

        def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.features = output.detach()
            self.calls += 1

    extractor = Extractor()
    collected["extractor"] = extractor

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        collected["last"] = output.detach()
        collected["all"].append(output.detach())

    model.hidden.register_forward_hook(keep)
    model.hidden.register_forward_hook(extractor.hook)
    return collected


@both_modes
def test_features_that_hooks_collect_are_those_of_the_clean_pass(memory_efficient: bool) -> None:
    model = build()
    collected = collecting(model)
    smart = SmartLoss(model, steps=1, start="noise", epsilon=0.5, memory_efficient=memory_efficient)
    for number in (1, 2):
        assert smart(lambda m: m(IDS)).penalty.item() > 0
        expected = model.hidden.weight @ model.embedding(IDS).unsqueeze(-1)
        expected = expected.squeeze(-1) + model.hidden.bias
        for features in (collected["last"], collected["all"][-1], collected["extractor"].features):
            torch.testing.assert_close(features, expected.detach(), rtol=1e-12, atol=1e-12)
        assert len(collected["all"]) == collected["extractor"].calls == number


@both_modes
@pytest.mark.parametrize("start", ["noise", "towards_uniform"])
@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # the embedding has no input with a graph
def test_backward_hooks_of_modules_run_in_the_users_backward_alone(start: Any, memory_efficient: bool) -> None:
    model = build()
    fired: list[str] = []
    handles = [
        model.hidden.register_full_backward_hook(lambda *_: fired.append("full")),
        model.hidden.register_full_backward_pre_hook(lambda *_: fired.append("pre")),
        nn.modules.module.register_module_full_backward_hook(lambda *_: fired.append("global")),
    ]
    try:
        smart = SmartLoss(model, start=start, steps=2, memory_efficient=memory_efficient)
        outputs, penalty = smart(lambda m: m(IDS))
        assert list(fired) == []
        (outputs.sum() + penalty).backward()
        assert fired.count("full") == fired.count("pre") == (1 if memory_efficient else 2)
        assert "global" in fired
        assert model.hidden._backward_hooks
    finally:
        for handle in handles:
            handle.remove()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    twin = build()
    torch.manual_seed(0)
    outputs, penalty = SmartLoss(twin, start=start, steps=2)(lambda m: m(IDS))
    if start != "noise":
        (outputs.sum() + penalty).backward()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


class Stateful(Sentence):
    """An attribute and a buffer that count the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.kept: list[int] = []
        self.register_buffer("count", torch.zeros(()))

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.passes += 1
        self.kept.append(self.passes)
        self.count += 1
        return super().encode(ids, mask)


def stateful() -> Stateful:
    torch.manual_seed(0)
    return Stateful().double()


@both_modes
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_any_pass_but_the_first_leaves_what_one_pass_left(error: Any, memory_efficient: bool) -> None:
    for broken in range(2, 6):
        model, calls = stateful(), []
        smart = SmartLoss(model, steps=2, memory_efficient=memory_efficient, check_first_call=False)

        def forward(m: Stateful, calls: list[None] = calls, broken: int = broken) -> Tensor:
            calls.append(None)
            outputs = m(IDS)
            if len(calls) == broken:
                raise error("on purpose")
            return outputs

        if broken > 4 + memory_efficient:
            smart(forward)
        else:
            with pytest.raises(error, match="on purpose"):
                smart(forward)
        assert (model.passes, model.kept, model.count.item()) == (1, [1], 1.0), broken
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        smart(lambda m: m(IDS))


def interrupted_at(line: int, call: Callable[[], Any]) -> bool:
    """Run, with a Ctrl-C before the given line of the files that change and restore a model; whether it came."""
    watched = str(Path(smartreg.__file__).parent / "_model")
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.startswith(watched) or frame.f_code.co_name == "__torch_dispatch__":
            return None  # the latter runs in the middle of the user's lines
        if event == "line":
            passed += 1
            if passed == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@both_modes
def test_a_ctrl_c_before_any_line_leaves_nothing_behind(memory_efficient: bool) -> None:
    line, came = 1, True
    while came:
        model = stateful()
        hook = model.hidden.register_full_backward_hook(lambda *_: None)
        options: Any = {"memory_efficient": memory_efficient, "check_first_call": False}
        smart = SmartLoss(model, steps=1, start="noise", **options)
        came = interrupted_at(line, lambda: smart(lambda m: m(IDS)))  # noqa: B023  # called at once
        assert all(p.requires_grad and p.grad is None for p in model.parameters()), line
        assert hook.id in model.hidden._backward_hooks, line
        assert model.passes == len(model.kept) == int(model.count), line
        outputs, penalty = smart(lambda m: m(IDS))  # the hook on the embedding is free again
        assert penalty.item() > 0
        assert outputs.shape == (3, CLASSES)
        line += 23 if line > 10 else 1  # all of them once: the step is for time's sake
    assert line > 300
