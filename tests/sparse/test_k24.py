"""K-2:4's tensors: scores, logits, drawn and likeliest masks, their gradients; diversity."""

import itertools
import math
from collections import Counter

import pytest
import torch

from tiny_onn.errors import UserError
from tiny_onn.sparse import k24
from tiny_onn.sparse.k24_diversity import mask_overlap, pair_overlap
from tiny_onn.sparse.mask import topk_mask
from tiny_onn.sparse.pattern import patterns

M = patterns(2, 4).double()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(agents=3, rows=5, columns=24, dtype=torch.float64):
    weight = normal(rows, columns, seed=1, dtype=dtype) * 0.02
    activity = normal(agents, columns, seed=2, dtype=dtype).abs() + 0.1
    return weight, activity, normal(agents, rows, columns, seed=3, dtype=dtype)


def chi_square(counts, shares, draws):
    expected = shares * draws
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_entries_of_pairs_are_those_of_the_patterns():
    assert [tuple(row.nonzero().squeeze(1).tolist()) for row in M] == list(k24.PAIRS)


def test_logits_are_kappa_times_the_kept_score_and_scores_have_mean_one():
    score = k24.score(*inputs())
    assert torch.allclose(score.mean(dim=(1, 2)), torch.ones(3).double())
    expected = 3.0 * score.unflatten(-1, (-1, 4)) @ M.T
    assert torch.allclose(k24.pattern_logits(score, 3.0), expected.movedim(-1, 0))
    weight, activity, alpha = inputs()
    by_hand = weight.abs() * activity.unsqueeze(1) / (1 + torch.exp(-alpha))
    ratio = score / by_hand
    assert torch.allclose(ratio, ratio[:, :1, :1].expand_as(ratio))


def test_the_scores_scale_is_that_of_no_weight_activity_or_agent():
    weight, activity, alpha = inputs()
    score = k24.score(weight, activity, alpha)
    assert torch.allclose(k24.score(weight * 1e-3, activity * 70, alpha), score)
    assert torch.equal(k24.score(weight * 0, activity, alpha), torch.zeros_like(score))


def test_the_likeliest_pattern_keeps_the_two_largest_scores():
    score = k24.score(*inputs(rows=50))
    mask = k24.likeliest_mask(k24.pattern_logits(score, 7.0))
    assert torch.equal(mask, topk_mask(score)) and torch.equal(mask, k24.best_mask(score))


def test_of_equal_scores_the_first_two_are_kept_by_both():
    score = torch.ones(1, 3, 8)
    first = torch.tensor([True, True, False, False]).repeat(1, 3, 2)
    assert torch.equal(k24.likeliest_mask(k24.pattern_logits(score, 1.0)), first)
    assert torch.equal(k24.best_mask(score), first)


def test_softmax_marginals_are_those_of_a_conditional_bernoulli():
    """P(i, j) = w_i w_j / sum over pairs of w w, with w = exp(kappa S)."""
    score = normal(1, 4, 8).abs()
    marginal = k24.kept(k24.pattern_logits(score, 2.0).softmax(dim=0))
    assert torch.allclose(marginal.sum(dim=0), torch.full((1, 4, 2), 2.0).double())
    w = (2.0 * score).exp().unflatten(-1, (2, 4))
    all_pairs = sum(w[..., i] * w[..., j] for i, j in itertools.combinations(range(4), 2))
    for i in range(4):
        others = w.sum(dim=-1) - w[..., i]
        assert torch.allclose(marginal[i], w[..., i] * others / all_pairs)


@pytest.mark.parametrize("tau", [5.0, 1.0, 0.1])
def test_patterns_are_drawn_by_their_softmax_whatever_tau_is(tau):
    logits = torch.tensor([0.3, -1.0, 0.0, 1.2, 0.7, -0.2]).view(6, 1, 1, 1)
    draws = 30_000
    many = logits.expand(6, 1, draws, 1).contiguous()
    mask = k24.sample_mask(many, k24.gumbel_noise(many, seed=5), tau)
    code = (mask.view(draws, 4) * torch.tensor([8, 4, 2, 1])).sum(dim=1)
    counts = torch.stack([(code == c).sum() for c in (12, 10, 9, 6, 5, 3)])
    assert chi_square(counts, logits.flatten().softmax(dim=0), draws) < 20.5  # p = 0.001, 5 d.o.f.


def test_tau_changes_no_draw_and_a_large_kappa_gives_the_likeliest():
    score = k24.score(*inputs(rows=40))
    logits = k24.pattern_logits(score, 4.0)
    noise = k24.gumbel_noise(logits, seed=1)
    masks = [k24.sample_mask(logits, noise, tau) for tau in (5.0, 1.0, 0.1)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    agree = []
    for kappa in (1.0, 16.0, 1e6):
        drawn = k24.sample_mask(k24.pattern_logits(score, kappa), noise, 1.0)
        agree.append(float((drawn.bool() == k24.best_mask(score)).float().mean()))
    assert agree[0] < agree[1] < agree[2] == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_are_exactly_zero_and_one_with_two_ones_a_group(dtype):
    weight, activity, alpha = inputs(rows=64, dtype=torch.float32)
    weight = weight.to(dtype)
    score = k24.score(weight, activity, alpha)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    logits = k24.pattern_logits(score, 1.0)
    mask = k24.sample_mask(logits, k24.gumbel_noise(logits, 0), 0.1)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask.unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()
    product = k24.masked(weight, mask)
    assert product.dtype == dtype
    assert torch.equal(product != 0, mask.bool() & (weight != 0))


def test_autocast_does_not_reach_the_scores():
    weight, activity, alpha = inputs(dtype=torch.float32)
    plain = k24.pattern_logits(k24.score(weight, activity, alpha), 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(k24.pattern_logits(k24.score(weight, activity, alpha), 4.0), plain)


@pytest.mark.parametrize("tau", [5.0, 0.7])
def test_the_masks_gradient_is_the_softmaxs_jacobian(tau):
    logits = normal(6, 2, 3, 2).requires_grad_()
    noise = k24.gumbel_noise(logits.detach(), 3)
    grad = normal(2, 3, 8, seed=9)
    k24.sample_mask(logits, noise, tau).backward(grad)
    for a, o, g in itertools.product(range(2), range(3), range(2)):
        y = ((logits[:, a, o, g] + noise[:, a, o, g]) / tau).detach().softmax(dim=0)
        jacobian = (torch.diag(y) - torch.outer(y, y)) / tau
        expected = jacobian @ M @ grad[a, o, 4 * g : 4 * g + 4]
        assert torch.allclose(logits.grad[:, a, o, g], expected, rtol=1e-12, atol=1e-15)


def test_gradients_of_alpha_go_through_score_mean_and_kappa_as_autograds_do():
    weight, activity, alpha = inputs()
    grads = []
    for hard in (True, False):
        own = alpha.clone().requires_grad_()
        logits = k24.pattern_logits(k24.score(weight, activity, own), 3.0)
        noise = k24.gumbel_noise(logits.detach(), 8)
        if hard:
            mask = k24.sample_mask(logits, noise, 2.0)
        else:
            mask = k24.by_column(k24.kept(((logits + noise) / 2.0).softmax(dim=0)))
        (mask * normal(*mask.shape, seed=4)).sum().backward()
        grads.append(own.grad)
    assert torch.allclose(*grads) and grads[0].abs().max() > 0


def test_the_score_is_differentiable_to_machine_precision():
    weight, activity, alpha = inputs(agents=2, rows=2, columns=8)
    mean = k24.score(weight, activity, alpha).div(
        weight.abs() * activity.unsqueeze(1) * alpha.sigmoid()
    )[0, 0, 0]

    def unnormalised(w, a):
        return k24.score(w, activity, a, weight_learns=True)[0]

    # The mean is a constant of the gradient, so it is one here.
    weight.requires_grad_(), alpha.requires_grad_()
    out = unnormalised(weight, alpha)
    got = torch.autograd.grad(out.sum(), (weight, alpha))
    sig = alpha[0].sigmoid()
    assert torch.allclose(got[0], mean * weight.sign() * activity[0] * sig)
    assert torch.allclose(got[1][0], mean * weight.abs() * activity[0] * sig * (1 - sig))
    assert got[1][1].abs().max() == 0


@pytest.mark.parametrize("way", ["masked", "straight", "score"])
def test_what_a_weight_learns_from(way):
    weight, activity, alpha = inputs()
    weight.requires_grad_()
    score = k24.score(weight, activity, alpha, way == "score")
    logits = k24.pattern_logits(score, 2.0)
    mask = k24.sample_mask(logits, k24.gumbel_noise(logits.detach(), 0), 1.0)
    grad = normal(3, 5, 24, seed=6)
    k24.masked(weight, mask, way == "straight").backward(grad, retain_graph=True)
    if way == "masked":
        assert torch.allclose(weight.grad, (grad * mask).sum(dim=0))
    elif way == "straight":
        assert torch.allclose(weight.grad, grad.sum(dim=0))
    else:
        through = torch.autograd.grad(mask, weight, grad * weight.detach())[0]
        assert torch.allclose(weight.grad, (grad * mask).sum(dim=0) + through)
        assert through.abs().max() > 0


def test_noise_is_gumbel_and_a_stream_of_its_own():
    like = torch.empty(6, 100_000)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = k24.gumbel_noise(like, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noise, k24.gumbel_noise(like, 7))
    assert not torch.equal(noise, k24.gumbel_noise(like, 8))
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_widths_that_four_does_not_divide_are_refused():
    with pytest.raises(UserError, match="divisible by 4.*got 6"):
        k24.pattern_logits(torch.ones(1, 2, 6), 1.0)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(tau):
    with pytest.raises(ValueError, match="expected a number above 0"):
        k24.sample_mask(torch.zeros(6, 1, 1, 1), torch.zeros(6, 1, 1, 1), tau)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_scores_never_select_more_than_two(bad):
    score = normal(1, 6, 16).abs()
    score[0, 2, 3:5] = bad
    logits = k24.pattern_logits(score, 2.0)
    for mask in (
        k24.sample_mask(logits, k24.gumbel_noise(logits, 0), 1.0) > 0,
        k24.likeliest_mask(logits),
        k24.best_mask(score),
    ):
        assert mask.unflatten(-1, (-1, 4)).sum(dim=-1).max() <= 2


# Diversity.

ONE_HOT = 200.0


def one_hot(codes):
    """(6, A, 1, 1) logits that choose these patterns for certain."""
    logits = torch.zeros(6, len(codes), 1, 1).double()
    for agent, code in enumerate(codes):
        logits[code, agent] = ONE_HOT
    return logits


@pytest.mark.parametrize("kernel", ["dot", "overlap"])
def test_overlap_is_the_mean_over_all_pairs_of_agents_and_groups(kernel):
    logits = normal(6, 4, 3, 2) * 2
    pi = logits.softmax(dim=0)
    table = torch.eye(6).double() if kernel == "dot" else M @ M.T / 2
    pairs = list(itertools.combinations(range(4), 2))
    expected = sum(
        torch.einsum("kog,kl,log->og", pi[:, i], table, pi[:, j]).mean() for i, j in pairs
    ) / len(pairs)
    got = pair_overlap(logits, kernel)
    assert torch.allclose(got, expected) and 0 <= got <= 1
    shuffled = logits[:, [2, 0, 3, 1]]
    assert torch.allclose(pair_overlap(shuffled, kernel), got)
    assert torch.autograd.gradcheck(
        lambda x: pair_overlap(x, kernel), logits[:, :2, :1, :1].clone().requires_grad_()
    )


@pytest.mark.parametrize(("kernel", "uniform"), [("dot", 1 / 6), ("overlap", 1 / 2)])
def test_overlap_of_equal_certain_agents_is_one_and_of_uniform_ones_known(kernel, uniform):
    assert float(pair_overlap(one_hot([2, 2, 2]), kernel)) == pytest.approx(1.0)
    assert float(pair_overlap(torch.zeros(6, 5, 2, 3).double(), kernel)) == pytest.approx(uniform)
    assert float(pair_overlap(torch.zeros(6, 1, 2, 3), kernel)) == 0.0


def test_the_dot_is_indifferent_among_other_patterns_where_the_overlap_is_not():
    assert [float(pair_overlap(one_hot([0, k]), "dot")) for k in range(1, 6)] == [0.0] * 5
    overlaps = [float(pair_overlap(one_hot([0, k]), "overlap")) for k in range(6)]
    assert overlaps == pytest.approx([1, 0.5, 0.5, 0.5, 0.5, 0])


@pytest.mark.parametrize(("agents", "least"), [(6, 0.0), (7, 1 / 21), (8, 2 / 28)])
def test_more_than_six_agents_cannot_all_differ(agents, least):
    spread = [agent % 6 for agent in range(agents)]
    assert float(pair_overlap(one_hot(spread), "dot")) == pytest.approx(least)
    # No assignment has less: how many agents draw each pattern is all that matters.
    pairs = agents * (agents - 1) / 2
    together = [
        sum(n * (n - 1) / 2 for n in Counter(drawn).values())
        for drawn in itertools.combinations_with_replacement(range(6), agents)
    ]
    assert min(together) / pairs == pytest.approx(least)


def test_agents_that_start_equal_stay_equal_and_those_that_start_apart_separate():
    weight, activity, _ = inputs(agents=1, rows=16)
    activity = activity.expand(2, -1)
    found = {}
    for std in (0.0, 0.3):
        alpha = (normal(2, 16, 24, seed=5) * std).requires_grad_()
        optimizer = torch.optim.Adam([alpha], lr=0.1)
        for _ in range(150):
            logits = k24.pattern_logits(k24.score(weight, activity, alpha), 8.0)
            loss = pair_overlap(logits, "overlap")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[std] = float(loss.detach()), float(mask_overlap(k24.likeliest_mask(logits)))
        if std == 0:
            assert torch.equal(alpha[0], alpha[1])
    assert found[0.0][1] == 1.0
    assert max(found[0.3]) < 0.25  # of masks drawn at random: 0.5


def test_mask_overlap_counts_entries_in_common():
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]).bool().unsqueeze(1)
    assert float(mask_overlap(masks)) == pytest.approx((0.5 + 0 + 0.5) / 3)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="expected dot or overlap"):
        pair_overlap(torch.zeros(6, 2, 1, 1), "cosine")
