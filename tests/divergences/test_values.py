"""The divergences against their restatement, and the properties that the regularizers rely on.

Everything about `symmetric_kl` runs twice: by autograd, and in blocks with the gradient written by hand.
"""

import math
from functools import partial

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from divergence_cases import ALL, BLOCKS, OVER_CLASSES, leaves, logits, pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smartreg.divergences import (
    BUILTIN,
    binary_symmetric_kl,
    hellinger,
    is_builtin,
    jensen_shannon,
    kl,
    mse,
    resolve_divergence,
    symmetric_kl,
)

# Values


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(name, reduction, shape, masked):
    a, b = pair(*shape)
    positions = shape[:-1] if name in OVER_CLASSES else shape
    mask = torch.ones(positions)
    if masked and positions:
        mask.view(-1)[::2] = 0
    ours = BUILTIN[name](a, b, mask=mask if masked else None, reduction=reduction)
    theirs = getattr(reference, name)(a.numpy(), b.numpy(), mask=mask.numpy(), reduction=reduction)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-15)


def test_mean_is_the_default_and_divides_by_the_unmasked_positions(name):
    a, b = pair(6, 5)
    mask = torch.tensor([1, 1, 0, 1, 0, 0]) if name in OVER_CLASSES else torch.tensor([[1], [1], [0], [1], [0], [0]])
    count = 3 if name in OVER_CLASSES else 15
    total = BUILTIN[name](a, b, mask=mask, reduction="sum")
    assert total > 0
    torch.testing.assert_close(BUILTIN[name](a, b, mask=mask), total / count)


def test_kl_has_the_direction_of_torch():
    a, b = pair(3, 5)
    expected = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(kl(a, b), expected)
    assert not torch.isclose(kl(b, a), expected)


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_small_differences_in_float32_where_two_kl_div_calls_fail(name):
    a, b = pair(8, 5, distance=1e-4, dtype=torch.float32)
    exact = symmetric_kl(a.double(), b.double())
    first = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
    second = F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="batchmean")
    assert abs(first + second - exact) > 0.5 * exact  # off by more than half of the value
    assert abs(symmetric_kl(a, b) - exact) < 1e-5 * exact


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6])
def test_value_and_gradients_are_accurate_however_small_the_difference(name, distance):
    a, b = pair(4, 9, distance=distance, dtype=torch.float32)
    single, double = leaves(a, b), leaves(a.double(), b.double())
    value, exact = BUILTIN[name](*single), BUILTIN[name](*double)
    assert abs(value - exact) <= 1e-5 * exact
    for ours, truth in zip(torch.autograd.grad(value, single), torch.autograd.grad(exact, double), strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
@pytest.mark.parametrize("shift", [0.0, 30.0, 1000.0])
def test_a_shift_of_the_logits_is_no_difference(name, shift):
    # Multiples of 2^-14 below 1,024 are exact in float32: the shift loses nothing before the divergence sees it.
    a = (logits(6, 7) * 2**8).round() / 2**8
    b = a + (logits(6, 7, seed=1) * 4).round() / 2**14
    single, double = leaves(a.float() + shift, b.float()), leaves(a, b)
    value, exact = symmetric_kl(*single), symmetric_kl(*double)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0.0)
    for ours, truth in zip(torch.autograd.grad(value, single), torch.autograd.grad(exact, double), strict=True):
        assert (ours - truth).norm() <= 1e-4 * truth.norm()


# Properties


finite = st.floats(-1e4, 1e4, width=32)
two_lists = st.integers(2, 6).flatmap(lambda n: st.tuples(*[st.lists(finite, min_size=n, max_size=n)] * 2))


@given(lists=two_lists)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_finite_never_negative_and_symmetric(name, lists):
    a, b = leaves(*(torch.tensor(values, dtype=torch.float32) for values in lists))
    value = BUILTIN[name](a, b)
    assert torch.isfinite(value)
    assert value >= 0
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(value, (a, b)))
    if name != "kl":
        torch.testing.assert_close(BUILTIN[name](b, a), value, rtol=1e-5, atol=1e-30)
    bound = {"jensen_shannon": math.log(2.0), "hellinger": 1.0}.get(name, math.inf)
    assert value <= bound * (1 + 1e-6)


@given(values=st.lists(finite, min_size=2, max_size=6))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_zero_with_zero_gradient_at_equality(name, values):
    a, b = leaves(torch.tensor(values), torch.tensor(values))
    value = BUILTIN[name](a, b)
    assert value == 0.0
    assert all((gradient == 0.0).all() for gradient in torch.autograd.grad(value, (a, b)))


def test_a_batch_equals_one_by_one(name):
    a, b = pair(7, 5)
    batch = BUILTIN[name](a, b, reduction="none")
    single = torch.stack([BUILTIN[name](x, y, reduction="none") for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(batch, single, rtol=1e-12, atol=0.0)


def test_exact_value_zero_is_given_at_any_size_of_logits(name):
    a = torch.tensor([[1e4, -1e4, 0.0]])
    assert BUILTIN[name](a, a) == 0.0
    if name in ("symmetric_kl", "kl"):
        torch.testing.assert_close(BUILTIN[name](a, -a), torch.tensor(4e4 if name == "symmetric_kl" else 2e4))


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_not_negative_where_rounding_is_all_there_is(name):
    a = logits(200, 3, dtype=torch.float32)
    shifted = a + logits(200, 1, seed=1, scale=20.0, dtype=torch.float32)
    assert (symmetric_kl(a, shifted, reduction="none") >= 0).all()


# Masks


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_positions_are_as_if_removed_whatever_they_hold(name, junk):
    a, b = pair(6, 5)
    keep = torch.tensor([True, False, True, True, False, True])
    mask = keep if name in OVER_CLASSES else keep.unsqueeze(-1)
    dirty_a, dirty_b = leaves(a, b)
    with torch.no_grad():
        dirty_a[~keep] = junk
        dirty_b[4] = -junk
    clean_a, clean_b = leaves(a[keep], b[keep])
    value, expected = BUILTIN[name](dirty_a, dirty_b, mask=mask), BUILTIN[name](clean_a, clean_b)
    torch.testing.assert_close(value, expected)
    gradients = torch.autograd.grad(value, (dirty_a, dirty_b))
    for gradient, clean in zip(gradients, torch.autograd.grad(expected, (clean_a, clean_b)), strict=True):
        torch.testing.assert_close(gradient[keep], clean)
        assert (gradient[~keep] == 0).all()
    none = BUILTIN[name](dirty_a, dirty_b, mask=mask, reduction="none")
    assert (none[~keep] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_masked_is_zero_and_attached(name, reduction, dtype):
    a, b = leaves(*pair(4, 5, dtype=dtype))
    with torch.no_grad():
        a[0] = math.nan
    value = BUILTIN[name](a, b, mask=torch.zeros(1), reduction=reduction)
    assert (value == 0).all()
    for gradient in torch.autograd.grad(value.sum(), (a, b)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_no_position_is_zero_and_attached(name, reduction, shape):
    a, b = leaves(torch.empty(shape), torch.empty(shape))
    for mask in (None, torch.ones(1)):
        value = BUILTIN[name](a, b, mask=mask, reduction=reduction)
        assert value.sum() == 0.0
        assert value.shape == ((shape[:-1] if name in OVER_CLASSES else shape) if reduction == "none" else ())
        assert torch.autograd.grad(value.sum(), a)[0].shape == shape


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype_broadcast_to_the_positions(name, mask_dtype):
    a, b = pair(3, 4, 5)
    row = torch.tensor([1, 0, 1, 1]).to(mask_dtype)
    expected = symmetric_kl(a, b, mask=row.expand(3, 4))
    torch.testing.assert_close(symmetric_kl(a, b, mask=row), expected)
    torch.testing.assert_close(symmetric_kl(a, b, mask=row.view(1, 4)), expected)
    column = torch.tensor([[1], [0], [0]]).to(mask_dtype)
    torch.testing.assert_close(symmetric_kl(a, b, mask=column), symmetric_kl(a[:1], b[:1]))


# Names


def test_names_and_callables_are_resolved():
    assert set(BUILTIN) == set(ALL)
    for name, function in BUILTIN.items():
        assert resolve_divergence(name) is function
        assert is_builtin(function)
    assert is_builtin(partial(partial(jensen_shannon, reduction="sum"), mask=None))

    def custom(input, target):
        return (input - target).abs().sum()

    assert resolve_divergence(custom) is custom
    assert not is_builtin(custom)
    assert resolve_divergence(hellinger) is hellinger


def test_unknown_names_and_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"'symmetric_kl', 'binary_symmetric_kl', 'mse'.*got 'kld'"):
        resolve_divergence("kld")
    with pytest.raises(TypeError, match=r"a name or a callable.*got int"):
        resolve_divergence(3)


# Errors


def test_bad_arguments_get_one_clear_error(name):
    function = BUILTIN[name]
    a, b = pair(8, 5)
    with pytest.raises(ValueError, match=r"reduction must be one of 'none', 'sum', 'mean', got 'batchmean'"):
        function(a, b, reduction="batchmean")
    with pytest.raises(ValueError, match=r"one shape, got \(8, 5\) and \(1, 5\); they are not broadcast"):
        function(a, b[:1])
    with pytest.raises(TypeError, match=r"target of .* floating dtype, got torch.int64"):
        function(a, b.long())
    with pytest.raises(TypeError, match=r"input of .* floating dtype, got torch.complex128"):
        function(a + 0j, b)
    with pytest.raises(TypeError, match=r"input of .* must be a tensor, got list"):
        function([0.0, 1.0], b)
    with pytest.raises(TypeError, match="mask must be a tensor of 0 and 1 or booleans, got list"):
        function(a, b, mask=[1] * 8)
    with pytest.raises(ValueError, match=r"mask must broadcast to .*\(8,.* got \(3,\)"):
        function(a, b, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"mask must broadcast to .* got \(2, 8, 5\)"):
        function(a, b, mask=torch.ones(2, 8, 5))


@pytest.mark.parametrize("name", [*OVER_CLASSES, BLOCKS], indirect=True)
@pytest.mark.parametrize("shape", [(8, 1), (8, 0), ()])
def test_a_single_logit_is_an_error_that_names_the_remedy(name, shape):
    with pytest.raises(ValueError, match=r"C >= 2, got .* one logit use binary_symmetric_kl"):
        BUILTIN[name](torch.zeros(shape), torch.zeros(shape))


def test_single_logits_are_what_the_binary_form_is_for():
    a, b = torch.tensor([[0.3], [2.0]]), torch.tensor([[0.1], [-1.0]])
    assert binary_symmetric_kl(a, b, reduction="none").shape == (2, 1)
    with pytest.raises(ValueError, match=r"\(8, 1\) and \(8,\)"):
        mse(torch.zeros(8, 1), torch.zeros(8))
