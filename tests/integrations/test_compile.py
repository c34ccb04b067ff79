"""`SmartLoss` and `torch.compile`: made before or after, wrapped or in place, and no silent miss.

Most tests trace with `aot_eager`, which makes the very graphs and guards of the default backend but compiles no C++.
"""

import copy
import io
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import recipes
import torch
from smart_models import algorithm_1
from tiny_transformers import batch as bert_batch
from tiny_transformers import build as build_bert
from torch import Tensor, nn
from torch._dynamo.utils import counters

from smartreg import MomentumBregman, SmartLoss, SmartOutput

RECOMPILE_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
BOTH_MODES = pytest.mark.parametrize("memory_efficient", [False, True], ids=["standard", "memory-efficient"])


class Reader(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(11, 4), nn.Dropout(dropout)
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.hidden(self.embedding(ids)).tanh()).mean(1))


def reader(dropout: float = 0.0) -> Reader:
    torch.manual_seed(0)
    return Reader(dropout)


def sentences(tokens: int = 5) -> Tensor:
    return torch.randint(0, 11, (3, tokens), generator=torch.Generator().manual_seed(tokens))


def noise_for(ids: Tensor) -> Tensor:
    return 0.2 * torch.randn(*ids.shape, 4, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest keeps every log record, and the compiler writes its whole trace to this logger.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, in_place: bool = False, **options: Any) -> nn.Module:
    options = {"backend": "aot_eager", "fullgraph": True, **options}
    if not in_place:
        return torch.compile(model, **options)
    model.compile(**options)
    return model


def call(smart: SmartLoss, ids: Tensor) -> tuple[SmartOutput, dict[str, Tensor]]:
    """One training step's outputs, penalty and gradients."""
    smart.model.zero_grad()
    result = smart(lambda m: m(ids), noise=noise_for(ids))
    (result.outputs.square().mean() + result.penalty).backward()
    return result, {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in smart.model.named_parameters()}


@BOTH_MODES
@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_compiled_equals_eager(made: str, in_place: bool, memory_efficient: bool) -> None:
    ids = sentences()
    expected, expected_gradients = call(algorithm_1(reader()), ids)

    model = reader()
    holder = algorithm_1(model) if made == "before" else None  # keeps the hook that the graph is traced with
    wrapped = compiled(model, in_place)
    if holder is not None:
        wrapped(ids)
    found, gradients = call(algorithm_1(wrapped, memory_efficient=memory_efficient), ids)

    assert expected.penalty.item() > 1e-4
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 3  # clean, ascent and perturbed pass: each of them ran compiled


@BOTH_MODES
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning:torch.*")
def test_the_default_backend_equals_eager_and_shares_its_dropout_masks(memory_efficient: bool) -> None:
    ids = sentences()
    model = reader(dropout=0.3)
    found = recipes.run("compile.py", model=model, torch=torch, SmartLoss=SmartLoss)
    wrapped, smart = found["model"], found["smart"]
    zero = SmartLoss(wrapped, epsilon=0.0, memory_efficient=memory_efficient)
    assert zero(lambda m: m(ids)).penalty.item() == 0.0
    if memory_efficient:
        return
    model.eval()
    expected, expected_gradients = call(SmartLoss(reader()), ids)
    result, gradients = call(smart, ids)
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_called_before_smart_loss_existed_is_an_error_with_the_remedy() -> None:
    ids, wrapped = sentences(), compiled(reader())
    wrapped(ids)
    smart = SmartLoss(wrapped)
    with pytest.raises(RuntimeError, match=r"call torch\._dynamo\.reset\(\) after making SmartLoss"):
        smart(lambda m: m(ids))

    torch._dynamo.reset()
    found, _ = call(smart, ids)
    expected, _ = call(SmartLoss(reader()), ids)
    torch.testing.assert_close(found.penalty, expected.penalty, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("memory_efficient", "skipping", "dynamic"), [(False, False, None), (True, False, None), (False, True, True)]
)
def test_training_and_evaluation_on_many_lengths_stay_within_the_recompile_limit(
    memory_efficient: bool, skipping: bool, dynamic: bool | None
) -> None:
    model = reader(dropout=0.3)
    wrapped = compiled(model, dynamic=dynamic)  # fullgraph: the limit would be an error
    smart = SmartLoss(wrapped, memory_efficient=memory_efficient)
    for epoch in range(2):
        model.train()
        for tokens in (5, 3, 6, 4):
            ids = sentences(tokens)
            outputs, penalty = smart(lambda m, ids=ids: m(ids))
            (outputs.sum() + penalty).backward()
            if skipping:
                wrapped(ids).sum().backward()
        model.eval()
        with torch.no_grad():
            for tokens in (5, 3, 7):
                wrapped(sentences(tokens))
        if epoch == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs <= getattr(torch._dynamo.config, RECOMPILE_LIMIT)


def test_a_pass_that_fell_back_to_eager_is_an_error_not_another_dropout_mask() -> None:
    ids, wrapped = sentences(), compiled(reader(dropout=0.3), fullgraph=False)
    smart = SmartLoss(wrapped)
    with (
        torch._dynamo.config.patch(**{RECOMPILE_LIMIT: 1}),
        pytest.raises(RuntimeError, match=r"raise torch\._dynamo\.config\.recompile_limit"),
    ):
        smart(lambda m: m(ids))


def test_autocast_is_seen_inside_a_compiled_graph() -> None:
    """`ascent_autocast=False` runs the ascent, and the reference that it compares with, in float32."""
    ids, dtypes = sentences(), []

    def spy(first: Tensor, second: Tensor) -> Tensor:
        dtypes.append((first.dtype, second.dtype))
        return (first.float() - second.float()).square().sum()

    smart = algorithm_1(compiled(reader()), divergence=spy, ascent_autocast=False)
    with torch.autocast("cpu", torch.bfloat16):
        smart(lambda m: m(ids))
    ascent, last = dtypes[-2:]
    assert ascent == (torch.float32, torch.float32)
    assert last == (torch.bfloat16, torch.bfloat16)


def test_a_hugging_face_model_compiles_around_the_hook_without_a_break() -> None:
    inputs = bert_batch()
    noise = 0.1 * torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(model: nn.Module) -> SmartOutput:
        return SmartLoss(model, steps=0)(lambda m: m(**inputs), mask=inputs["attention_mask"], noise=noise)

    with torch.no_grad():
        wanted, found = run(build_bert().eval()), run(compiled(build_bert().eval()))
    assert not counters["graph_break"]
    torch.testing.assert_close(found.penalty, wanted.penalty, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.outputs.logits, wanted.outputs.logits, rtol=1e-9, atol=1e-12)


def test_copies_of_a_compiled_model_and_compiled_copies_of_a_hooked_one() -> None:
    ids, model = sentences(), reader().eval()
    wrapped = compiled(model)
    smart = SmartLoss(wrapped)
    copies: list[nn.Module] = []
    pickled: list[bytes] = []

    def forward(m: nn.Module) -> Tensor:
        if not copies:  # in the middle of a pass, where the switch is live
            copies.append(copy.deepcopy(model))
            pickled.append(pickle.dumps(model))
        return m(ids)

    smart(forward)
    wanted = model(ids)
    expected = SmartLoss(reader(), steps=0)(lambda m: m(ids), noise=noise_for(ids)).penalty
    copies += [copy.deepcopy(wrapped), pickle.load(io.BytesIO(pickled[0]))]
    for other in copies:
        torch._dynamo.reset()  # all of them share the code, and so the limit on its graphs
        run = other if other is copies[1] else compiled(other)
        assert torch.equal(run(ids), wanted)
        # What is left of the first hook makes the compiler look at the hooks, so the new one is seen.
        found = SmartLoss(run, steps=0)(lambda m: m(ids), noise=noise_for(ids)).penalty
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_compiled_teacher_of_a_compiled_student() -> None:
    ids, model = sentences(), reader()
    wrapped = compiled(model)
    smart, bregman = SmartLoss(wrapped), MomentumBregman(wrapped)
    with torch.no_grad():
        model.head.weight[0].add_(0.5)
    outputs, _ = smart(lambda m: m(ids))
    proximal = bregman(lambda m: m(ids), outputs)
    bregman.teacher.compile(backend="aot_eager", fullgraph=True)
    again = bregman(lambda m: m(ids), outputs)

    assert proximal.item() > 1e-6
    torch.testing.assert_close(again, proximal, rtol=1e-5, atol=1e-8)
    assert not any(name.startswith("_orig_mod") for name, _ in bregman.teacher.named_parameters())
    before = bregman.teacher.head.weight.clone()
    bregman.update()
    torch.testing.assert_close(bregman.teacher.head.weight, 0.99 * before + 0.01 * model.head.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look
@BOTH_MODES
def test_a_compiled_step_with_the_call_inside_is_the_eager_step(memory_efficient: bool) -> None:
    model, ids = reader(), sentences()
    smart = SmartLoss(model, memory_efficient=memory_efficient, embedding="embedding", steps=1)
    bregman = MomentumBregman(model)

    def step(ids: Tensor) -> Tensor:
        outputs, penalty = smart(lambda m: m(ids))
        return outputs.square().mean() + penalty + bregman(lambda m: m(ids), outputs)

    expected = step(ids)
    assert torch.allclose(torch.compile(step, backend="eager")(ids), expected, rtol=1e-5)
