"""The hook on the embedding: one for all owners, inert between calls, and no part of copies and pickles."""

import contextlib
import copy
import gc
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from smart_models import CLASSES, FEATURES, VOCABULARY, Sentence, algorithm_1, batch, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smartreg import SmartLoss

IDS, MASK = batch()


def hooks(model: Sentence) -> list[Any]:
    return list(model.embedding._forward_hooks.values())


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)


def test_one_hook_for_all_owners_which_goes_with_the_last() -> None:
    model = build()
    first, second = SmartLoss(model), SmartLoss(model, epsilon=0.5)
    assert len(hooks(model)) == 1
    first(lambda m: m(IDS))
    del first
    gc.collect()
    assert len(hooks(model)) == 1
    assert second(lambda m: m(IDS)).penalty.item() > 0
    del second
    gc.collect()
    assert hooks(model) == []


def test_copies_of_copies_do_not_gather_hooks() -> None:
    model = build()
    for _ in range(3):
        smart = SmartLoss(model)
        model = copy.deepcopy(model)
        assert len(hooks(model)) == 1
    smart = SmartLoss(model)
    assert len(hooks(model)) == 1
    assert smart(lambda m: m(IDS)).penalty.item() > 0
    smart.remove()
    assert hooks(model) == []


def test_remove() -> None:
    model = build()
    first, second = SmartLoss(model), SmartLoss(model)
    first.remove()
    first.remove()  # nothing left to do: it does not take the share of another
    assert second(lambda m: m(IDS)).penalty.item() > 0
    with pytest.raises(RuntimeError, match="this SmartLoss was removed from its model: make a new one"):
        first(lambda m: m(IDS))
    second.remove()
    assert hooks(model) == []
    assert SmartLoss(model)(lambda m: m(IDS)).penalty.item() > 0


def test_hooks_of_others_stay() -> None:
    model, seen = build(), []
    model.embedding.register_forward_hook(lambda *_: seen.append("theirs"))
    smart = SmartLoss(model, steps=0)
    smart(lambda m: m(IDS))
    smart.remove()
    model(IDS)
    assert seen == ["theirs"] * 3
    assert len(hooks(model)) == 1


def test_inert_between_calls() -> None:
    model = build()
    plain = model(IDS)
    smart = SmartLoss(model)
    outputs, _ = smart(lambda m: m(IDS))
    assert torch.equal(outputs, plain)
    assert torch.equal(model(IDS), plain)
    assert model.state_dict().keys() == build().state_dict().keys()


@copies
@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_carry_no_hook_of_ours(copied: Callable[[nn.Module], nn.Module], when: str) -> None:
    model = build()
    plain = model(IDS)
    smart = SmartLoss(model)
    if when == "after":
        smart(lambda m: m(IDS))
    twin = copied(model)
    assert not any("smartreg" in type(hook).__module__ for hook in hooks(twin))
    assert torch.equal(twin(IDS), plain)
    # Both go on, neither disturbing the other.
    assert SmartLoss(twin)(lambda m: m(IDS)).penalty.item() > 0
    assert smart(lambda m: m(IDS)).penalty.item() > 0
    with torch.no_grad():
        twin.embedding.weight.zero_()
    assert torch.equal(model(IDS), plain)
    assert torch.equal(copied(twin)(IDS), twin(IDS))  # the copy of a copy


@copies
def test_a_copy_made_in_the_middle_of_a_call_is_inert(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, twins = build(), []
    plain = model(IDS)

    def forward(m: Sentence) -> Tensor:
        twins.append(copied(m))
        return m(IDS)

    _, penalty = algorithm_1(model)(forward)
    assert penalty.item() > 0
    assert len(twins) == 3
    assert all(torch.equal(twin(IDS), plain) for twin in twins)


def test_a_pickle_loads_where_the_package_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, FEATURES), nn.Flatten(), nn.Linear(4 * FEATURES, CLASSES))
    smart = SmartLoss(model, embedding="0")
    smart(lambda m: m(IDS))
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save((IDS, model(IDS).detach()), tmp_path / "expected.pt")
    script = """
import pickle, sys
sys.modules["smartreg"] = None  # any import of it fails
import torch
ids, expected = torch.load("expected.pt")
for model in (torch.load("model.pt", weights_only=False), pickle.load(open("model.pkl", "rb"))):
    assert torch.equal(model(ids), expected)
try:
    import smartreg
except ImportError:
    print("equal, without it")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "equal, without it\n"), done.stderr


@copies
def test_a_regularizer_is_copied_with_its_model(copied: Callable[[Any], Any]) -> None:
    model = build()
    smart = SmartLoss(model, epsilon=0.3, generator=torch.Generator().manual_seed(1))
    smart(lambda m: m(IDS))
    twin = copied(smart)
    assert twin.model is not model
    assert twin.settings == smart.settings
    assert twin.stats.penalty == smart.stats.penalty
    assert twin(lambda m: m(IDS)).penalty.item() == smart(lambda m: m(IDS)).penalty.item()
    assert len(twin.model.seen) == len(model.seen)
    twin.remove()
    assert len(hooks(model)) == 1


class Owner(nn.Module):
    """A model that holds its own regularizer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.smart = SmartLoss(self, embedding="embedding")

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(dim=1))


@copies
def test_a_model_may_hold_its_regularizer(copied: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = Owner()
    model.smart(lambda m: m(IDS))
    twin = copied(model)
    assert twin.smart.model is twin
    for one in (model, twin):
        one.smart(lambda m: m(IDS)).penalty.backward()
        assert one.smart.stats.penalty > 0
    assert model.state_dict().keys() == {"embedding.weight", "head.weight", "head.bias"}


def test_it_registers_neither_model_nor_parameters() -> None:
    model = build()
    smart = SmartLoss(model)
    assert list(smart.parameters()) == []
    assert list(smart.buffers()) == []
    assert list(smart.children()) == []
    assert smart.state_dict() == {}
    smart.eval().float().requires_grad_(False)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float64 for p in model.parameters())
    assert smart.model is model


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "efficient"])
def test_an_embedding_recomputed_inside_a_backward_is_an_error(memory_efficient: bool) -> None:
    model = build()

    def forward(m: Sentence) -> Tensor:
        return checkpoint(m, IDS, use_reentrant=False)

    error = pytest.raises(RuntimeError, match="the embedding was recomputed inside a backward")
    smart = SmartLoss(model, memory_efficient=memory_efficient)
    with error:
        smart(forward).penalty.backward()
    with error:  # between calls too: the user's own loss would have met the inert hook, but says what to do
        forward(model).sum().backward()
    smart.remove()
    forward(model).sum().backward()
    assert model.embedding.weight.grad is not None


def test_calling_it_inside_its_own_forward_is_an_error() -> None:
    model = build()
    smart = SmartLoss(model)

    def forward(m: Sentence) -> Tensor:
        return smart(lambda inner: inner(IDS)).outputs

    with pytest.raises(RuntimeError, match="forward must not call SmartLoss on the model that it was given"):
        smart(forward)
    assert smart(lambda m: m(IDS)).penalty.item() > 0


def test_inert_after_forward_has_raised() -> None:
    model = build()
    smart = SmartLoss(model)
    with contextlib.suppress(KeyError):
        smart(lambda m: {}["nothing"])
    assert torch.equal(model.embedding(IDS), nn.functional.embedding(IDS, model.embedding.weight))
