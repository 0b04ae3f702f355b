"""S-STE's sparsifier: values, continuity, derivative, straight-through, scale."""

import pytest
import torch

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import topk_mask
from tiny_onn.sparse.pattern import NMPattern
from tiny_onn.sparse.soft_threshold import beta, soft_threshold, soft_threshold_ste


def test_subtracts_the_third_largest_magnitude():
    x = torch.tensor([[3.0, -5.0, 1.0, 2.0], [0.0, 0.0, -7.0, 0.0], [2.0, -2.0, 2.0, 1.0]])
    expected = [[1.0, -3.0, 0.0, 0.0], [0.0, 0.0, -7.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert soft_threshold(x).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [NMPattern(), NMPattern(1, 4, 0), NMPattern(4, 8)])
def test_at_most_n_survive_and_they_are_the_largest(dtype, pattern):
    torch.manual_seed(0)
    x = torch.randn(16, 16).to(dtype)
    out = soft_threshold(x, pattern)
    assert out.dtype == dtype
    assert (pattern.group(out != 0).sum(-1) <= pattern.n).all()
    assert not (out != 0)[~topk_mask(x, pattern)].any()


def test_continuous_where_entries_swap_ranks():
    """Oracle 18: crossing a tie moves the output by no more than the input moved."""
    torch.manual_seed(0)
    x = torch.randn(2000, 4, dtype=torch.float64)
    x[:, 1] = x[:, 0] * torch.where(torch.rand(2000) < 0.5, -1.0, 1.0)  # ties
    step = 1e-6 * torch.randn_like(x)
    moved = (soft_threshold(x + step) - soft_threshold(x)).abs().amax(-1)
    assert (moved <= 2 * step.abs().amax(-1) + 1e-12).all()
    kept = topk_mask(x)  # the hard mask does jump
    jump = (torch.where(topk_mask(x + step), x + step, 0.0) - torch.where(kept, x, 0.0)).abs()
    assert jump.max() > 0.1


def test_positively_homogeneous_and_odd():
    torch.manual_seed(0)
    x = torch.randn(500, 8)
    assert torch.equal(soft_threshold(4 * x), 4 * soft_threshold(x))
    assert torch.equal(soft_threshold(-x), -soft_threshold(x))
    torch.testing.assert_close(soft_threshold(0.3 * x), 0.3 * soft_threshold(x))


def test_its_own_derivative_moves_the_threshold_too():
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_threshold, (x,))
    one = torch.tensor([[3.0, -5.0, 1.0, -2.0]], requires_grad=True)
    soft_threshold(one)[0, 0].backward()
    assert one.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]  # -sign(3) sign(-2)


def test_straight_through_hands_the_gradient_to_every_entry_unscaled():
    x = torch.randn(2, 8, requires_grad=True)
    upstream = torch.randn(2, 8)
    out = soft_threshold_ste(x, scale=1.5)
    assert torch.equal(out, 1.5 * soft_threshold(x))
    out.backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_beta_is_the_least_squares_scale():
    torch.manual_seed(0)
    x = torch.randn(100_000, 4)
    assert beta(x) == pytest.approx(1.483, abs=0.01)
    sparse, best = soft_threshold(x), beta(x)
    errors = [float((x - scale * sparse).square().sum()) for scale in (best, best - 0.05, best + 0.05)]
    assert errors[0] == min(errors)
    assert beta(1e-6 * x) == pytest.approx(best, rel=1e-5)


def test_bad_input_is_refused_in_one_line():
    bad = torch.ones(2, 8)
    bad[1, 2] = float("nan")
    for call, words in (
        (lambda: soft_threshold(bad), r"NaN, the first at index \(1, 2\), group 0"),
        (lambda: soft_threshold(torch.ones(2, 6)), "divisible by 4"),
        (lambda: soft_threshold(torch.ones(2, 8).int()), "float16, bfloat16 or wider"),
        (lambda: soft_threshold(torch.full((1, 4), float("inf"))), "4 infinities"),
        (lambda: beta(torch.ones(2, 8)), "zero everywhere"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
