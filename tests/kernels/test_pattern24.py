"""Weights under drawn 2:4 patterns: the definition's properties, and its noise."""

import pytest
import torch

from tiny_onn_kernels.pattern24.cases import CASES, SEED, Case, make_inputs, run_case
from tiny_onn_kernels.pattern24.noise import gumbel, philox, six_numbers, uniform
from tiny_onn_kernels.pattern24.reference import (
    NONE,
    PATTERNS,
    pattern24,
    pattern24_free,
    patterns,
)


def reference_of(case):
    return pattern24_free if case.free else pattern24


def int64(value):
    return torch.tensor(value, dtype=torch.int64)


def test_philox_gives_the_published_first_block():
    """Random123's known answers for counter and key 0."""
    words = philox(int64(0), int64([0]))
    assert [f"{int(w):08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_uniforms_are_inside_the_interval_and_exact_in_float32():
    numbers = int64([0, 1, 1023, 2**20, 2**21 - 1])
    assert uniform(numbers, torch.float32).double().equal(uniform(numbers, torch.float64))
    small = uniform(numbers, torch.float32)
    assert small.min() > 0 and small.max() < 1
    assert gumbel(1000, int64(3), int64(0), torch.float32).isfinite().all()


def test_six_numbers_of_21_bits_share_no_bit_of_the_block():
    """Each of 126 of its 128 bits moves one bit of one number."""
    moved = []
    for word in range(4):
        for bit in range(32):
            words = torch.zeros(4, 1, dtype=torch.int64)
            words[word] = 1 << bit
            moved.append(tuple(six_numbers(words).flatten().tolist()))
    moved = [numbers for numbers in moved if any(numbers)]
    assert len(moved) == len(set(moved)) == 126
    assert [sum(column) for column in zip(*moved, strict=True)] == [2**21 - 1] * 6


def test_gumbel_noise_has_its_mean_and_variance_and_no_correlation_between_patterns():
    noise_G6 = gumbel(20000, int64(5), int64(0), torch.float64)
    assert abs(noise_G6.mean() - 0.57722) < 0.02 and abs(noise_G6.var() - torch.pi**2 / 6) < 0.03
    off = noise_G6.T.corrcoef() - torch.eye(6, dtype=torch.float64)
    assert off.abs().max() < 0.03


def test_patterns_are_the_six_pairs_in_lexicographic_order():
    kept_64 = patterns(torch.float64, "cpu")
    assert list(PATTERNS) == sorted(PATTERNS) and kept_64.sum(dim=1).tolist() == [2] * 6
    assert [tuple(row.nonzero().flatten().tolist()) for row in kept_64] == list(PATTERNS)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_weights_or_exactly_zero_two_of_each_group(case, dtype):
    weight, source = make_inputs(case, dtype)
    out, pattern, *_ = run_case(reference_of(case), case, weight, source)
    kept = patterns(torch.float32, "cpu")[pattern.long()].flatten(-2) > 0
    assert out.dtype == dtype and torch.equal(out, torch.where(kept, weight, 0.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_soft_mask_and_of_the_kept_weights(case):
    weight, source = make_inputs(case, torch.float64)
    _, pattern, weight_grad, source_grad = run_case(reference_of(case), case, weight, source)
    num_agents = max(1, case.agents)
    leaf = source.clone().requires_grad_()
    kept_64 = patterns(torch.float64, "cpu")
    groups = (num_agents, weight.numel() // 4)
    logits = leaf.reshape(*groups, 6) if case.free else leaf.reshape(*groups, 4) @ kept_64.T
    noise = gumbel(groups[0] * groups[1], int64(SEED), int64(case.offset), torch.float64)
    z = case.kappa * logits + (noise.reshape(*groups, 6) if case.sample else 0)
    soft = torch.softmax(z / case.tau, -1) @ kept_64
    pull = torch.randn((*pattern.shape[:-1], weight.shape[-1]), generator=torch.manual_seed(9),
                       dtype=torch.float64).reshape(*groups, 4)  # fmt: skip
    (wanted,) = torch.autograd.grad((pull * weight.reshape(1, -1, 4) * soft).sum(), leaf)
    torch.testing.assert_close(source_grad, wanted, rtol=1e-9, atol=1e-12)
    hard = kept_64[pattern.reshape(groups).long()]
    wanted = (pull if case.dense_grad else pull * hard).sum(dim=0).reshape(weight.shape)
    torch.testing.assert_close(weight_grad, wanted, rtol=1e-9, atol=1e-12)


def test_without_noise_the_two_largest_are_kept_and_of_equals_the_first():
    score = torch.randint(0, 4, (500, 4), generator=torch.manual_seed(0)).double()
    _, pattern = pattern24(torch.ones_like(score), score, 1.0, 1.0, 0, sample=False)
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :2].sort(dim=1).values
    assert [PATTERNS[k] for k in pattern.flatten()] == [tuple(pair) for pair in best.tolist()]
    _, of_sums = pattern24_free(
        torch.ones_like(score), (score @ patterns(torch.float64, "cpu").T).unsqueeze(1),
        1.0, 1.0, 0, sample=False,
    )  # fmt: skip
    assert torch.equal(pattern, of_sums)


@pytest.mark.parametrize("tau", [5.0, 1.0, 0.1])
def test_patterns_are_drawn_with_the_softmax_of_the_logits_whatever_tau(tau):
    score = torch.tensor([1.2, 0.3, 0.9, 0.1]).expand(20000, 4)
    _, pattern = pattern24(torch.ones_like(score), score, 1.5, tau, 7)
    wanted = torch.softmax(1.5 * (score[0] @ patterns(torch.float32, "cpu").T), 0)
    counts = torch.bincount(pattern.flatten().long(), minlength=6)
    chi2 = ((counts - 20000 * wanted).square() / (20000 * wanted)).sum()
    assert chi2 < 20.5  # 5 degrees of freedom: one in a thousand


def test_a_large_kappa_leaves_no_choice():
    weight, score = make_inputs(Case((40, 16)), torch.float64)
    cold, largest = (
        pattern24(weight, score, kappa, 1.0, 1, sample=sample)[1]
        for kappa, sample in ((1e6, True), (1.0, False))
    )
    assert torch.equal(cold, largest)


def test_beside_a_nan_no_pattern_is_drawn_and_without_noise_it_ranks_below_zero():
    score = torch.tensor([[0.0, torch.nan, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    out, pattern = pattern24(torch.ones(1, 8), score, 1.0, 1.0, 0)
    assert int(pattern[0, 0]) == NONE and out[0, :4].tolist() == [0.0] * 4
    out.sum().backward()
    assert score.grad[0, :4].isnan().all() and score.grad[0, 4:].isfinite().all()
    _, pattern = pattern24(torch.ones(1, 8), score, 1.0, 1.0, 0, sample=False)
    assert PATTERNS[int(pattern[0, 0])] == (0, 2)


def test_wild_weights_are_nan_even_where_they_are_dropped():
    weight = torch.tensor([[torch.nan, torch.inf, 1.0, 1.0]])
    score = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    out, _ = pattern24(weight, score, 1.0, 1.0, 0, sample=False)
    assert out[0, :2].isnan().all() and out[0, 2:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("weight", "source", "said"),
    [
        (torch.ones(3, 6), torch.ones(3, 6), "multiple of 4"),
        (torch.ones(3, 8), torch.ones(8, 3), r"expected \(3, 8\)"),
        (torch.ones(3, 8), torch.ones(2, 2, 3, 8), r"expected \(3, 8\)"),
        (torch.ones(3, 8, dtype=torch.int32), torch.ones(3, 8), "expected floating point"),
    ],
)
def test_what_does_not_fit_is_refused(weight, source, said):
    with pytest.raises(ValueError, match=said):
        pattern24(weight, source, 1.0, 1.0, 0)


def test_logits_that_are_not_six_a_group_are_refused():
    with pytest.raises(ValueError, match=r"got logits of \(3, 2, 5\), expected \(3, 2, 6\)"):
        pattern24_free(torch.ones(3, 8), torch.ones(3, 2, 5), 1.0, 1.0, 0)
