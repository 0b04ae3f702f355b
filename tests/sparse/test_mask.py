"""The mask of the n largest, against sorting; its application."""

import pytest
import torch

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import apply_mask, largest, topk_mask
from tiny_onn.sparse.mvue import mvue_sample
from tiny_onn.sparse.pattern import NMPattern, patterns
from tiny_onn.sparse.soft_threshold import soft_threshold
from tiny_onn.sparse.transposable import transposable_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32]


def by_sorting(x, pattern):
    """The mask from Python's stable sort, group by group."""
    groups = pattern.group(x)
    out = torch.zeros(groups.shape, dtype=torch.bool)
    for place, group in zip(out.view(-1, pattern.m), groups.reshape(-1, pattern.m), strict=True):
        order = sorted(range(pattern.m), key=lambda i: -abs(float(group[i])))
        place[order[: pattern.n]] = True
    return pattern.ungroup(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ((4,), NMPattern()),
        ((5, 8), NMPattern()),
        ((8, 5), NMPattern(dim=0)),
        ((2, 12, 3), NMPattern(1, 4, dim=1)),
        ((3, 16), NMPattern(4, 8)),
        ((3, 32), NMPattern(3, 16)),  # sorted, not compared
        ((0, 8), NMPattern()),
    ],
)
def test_keeps_the_n_largest_magnitudes_with_ties_to_the_lower_index(dtype, shape, pattern):
    torch.manual_seed(0)
    x = torch.randint(-3, 4, shape).to(dtype)  # ties everywhere
    mask = topk_mask(x, pattern)
    assert mask.dtype == torch.bool and mask.shape == x.shape
    assert torch.equal(mask, by_sorting(x, pattern))
    assert (pattern.group(mask).sum(-1) == pattern.n).all()


def test_extreme_values_keep_their_order():
    x = torch.tensor([[-128, 127, 126, 1]], dtype=torch.int8)
    assert topk_mask(x).tolist() == [[True, True, False, False]]
    x = torch.tensor([[1.0, float("inf"), -float("inf"), 3e38]])
    assert topk_mask(x).tolist() == [[False, True, True, False]]
    x = torch.tensor([[0.0, -0.0, 1e-45, -1e-44]])
    assert topk_mask(x).tolist() == [[False, False, True, True]]
    x = torch.zeros(1, 4)
    assert topk_mask(x).tolist() == [[True, True, False, False]]


def test_float8_is_ordered():
    x = torch.tensor([[1.0, -3.0, 2.0, 0.5]]).to(torch.float8_e4m3fn)
    assert topk_mask(x).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("pattern", [NMPattern(), NMPattern(2, 16)])
def test_unchecked_nan_is_least_and_a_group_never_holds_more_than_n(pattern):
    torch.manual_seed(0)
    x = torch.randn(500, pattern.m)
    x[torch.rand_like(x) < 0.5] = float("nan")
    mask = topk_mask(x, pattern, check=False)
    assert (mask.sum(-1) == pattern.n).all()
    kept_nan = (mask & x.isnan()).any(-1)
    assert ((~x.isnan()).sum(-1)[kept_nan] < pattern.n).all()


def test_nan_is_refused_with_its_place():
    x = torch.zeros(3, 8)
    x[2, 5] = float("nan")
    with pytest.raises(UserError, match=r"1 NaN, the first at index \(2, 5\), group 1"):
        topk_mask(x)
    with pytest.raises(UserError, match=r"index \(2, 5\), group 1"):
        topk_mask(torch.cat([x, x])[:4].clone(), NMPattern(2, 4, -1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_what_has_no_magnitude_order_is_refused(dtype):
    with pytest.raises(UserError, match="real numbers"):
        topk_mask(torch.zeros(4, dtype=dtype))


def test_the_argmax_pattern_of_summed_scores_is_the_two_largest():
    """Oracle 3: additive logits S M^T."""
    torch.manual_seed(0)
    score = torch.rand(4000, 4, dtype=torch.float64)
    table = patterns(2, 4)
    best = (score @ table.double().T).argmax(-1)
    assert torch.equal(table[best], topk_mask(score))
    tied = torch.randint(0, 3, (4000, 4)).double()  # sums are exact: the first maximum is theirs
    assert torch.equal(table[(tied @ table.double().T).argmax(-1)], topk_mask(tied))


def test_comparing_and_sorting_agree():
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (300, 8)).float()
    for n in range(1, 8):
        sorted_ = torch.cat([x, torch.full((300, 8), -9.0)], dim=-1)  # 16 wide: sorted
        assert torch.equal(largest(x, n), largest(sorted_, n)[:, :8])


def test_masked_entries_are_exact_zeros_and_pass_no_gradient():
    x = torch.tensor([[1.0, float("nan"), float("inf"), -2.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False, True]])
    out = apply_mask(x, mask)
    assert out.tolist() == [[1.0, 0.0, 0.0, -2.0]]
    assert not torch.signbit(apply_mask(-torch.ones(1, 4), mask))[0, 1]
    (out * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0, 4.0]]


def test_a_mask_of_fewer_dimensions_is_broadcast_and_keeps_the_type():
    x = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    out = apply_mask(x, torch.tensor([True, False, True, False]))
    assert out.dtype == torch.bfloat16 and out.sum() == 12


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 4), "bool"),
        (torch.ones(3, 4, dtype=torch.bool), "a shape that broadcasts"),
        (torch.ones(1, 2, 4, dtype=torch.bool), "a shape that broadcasts"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, words):
    with pytest.raises(UserError, match=words):
        apply_mask(torch.zeros(2, 4), mask)


def test_unchecked_functions_compile_into_one_graph():
    """With checks a graph would break at the question whether a NaN is there."""
    x = torch.randn(8, 16)
    for call in (
        lambda x: topk_mask(x, check=False),
        lambda x: soft_threshold(x, check=False),
        lambda x: transposable_mask(x, check=False),
        lambda x: mvue_sample(x, check=False).probability,
    ):
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), call(x))
