"""Derivatives, dtypes, infinities and memory layouts of the divergences."""

import math

import pytest
import torch
from divergence_cases import BLOCKS, OVER_CLASSES, leaf_pair, pair

from smartreg.divergences import BUILTIN, binary_symmetric_kl, hellinger, jensen_shannon, kl, mse, symmetric_kl

# Derivatives


@pytest.mark.parametrize("distance", [1.0, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives(name, distance, masked):
    a, b = leaf_pair(3, 4, distance=distance)
    positions = (3,) if name in OVER_CLASSES else (3, 1)
    mask = torch.tensor([1, 0, 1]).view(positions) if masked else None

    def function(a, b):
        return BUILTIN[name](a, b, mask=mask, reduction="none")

    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_derivatives_of_logits_of_a_sequence(name, masked):
    a, b = leaf_pair(2, 3, 4)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]) if masked else None
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (a, b)]
    flat_mask = None if mask is None else mask.flatten()
    assert torch.autograd.gradgradcheck(lambda a, b: symmetric_kl(a, b, mask=mask), (a, b))
    for own, other in zip(
        torch.autograd.grad(3.0 * symmetric_kl(a, b, mask=mask), (a, b), create_graph=True),
        torch.autograd.grad(3.0 * symmetric_kl(*flat, mask=flat_mask), flat),
        strict=True,
    ):
        torch.testing.assert_close(own.flatten(0, 1), other)


@pytest.mark.parametrize("distance", [1.0, 300.0])
@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_gradients_reach_only_the_argument_that_asks(name, distance):
    a, b = leaf_pair(5, 4, distance=distance)
    both = torch.autograd.grad(symmetric_kl(a, b), (a, b))
    for index, arguments in enumerate([(a, b.detach()), (a.detach(), b)]):
        alone = torch.autograd.grad(symmetric_kl(*arguments), arguments[index])[0]
        torch.testing.assert_close(alone, both[index], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_a_retained_graph_gives_the_same_gradients_again(name):
    a, b = leaf_pair(4, 5)
    value = symmetric_kl(a, b)
    first = torch.autograd.grad(2.0 * value, (a, b), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(6.0 * value, (a, b), retain_graph=True)
    third = torch.autograd.grad(value, (a,), create_graph=True)
    for one, copy, three in zip(first, kept, second, strict=True):
        assert torch.equal(one, copy)
        torch.testing.assert_close(three, 3.0 * one)
    torch.testing.assert_close(2.0 * third[0], first[0])


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_positions_are_weighted_by_what_comes_from_above(name):
    a, b = leaf_pair(4, 5)
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    gradient = torch.autograd.grad(symmetric_kl(a, b, reduction="none"), a, weights)[0]
    for position in range(4):
        single = torch.autograd.grad(symmetric_kl(a[position], b[position]), a)[0][position]
        torch.testing.assert_close(gradient[position], weights[position] * single)


def test_second_derivatives_do_not_feel_masked_positions(name):
    a, b = leaf_pair(3, 4)
    clean = torch.autograd.grad(BUILTIN[name](a[:2], b[:2]), a, create_graph=True)[0]
    expected = torch.autograd.grad(clean.square().sum(), a)[0]
    with torch.no_grad():
        a[2] = math.nan
    mask = torch.tensor([1, 1, 0]) if name in OVER_CLASSES else torch.tensor([[1], [1], [0]])
    gradient = torch.autograd.grad(BUILTIN[name](a, b, mask=mask), a, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(gradient.square().sum(), a)[0], expected)


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_function_transforms(name):
    a, b = pair(3, 4, 5)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])

    def masked(a, b, mask):
        return symmetric_kl(a, b, mask=mask)

    each = torch.stack([masked(*arguments) for arguments in zip(a, b, mask, strict=True)])
    torch.testing.assert_close(torch.func.vmap(masked)(a, b, mask), each)
    moved = torch.func.vmap(masked, in_dims=(1, 2, 0))(a.movedim(0, 1), b.movedim(0, 2), mask)
    torch.testing.assert_close(moved, each)
    shared = torch.stack([symmetric_kl(x, b[0]) for x in a])
    torch.testing.assert_close(torch.func.vmap(symmetric_kl, in_dims=(0, None))(a, b[0]), shared)

    leaf = a.clone().requires_grad_()
    expected = torch.autograd.grad(symmetric_kl(leaf, b), leaf)[0]
    torch.testing.assert_close(torch.func.grad(symmetric_kl)(a, b), expected)
    per_example = torch.func.vmap(torch.func.grad(symmetric_kl))(a, b)
    torch.testing.assert_close(per_example / len(a), expected)


@pytest.mark.parametrize("name", [BLOCKS], indirect=True)
def test_a_compiled_function_takes_the_plain_formula(name):
    a, b = leaf_pair(4, 5)
    compiled = torch.compile(symmetric_kl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b), symmetric_kl(a, b))
    torch._dynamo.reset()


def test_without_a_graph(name):
    a, b = leaf_pair(4, 5)
    expected = BUILTIN[name](a, b)
    with torch.no_grad():
        value = BUILTIN[name](a, b)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())
    with torch.inference_mode():
        torch.testing.assert_close(BUILTIN[name](a, b).clone(), expected.detach())


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", [1.0, 0.05])
def test_half_precision_is_computed_in_float32(name, dtype, distance):
    a, b = leaf_pair(40, 7, distance=distance, dtype=dtype)
    wide_a, wide_b = (tensor.detach().float().requires_grad_() for tensor in (a, b))
    value, expected = BUILTIN[name](a, b), BUILTIN[name](wide_a, wide_b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
    # Scaled before it is rounded, as a loss scaler expects: 2^-20 is below the smallest float16 but for the scale.
    for scale in (1.0, 2.0**16):
        gradients = torch.autograd.grad(scale * value, (a, b), retain_graph=True)
        wide = torch.autograd.grad(scale * expected, (wide_a, wide_b), retain_graph=True)
        for gradient, truth in zip(gradients, wide, strict=True):
            assert gradient.dtype == dtype
            assert (gradient - truth.to(dtype)).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_a_half_beside_a_float32_is_scaled_before_it_is_rounded(name):
    a, b = pair(40, 7, dtype=torch.float32)
    a = a.half().requires_grad_()
    b = (a.detach() + 1e-6 * b).requires_grad_()  # gradients near the smallest float16, 6e-8, but for the scale
    wide = a.detach().float().requires_grad_()
    gradient = torch.autograd.grad(2.0**16 * symmetric_kl(a, b), a)[0]
    truth = torch.autograd.grad(2.0**16 * symmetric_kl(wide, b), wide)[0]
    assert (gradient - truth).norm() <= 2e-3 * truth.norm()


def test_dtypes_promote_and_float64_stays(name):
    a, b = pair(4, 5)
    assert BUILTIN[name](a, b).dtype == torch.float64
    assert BUILTIN[name](a.float(), b).dtype == torch.float64
    assert BUILTIN[name](a.float(), b.bfloat16()).dtype == torch.float32
    assert BUILTIN[name](a.half(), b.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(
        BUILTIN[name](a.bfloat16(), b.float()), BUILTIN[name](a.bfloat16().float(), b.float()), rtol=1e-6, atol=0.0
    )


def test_autocast_changes_nothing(name):
    for dtype in (torch.float32, torch.float64):
        a, b = leaf_pair(4, 5, distance=1e-3, dtype=dtype)
        expected = BUILTIN[name](a, b)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = BUILTIN[name](a, b)
            gradient = torch.autograd.grad(value, a)[0]
        assert value.dtype == dtype
        assert torch.equal(value, expected)
        assert torch.equal(gradient, torch.autograd.grad(expected, a)[0])


# Infinite logits


@pytest.mark.parametrize("name", [*OVER_CLASSES, BLOCKS], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, -2e4])
def test_a_class_masked_out_of_both_contributes_nothing(name, dtype, level):
    a, b = (tensor.add(level).requires_grad_() for tensor in pair(3, 4, dtype=dtype))
    minus_inf = torch.full((3, 2), -math.inf, dtype=dtype)
    wide = [torch.cat([tensor.detach(), minus_inf], dim=-1).requires_grad_() for tensor in (a, b)]
    value, expected = BUILTIN[name](*wide), BUILTIN[name](a, b)
    torch.testing.assert_close(value, expected)
    for gradient, narrow in zip(torch.autograd.grad(value, wide), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(gradient[:, :4], narrow)
        assert (gradient[:, 4:] == 0).all()


@pytest.mark.parametrize("name", [*OVER_CLASSES, BLOCKS], indirect=True)
def test_a_position_of_nothing_but_minus_inf_is_zero(name):
    a, b = leaf_pair(3, 4)
    with torch.no_grad():
        a[1], b[1] = -math.inf, -math.inf
    values = BUILTIN[name](a, b, reduction="none")
    assert values[1] == 0.0
    assert (values[[0, 2]] > 0).all()
    for gradient in torch.autograd.grad(values.sum(), (a, b)):
        assert torch.isfinite(gradient).all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("name", ["symmetric_kl", BLOCKS], indirect=True)
def test_minus_inf_in_one_argument_only(name):
    half, certain = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]])
    assert symmetric_kl(half, certain) == math.inf
    assert symmetric_kl(certain, half) == math.inf
    # Infinite also where the other probability, exp(-1000), is 0 in every dtype.
    assert symmetric_kl(torch.tensor([[0.0, -1000.0]]), certain) == math.inf
    assert symmetric_kl(certain, torch.tensor([[0.0, -1000.0]])) == math.inf
    # KL(target || input): the input must cover the target, not the other way round.
    assert kl(certain, half) == math.inf
    torch.testing.assert_close(kl(half, certain), torch.tensor(math.log(2.0)))
    # p = (1/2, 1/2), q = (1, 0), m = (3/4, 1/4)
    expected = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2.0)) + 0.5 * math.log(4 / 3)
    torch.testing.assert_close(jensen_shannon(half, certain), torch.tensor(expected))
    torch.testing.assert_close(hellinger(half, certain), torch.tensor(1.0 - math.sqrt(0.5)))


@pytest.mark.parametrize("name", ["kl", "jensen_shannon", "hellinger"])
def test_gradients_are_finite_where_the_value_is(name):
    a = torch.tensor([[0.3, 0.1, -0.2]], requires_grad=True)
    b = torch.tensor([[0.0, 0.5, -math.inf]])
    assert torch.isfinite(torch.autograd.grad(BUILTIN[name](a, b), a)[0]).all()


@pytest.mark.parametrize("name", [*OVER_CLASSES, BLOCKS], indirect=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_plus_inf_are_not_hidden(name, bad):
    a, b = pair(3, 4)
    a[1, 2] = bad
    for arguments in ((a, b), (b, a), (a, a)):
        values = BUILTIN[name](*arguments, reduction="none")
        assert values.isnan().tolist() == [False, True, False]


def test_infinite_bernoulli_logits():
    inf = math.inf
    a = torch.tensor([-inf, inf, -inf, inf, 200.0, math.nan], requires_grad=True)
    b = torch.tensor([-inf, inf, 0.0, -200.0, inf, 0.0])
    values = binary_symmetric_kl(a, b, reduction="none")
    assert values[:5].tolist() == [0.0, 0.0, inf, inf, inf]
    assert values[5].isnan()
    assert torch.autograd.grad(values[:2].sum(), a)[0][:2].tolist() == [0.0, 0.0]
    assert mse(a, b, reduction="none")[5].isnan()


# Layout


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :-1],  # logits shifted along the sequence
        lambda t: t.transpose(0, 1),
        lambda t: t.transpose(1, 2),
        lambda t: t[:, :, ::2],
        lambda t: t[:1].expand(3, 4, 6),
        lambda t: t.flip(0)[..., None, :].expand(3, 4, 2, 6),
    ],
)
def test_any_memory_layout(name, view):
    a, b = leaf_pair(3, 4, 6)
    dense = [view(tensor).detach().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in (a, b)]
    value, expected = BUILTIN[name](view(a), view(b)), BUILTIN[name](*dense)
    torch.testing.assert_close(value, expected)
    mixed = BUILTIN[name](view(a), dense[1])
    torch.testing.assert_close(mixed, expected)
    pulled = torch.autograd.grad(view(a), a, torch.autograd.grad(expected, dense[0])[0])[0]
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], pulled)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_equals_cpu(name, dtype):
    a, b = leaf_pair(33, 500, dtype=dtype)
    there = [tensor.detach().cuda().requires_grad_() for tensor in (a, b)]
    value, expected = BUILTIN[name](*there), BUILTIN[name](a, b)
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=0.0)
    for gradient, truth in zip(torch.autograd.grad(value, there), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(gradient.cpu(), truth)
