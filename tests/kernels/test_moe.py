"""Both ways of running experts against a float64 loop over tokens and experts, gradients too."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from tiny_onn_kernels.moe import reference
from tiny_onn_kernels.moe.cases import (
    CASES,
    ODD_CASES,
    Case,
    make_inputs,
    make_mask,
    run_case,
)
from tiny_onn_kernels.moe.naive import naive_expert_ffn
from tiny_onn_kernels.moe.reference import (
    HAS_GROUPED_MM,
    expert_ffn,
    expert_ffn_grouped,
    expert_pair_norms,
    grouped_mm_needs,
)

needs_grouped_mm = pytest.mark.skipif(not HAS_GROUPED_MM, reason="this torch has no grouped_mm")


@pytest.mark.parametrize("case", CASES + ODD_CASES, ids=str)
def test_the_loop_equals_the_oracle_in_values_and_gradients(case):
    got = run_case(expert_ffn, case, torch.float64)
    for a, b in zip(got, run_case(naive_expert_ffn, case, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@needs_grouped_mm
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_grouped_product_equals_the_oracle_in_float32(case):
    got = run_case(expert_ffn_grouped, case, torch.float32)
    for a, b in zip(got, run_case(naive_expert_ffn, case, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@needs_grouped_mm
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_grouped_product_in_bfloat16_is_as_good_as_the_loop_in_bfloat16(case):
    exact = run_case(naive_expert_ffn, case, torch.float64)
    errors = []
    for run in (expert_ffn, expert_ffn_grouped):
        got = run_case(run, case, torch.bfloat16)
        errors.append(
            [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
        )
    for loop, grouped in zip(*errors, strict=True):
        assert loop < 0.02 and grouped < 0.02


class Poison(torch.autograd.Function):
    """Not a number in all rows from ``end`` on, of the value and of the gradient."""

    @staticmethod
    def forward(ctx, rows, end):
        ctx.end = end
        rows = rows.clone()
        rows[end:] = torch.nan
        return rows

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.end :] = torch.nan
        return gradient, None


@needs_grouped_mm
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_nothing_reads_what_the_grouped_product_leaves_uninitialised(case, monkeypatch):
    expected = run_case(expert_ffn_grouped, case, torch.float32)
    real, calls = F.grouped_mm, []

    def poisoned(rows, weights, offs):
        end = int(offs[-1])
        calls.append(end)
        return Poison.apply(real(Poison.apply(rows, end), weights, offs=offs), end)

    monkeypatch.setattr(reference.F, "grouped_mm", poisoned)
    got = run_case(expert_ffn_grouped, case, torch.float32)
    assert calls
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "run", [expert_ffn, pytest.param(expert_ffn_grouped, marks=needs_grouped_mm)]
)
def test_an_expert_without_tokens_and_a_token_without_experts_get_exactly_nothing(run):
    case = Case(40, 5, 16, 8, "dead")
    mask_NE = make_mask(case)
    out_NC, x_grad, weight_grad, up_grad, down_grad = run_case(run, case, torch.float32)
    alone_N = ~mask_NE.any(dim=1)
    assert alone_N.any() and not alone_N.all()
    for exact_zero in (out_NC[alone_N], x_grad[alone_N], weight_grad[~mask_NE]):
        assert exact_zero.abs().max() == 0
    for gradient in (up_grad, down_grad):
        used_E = gradient.abs().amax(dim=(1, 2)) > 0
        assert used_E.tolist() == [False, True, True, True, False]


def test_numeric_gradients():
    case = Case(5, 3, 4, 3, "every_k")
    x_NC, mask_NE, *floats = make_inputs(case, torch.float64)
    leaves = [t.requires_grad_() for t in (x_NC, *floats)]
    assert torch.autograd.gradcheck(lambda x, *rest: expert_ffn(x, mask_NE, *rest), leaves)


def test_tokens_and_experts_may_come_in_any_order():
    case = Case(21, 4, 8, 8, "random")
    x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF = make_inputs(case, torch.float64)
    plain = expert_ffn(x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF)
    tokens, experts = torch.randperm(21), torch.randperm(4)
    turned = expert_ffn(
        x_NC[tokens], mask_NE[tokens][:, experts], weight_NE[tokens][:, experts],
        gate_up_EHC[experts], down_ECF[experts],
    )  # fmt: skip
    torch.testing.assert_close(turned, plain[tokens], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "run", [expert_ffn, pytest.param(expert_ffn_grouped, marks=needs_grouped_mm)]
)
def test_a_token_that_occurs_again_gets_the_same_row_wherever_it_stands(run):
    x_NC, mask_NE, weight_NE, *experts = make_inputs(Case(70, 5, 16, 24, "every_k"), torch.float32)
    twice_M = torch.cat([torch.arange(70), torch.arange(0, 70, 3), torch.tensor([68, 1])])
    out_MC = run(x_NC[twice_M], mask_NE[twice_M], weight_NE[twice_M], *experts)
    torch.testing.assert_close(out_MC[70:], out_MC[twice_M[70:]], rtol=1e-5, atol=1e-6)


def test_strided_inputs():
    case = Case(18, 3, 8, 8, "every_k")
    x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF = make_inputs(case, torch.float32)
    plain = expert_ffn(x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF)
    strided = expert_ffn(
        x_NC.T.contiguous().T, mask_NE.T.contiguous().T, weight_NE.T.contiguous().T,
        gate_up_EHC.mT.contiguous().mT, down_ECF.mT.contiguous().mT,
    )  # fmt: skip
    torch.testing.assert_close(strided, plain)


@needs_grouped_mm
def test_results_repeat_bit_for_bit():
    a, b = (run_case(expert_ffn_grouped, CASES[0], torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_all_implementations_have_one_signature():
    assert inspect.signature(expert_ffn) == inspect.signature(expert_ffn_grouped)


def test_what_the_grouped_product_cannot_take_is_named():
    if HAS_GROUPED_MM:
        assert grouped_mm_needs(torch.float32, 12, 20) is None
        assert grouped_mm_needs(torch.bfloat16, 8, 24) is None
        assert "multiples of 8" in grouped_mm_needs(torch.bfloat16, 12, 16)
        assert "multiples of 4" in grouped_mm_needs(torch.float32, 16, 6)
        assert "float64" in grouped_mm_needs(torch.float64, 16, 16)


@pytest.mark.parametrize("case", CASES + ODD_CASES, ids=str)
@pytest.mark.parametrize("rounding", [4, 64])
def test_rounding_rows_up_changes_neither_values_nor_gradients(case, rounding, monkeypatch):
    monkeypatch.setattr(reference, "ROUNDING", 1)
    plain = run_case(expert_ffn, case, torch.float64)
    monkeypatch.setattr(reference, "ROUNDING", rounding)

    def poisoned(x_NC, mask_NE, weight_NE, *matrices):
        """Weights of inactive pairs are not read."""
        return expert_ffn(x_NC, mask_NE, weight_NE.masked_fill(~mask_NE, torch.inf), *matrices)

    for a, b in zip(run_case(poisoned, case, torch.float64), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_rounding_gives_used_experts_multiples_and_unused_ones_nothing(monkeypatch):
    monkeypatch.setattr(reference, "ROUNDING", 8)
    mask_NE = make_mask(Case(37, 5, 8, 8, "dead"))
    mask_NE[:, 2] = True  # 37 of 37: no further tokens to be had
    rounded_NE = reference.rounded(mask_NE)
    assert (rounded_NE | ~mask_NE).all()
    counts = rounded_NE.sum(dim=0)
    assert counts[0] == counts[4] == 0 and counts[2] == 37
    assert (counts[[1, 3]] % 8 == 0).all() and (counts - mask_NE.sum(dim=0) < 8).all()
    assert torch.equal(reference.rounded(rounded_NE), rounded_NE)


def test_norms_of_pairs_give_the_length_of_each_pairs_gradient_and_nothing_where_none_is():
    case = Case(11, 4, 7, 5, "every_k")
    x_NC, mask_NE, _, gate_up_EHC, down_ECF = make_inputs(case, torch.float64)
    grad_NC = torch.randn(x_NC.shape, generator=torch.manual_seed(2), dtype=torch.float64)
    norms = expert_pair_norms(x_NC, mask_NE, gate_up_EHC, down_ECF, grad_NC)
    matrices = [gate_up_EHC.requires_grad_(), down_ECF.requires_grad_()]
    for t, e in mask_NE.nonzero().tolist():
        alone_NE = torch.zeros_like(mask_NE)
        alone_NE[t, e] = True
        out_NC = naive_expert_ffn(x_NC, alone_NE, alone_NE.double(), *matrices)
        up_grad, down_grad = torch.autograd.grad(out_NC, matrices, grad_NC)
        torch.testing.assert_close(norms.inner_NE[t, e] * x_NC[t].norm(), up_grad.norm())
        torch.testing.assert_close(norms.hidden_NE[t, e] * norms.grad_N[t], down_grad.norm())
    for norm_NE in (norms.inner_NE, norms.hidden_NE):
        assert norm_NE[~mask_NE].abs().max() == 0
