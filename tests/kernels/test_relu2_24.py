"""ReLU^2 under token-wise 2:4, packed: the definition's properties, and torch's conversions."""

import pytest
import torch
from torch.sparse import _semi_structured_conversions as conversions

from tiny_onn_kernels.relu2_24.cases import CASES, Case, make_gradient, make_input
from tiny_onn_kernels.relu2_24.reference import (
    cutlass_metadata,
    relu2_24,
    relu2_24_dense,
    relu2_24_dense_bits,
    relu2_24_gradient,
    require_finite,
    unpack,
    unpack_bits,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def slowly(x_TF):
    """The definition, group by group."""
    dense_TF = torch.zeros_like(x_TF)
    for t in range(x_TF.shape[0]):
        for first in range(0, x_TF.shape[1], 4):
            r = [max(float(v), 0.0) for v in x_TF[t, first : first + 4]]
            for i in sorted(range(4), key=lambda i: (-r[i], i))[:2]:
                dense_TF[t, first + i] = torch.relu(x_TF[t, first + i]).square()
    return dense_TF


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_activations_stand_for_the_definition(case, dtype):
    x_TF = make_input(case, dtype)
    want_TF = slowly(x_TF)
    packed = relu2_24(x_TF, check=True)
    assert torch.equal(unpack(packed), want_TF) and torch.equal(relu2_24_dense(x_TF), want_TF)
    assert torch.equal(relu2_24_dense_bits(x_TF)[1], packed.bits)
    assert torch.equal(unpack_bits(packed.bits, case.features), want_TF != 0)
    assert packed.values.shape == (case.tokens, case.features // 2) and packed.values.dtype == dtype
    assert packed.codes.shape == packed.bits.shape == (case.tokens, -(-case.features // 8))


def test_codes_are_those_the_hardware_has():
    x_TF = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0, 2.0])] * 4)
    assert set(relu2_24(x_TF).codes.flatten().tolist()) == {4, 8, 9, 12, 13, 14}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numbers", ["normal", "ties", "sparse", "negative", "tiny"])
def test_values_and_codes_are_bit_for_bit_those_of_torchs_conversion(numbers, dtype):
    case = Case(64, 128, numbers)
    x_TF = make_input(case, dtype)
    dense_TF = relu2_24_dense(x_TF)
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(dense_TF)
    packed = relu2_24(x_TF)
    ordered = cutlass_metadata(packed.codes)
    assert torch.equal(packed.values, values) and torch.equal(ordered, metadata)
    back = conversions.sparse_semi_structured_to_dense_cutlass(packed.values, ordered)
    assert torch.equal(back, dense_TF)


def test_codes_that_cutlass_cannot_take_are_refused():
    for tokens, features in ((31, 64), (32, 24)):
        with pytest.raises(ValueError, match=f"got codes of {tokens} tokens and {features}"):
            cutlass_metadata(relu2_24(torch.ones(tokens, features)).codes)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_is_autograds_of_the_masked_forward_bit_for_bit(case, dtype):
    x_TF = make_input(case, dtype)
    grad_TF, leaf_TF = make_gradient(x_TF), x_TF.clone().requires_grad_()
    packed = relu2_24(x_TF)
    dense_TF = torch.where(
        unpack_bits(packed.bits, case.features), torch.relu(leaf_TF).square(), 0.0
    )
    (want_TF,) = torch.autograd.grad(dense_TF, leaf_TF, grad_TF)
    dx_TF, values = relu2_24_gradient(grad_TF, x_TF, packed.bits, pack=True)
    assert torch.equal(dx_TF, want_TF)
    assert torch.equal(unpack(packed._replace(values=values)), want_TF)
    (own_TF,) = torch.autograd.grad(relu2_24_dense(leaf_TF), leaf_TF, grad_TF)
    assert torch.equal(own_TF, want_TF)


def test_numeric_gradients():
    x_TF = make_input(Case(4, 12), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(relu2_24_dense, x_TF)


def test_where_nothing_was_kept_not_even_an_infinite_gradient_passes():
    x_TF = torch.tensor([[3.0, 2.0, 1.0, -1.0]])
    grad_TF = torch.tensor([[1.0, 1.0, torch.inf, torch.nan]])
    dx_TF, _ = relu2_24_gradient(grad_TF, x_TF, relu2_24(x_TF).bits)
    assert dx_TF.tolist() == [[6.0, 4.0, 0.0, 0.0]]


def test_half_precision_that_overflows_is_refused_when_asked_and_flagged_always():
    x_TF = torch.full((2, 4), 256.0, dtype=torch.float16)
    assert relu2_24(x_TF).flags.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"squares exceed 65504.*nothing is packed; use bfloat16"):
        relu2_24(x_TF, check=True)
    relu2_24(x_TF.bfloat16(), check=True)
    relu2_24(torch.full((2, 4), 255.875, dtype=torch.float16), check=True)
    relu2_24(-x_TF, check=True)


@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_when_asked_and_two_are_kept_all_the_same(wild):
    x_TF = torch.ones(2, 8)
    x_TF[1, :3] = wild
    packed = relu2_24(x_TF)
    assert packed.flags.tolist() == [0, 1]
    assert (unpack_bits(packed.bits, 8).reshape(-1, 4).sum(dim=1) <= 2).all()
    with pytest.raises(ValueError, match="got activations with NaN or infinity; nothing is packed"):
        require_finite(packed.flags, x_TF.dtype)


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 8), (8,)])
def test_rows_without_whole_groups_are_refused(shape):
    for function in (relu2_24, relu2_24_dense):
        with pytest.raises(ValueError, match=r"expected \(tokens, features\), features a multiple"):
            function(torch.ones(shape))


def test_gradients_and_bits_that_do_not_fit_are_refused():
    x_TF, bits_TB = torch.ones(3, 16), torch.zeros(3, 2, dtype=torch.uint8)
    for arguments, said in (
        ((x_TF[:2], x_TF, bits_TB), "got a gradient of"),
        ((x_TF.double(), x_TF, bits_TB), "got a gradient of"),
        ((x_TF, x_TF, bits_TB[:, :1]), "got bits of"),
        ((x_TF, x_TF, bits_TB.bool()), "got bits of"),
    ):
        with pytest.raises(ValueError, match=said):
            relu2_24_gradient(*arguments)
