"""What is particular to `symmetric_kl` in blocks: where they are cut, when they are used, what they allocate."""

import math

import pytest
import torch
from divergence_cases import leaf_pair, pair
from torch.utils._python_dispatch import TorchDispatchMode

from smartreg._divergences import blockwise, formulas, positions
from smartreg.divergences import symmetric_kl


@pytest.mark.parametrize("distance", [1e-6, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("elements", [1, 35, 64, 10**6])
def test_blocks_equal_the_formula(distance, elements, monkeypatch):
    monkeypatch.setattr(blockwise, "_block_elements", lambda device: elements)
    a, b = leaf_pair(5, 3, 7, distance=distance)
    values, expected = blockwise.blockwise_symmetric_kl(a, b, None), formulas.symmetric_kl(a, b)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-30)
    weights = torch.linspace(-1, 2, 15, dtype=torch.float64).view(5, 3)
    ours = torch.autograd.grad(values, (a, b), weights)
    for gradient, truth in zip(ours, torch.autograd.grad(expected, (a, b), weights), strict=True):
        assert (gradient - truth).norm() <= 1e-8 * truth.norm()


def test_blocks_are_the_way_of_large_logits_only(monkeypatch):
    used = []
    original = blockwise.blockwise_symmetric_kl
    monkeypatch.setattr(positions, "blockwise_symmetric_kl", lambda *k: used.append(k[0].numel()) or original(*k))
    for count in (1, 15, 16, 64):
        symmetric_kl(*leaf_pair(count, 256))
    assert used == [16 * 256, 64 * 256]


def test_ordinary_blocks_on_a_cpu_never_take_the_formulas(monkeypatch):
    a, b = leaf_pair(5, 7)
    for name in ("symmetric_kl", "symmetric_kl_gradients"):
        monkeypatch.setattr(blockwise, name, lambda a, b: pytest.fail("an ordinary block went the long way"))
    value = blockwise.blockwise_symmetric_kl(a, b, None).sum()
    torch.autograd.grad(value, (a, b))


class Allocations(TorchDispatchMode):
    """The sizes in bytes of all storages that operations return."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extraordinary", [False, True])
@pytest.mark.parametrize("grads", [0, 1, 2])
def test_nothing_but_the_gradients_is_as_large_as_the_logits(dtype, extraordinary, grads, monkeypatch):
    monkeypatch.setattr(blockwise, "_block_elements", lambda device: 1000)
    a, b = pair(3, 101, 100, dtype=dtype)
    if extraordinary:
        a[0, 0, 0], b[0, 0, 0], a[2, 4] = -math.inf, -math.inf, 100 * a[2, 4]
    a.requires_grad_(grads >= 1)
    b.requires_grad_(grads >= 2)
    a, b = a[:, :-1], b[:, :-1]  # not even this is copied
    mask = torch.ones(3, 100)
    with Allocations() as seen:
        value = symmetric_kl(a, b, mask=mask)
        if grads:
            torch.autograd.grad(value, (a, b)[:grads])
    block, size = 4 * 1000, a.numel() * a.element_size()
    large = [number for number in seen.bytes.values() if number > 5 * block]
    inputs = [tensor.untyped_storage().nbytes() for tensor in (a, b)]  # views of them are no allocations
    assert [number for number in large if number not in inputs] == [size] * grads
