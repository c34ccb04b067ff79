"""What is compared: the tensors taken from an output, and the divergence of two such tuples."""

from collections import OrderedDict, UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from smartreg._outputs import check_output_to_logits, compared_tensors, divergence_of

LOGITS = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def absolute(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs().mean()


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        SimpleNamespace(logits=LOGITS, loss=None),
        {"logits": LOGITS, "loss": None},
        UserDict(logits=LOGITS),
        OrderedDict(loss=1.0, logits=LOGITS),
    ],
    ids=["tensor", "attribute", "dict", "mapping", "ordered"],
)
def test_default_finds_the_logits_themselves(output: object) -> None:
    tensors = compared_tensors(output)
    assert isinstance(tensors, tuple)
    assert len(tensors) == 1
    assert tensors[0] is LOGITS


def test_model_output_of_transformers() -> None:
    assert compared_tensors(SequenceClassifierOutput(logits=LOGITS))[0] is LOGITS
    with pytest.raises(TypeError, match="fused cross-entropy kernels"):
        compared_tensors(SequenceClassifierOutput(loss=torch.tensor(1.0)))


@pytest.mark.parametrize(
    "output", [(LOGITS,), [LOGITS], {"scores": LOGITS}, SimpleNamespace(scores=LOGITS), None, 1.0, "logits"]
)
def test_anything_else_is_an_error_that_names_the_argument(output: object) -> None:
    with pytest.raises(TypeError, match=r"got (tuple|list|dict|SimpleNamespace|NoneType|float|str); pass output_to_lo"):
        compared_tensors(output)


@pytest.mark.parametrize("output", [SimpleNamespace(logits=None), {"logits": None}])
def test_logits_none_says_to_switch_fused_kernels_off(output: object) -> None:
    with pytest.raises(TypeError, match=r"are None, as fused cross-entropy kernels.*switch.*off.*output_to_logits"):
        compared_tensors(output)


def test_logits_that_are_no_tensor() -> None:
    with pytest.raises(
        TypeError, match=r"logits of the returned \w+ must be a tensor, got list; pass output_to_logits"
    ):
        compared_tensors(SimpleNamespace(logits=[1.0, 2.0]))


@pytest.mark.parametrize("output", [LOGITS.long(), {"logits": LOGITS > 0}])
def test_integers_cannot_be_compared(output: object) -> None:
    with pytest.raises(TypeError, match=r"must be floating-point, got torch\.(int64|bool); pass output_to_logits"):
        compared_tensors(output)


@pytest.mark.parametrize("kind", [tuple, list])
def test_output_to_logits_may_return_a_tensor_or_a_sequence(kind: type) -> None:
    output = SimpleNamespace(start=LOGITS, end=LOGITS + 1, logits=None)
    assert compared_tensors(output, lambda out: out.start)[0] is LOGITS
    tensors = compared_tensors(output, lambda out: kind([out.start, out.end]))
    assert isinstance(tensors, tuple)
    assert [t.data_ptr() for t in tensors] == [output.start.data_ptr(), output.end.data_ptr()]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, r"output_to_logits must return a tensor or a sequence of tensors, got NoneType"),
        ({"logits": LOGITS}, TypeError, r"output_to_logits must return a tensor or a sequence of tensors, got dict"),
        ([LOGITS, None], TypeError, r"output_to_logits must return tensors, got a sequence with a NoneType"),
        ("logits", TypeError, r"output_to_logits must return tensors, got a sequence with a str"),
        ([], ValueError, r"output_to_logits must return at least one tensor"),
        ([LOGITS, LOGITS.int()], TypeError, r"must be floating-point, got torch.int32"),
    ],
)
def test_bad_output_to_logits(value: object, error: type[Exception], message: str) -> None:
    def bad(_: object) -> Any:
        return value

    with pytest.raises(error, match=message):
        compared_tensors(LOGITS, bad)


def test_output_to_logits_is_none_or_a_function() -> None:
    check_output_to_logits(None)
    check_output_to_logits(len)
    with pytest.raises(TypeError, match="output_to_logits must be None or a function of the output, got str"):
        check_output_to_logits("logits")


def test_divergences_of_a_sequence_are_summed() -> None:
    first, second = (LOGITS, LOGITS[:1]), (LOGITS - 1, LOGITS[:1] + 2)
    assert divergence_of(absolute, first[:1], second[:1]).item() == 1.0
    assert divergence_of(absolute, first, second).item() == 3.0


def test_divergence_keeps_the_order_and_both_graphs() -> None:
    first, second = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    value = divergence_of(lambda a, b: 5 * a + 7 * b, (first, first), (second, second))
    value.backward()
    assert value.item() == 62.0  # 2 · (5·2 + 7·3)
    assert (first.grad, second.grad) == (torch.tensor(10.0), torch.tensor(14.0))


def test_number_and_shapes_must_match() -> None:
    with pytest.raises(ValueError, match=r"same number of tensors to compare, got 1 and 2"):
        divergence_of(absolute, (LOGITS,), (LOGITS, LOGITS))
    with pytest.raises(ValueError, match=r"tensors of one shape to compare, got \(8, 1\) and \(8,\)"):
        divergence_of(absolute, (torch.zeros(8, 1),), (torch.zeros(8),))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.0, TypeError, r"divergence must return a scalar tensor, got float"),
        (None, TypeError, r"divergence must return a scalar tensor, got NoneType"),
        (torch.zeros(2), ValueError, r"divergence must return a scalar tensor, got shape \(2,\); reduce it"),
        (torch.zeros(1), ValueError, r"divergence must return a scalar tensor, got shape \(1,\); reduce it"),
        (torch.tensor(1), TypeError, r"divergence must return a floating-point tensor, got torch.int64"),
    ],
)
def test_a_divergence_returns_a_scalar(value: object, error: type[Exception], message: str) -> None:
    def bad(first: Tensor, second: Tensor) -> Any:
        return value

    with pytest.raises(error, match=message):
        divergence_of(bad, (LOGITS,), (LOGITS,))
