"""Unbiased 2:4 estimates: exact enumeration, sampled moments, extremes."""

import itertools

import pytest
import torch

from tiny_onn.errors import UserError
from tiny_onn.sparse.mvue import METHODS, inclusion_probability, mvue, mvue_sample
from tiny_onn.sparse.pattern import NMPattern


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def variance(x, p):
    """Of a group's estimate, from the probabilities alone; entries that are zero add nothing."""
    x, p = x.double(), p.double()
    return torch.where(x != 0, x.square() * (1 / torch.where(x != 0, p, 1.0) - 1), 0.0).sum(-1)


def pairs_of_sequential_draws(a):
    """Probability of each pair under: i proportional to a, then j to a among the rest."""
    whole, found = a.sum(), {}
    for i, j in itertools.permutations(range(4), 2):
        pair = tuple(sorted((i, j)))
        found[pair] = found.get(pair, 0.0) + a[i] / whole * a[j] / (whole - a[i])
    return found


def pairs_of_systematic_draws(p):
    """Probability of each selection when all values of u are swept, by its break points."""
    ends = p.sort(descending=True).values.cumsum(-1)
    order = p.sort(descending=True).indices
    breaks = torch.cat([torch.tensor([0.0, 1.0], dtype=p.dtype), ends % 1]).unique()
    found = {}
    for low, high in itertools.pairwise(breaks.tolist()):
        u = (low + high) / 2
        starts = torch.cat([torch.zeros(1, dtype=p.dtype), ends[:-1]])
        hit = [
            int(order[i])
            for i in range(len(p))
            if any(starts[i] <= u + t < ends[i] for t in range(2))
        ]
        key = tuple(sorted(hit))
        found[key] = found.get(key, 0.0) + high - low
    return found


GROUPS = torch.tensor(
    [
        [1.0, -2.0, 3.0, -4.0],
        [1.0, 1.0, 1.0, 1.0],
        [10.0, 1.0, 2.0, 3.0],  # one entry above half of the sum: certain
        [0.0, 5.0, 1.0, 1.0],
        [0.3, 0.2, 0.25, 0.25],
    ],
    dtype=torch.float64,
)


def test_exact_probabilities_are_the_closed_form():
    p = inclusion_probability(GROUPS)
    a = GROUPS.abs()
    for group, got in zip(a, p, strict=True):
        whole, top = group.sum(), group.max()
        expected = 2 * group / whole if top <= whole / 2 else group / (whole - top)
        expected[group.argmax()] = min(1.0, float(2 * top / whole))
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(p.sum(-1), torch.full((5,), 2.0, dtype=torch.float64))


def test_enumerated_pairs_have_the_inclusion_probabilities_of_both_methods():
    """Oracle 15: exact enumeration."""
    for x in GROUPS:
        exact = inclusion_probability(x)
        for pairs, p in (
            (pairs_of_systematic_draws(exact), exact),
            (pairs_of_sequential_draws(x.abs()), inclusion_probability(x, method="approximate")),
        ):
            marginal = torch.zeros(4, dtype=torch.float64)
            for pair, probability in pairs.items():
                assert len(pair) == 2
                for i in pair:
                    marginal[i] += probability
            torch.testing.assert_close(marginal, p)


@pytest.mark.parametrize("method", METHODS)
def test_draws_come_as_often_as_their_probability_says_and_average_to_x(method):
    """Oracle 15: within five standard errors."""
    draws = 40_000
    for x in GROUPS:
        many = x.expand(draws, 4)
        mask, p = mvue_sample(many, generator=rng(), method=method)
        assert (mask.sum(-1) == min(2, int((x != 0).sum()))).all()
        share, p = mask.double().mean(0), p[0]
        assert ((share - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-12).all()
        mean = mvue(many, generator=rng(1), method=method).mean(0)
        error = (x.square() * (1 / p.clamp(min=1e-12) - 1) / draws).sqrt()
        assert ((mean - x).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("pattern", [NMPattern(1, 4), NMPattern(3, 4), NMPattern(4, 8, dim=0)])
def test_other_patterns_are_unbiased_too(pattern):
    torch.manual_seed(0)
    x = torch.randn(8, 8, dtype=torch.float64)
    p = inclusion_probability(x, pattern)
    groups = pattern.group(p)
    torch.testing.assert_close(groups.sum(-1), torch.full(groups.shape[:-1], float(pattern.n)).double())
    draws, g = 20_000, rng()
    many = x.expand(draws, 8, 8)
    shifted = NMPattern(pattern.n, pattern.m, pattern.dim + (pattern.dim >= 0))
    mask = mvue_sample(many, shifted, g)[0]
    assert (shifted.group(mask).sum(-1) == pattern.n).all()
    error = (p * (1 - p) / draws).sqrt()
    assert ((mask.double().mean(0) - p).abs() <= 5 * error + 1e-12).all()


def test_exact_variance_is_at_most_the_approximate_and_that_at_most_a_uniform_pair():
    """Oracle 16, and the energies that sparse24.md measured for Gaussian weights."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 4, dtype=torch.float64)
    exact = variance(x, inclusion_probability(x))
    approximate = variance(x, inclusion_probability(x, method="approximate"))
    uniform = variance(x, torch.full_like(x, 0.5))
    assert (exact <= approximate + 1e-12).all()
    energy = x.square().sum()
    shares = [float(v.sum() / energy) for v in (exact, approximate, uniform)]
    assert shares == pytest.approx([0.474, 0.502, 1.0], abs=0.01)


def test_no_other_probabilities_have_less_variance_than_the_water_level():
    torch.manual_seed(0)
    x = torch.randn(200, 4, dtype=torch.float64) * torch.tensor([5.0, 1.0, 1.0, 0.1])
    p = inclusion_probability(x)
    for _ in range(50):
        step = torch.randn_like(p) * 0.05
        q = (p + step - step.mean(-1, keepdim=True)).clamp(1e-6, 1)
        valid = (q.sum(-1) - 2).abs() < 1e-9
        assert (variance(x, q)[valid] >= variance(x, p)[valid] - 1e-9).all()


EXTREME = [
    [0.0, 0.0, 0.0, 0.0],
    [4.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, -1e30, 0.0],
    [0.0, 1e-30, 0.0, 0.0],
    [1e30, 0.0, 1e-30, 0.0],
    [3.0, 0.0, 0.0, 4.0],
    [1e30, 1e-30, 1e-30, 1e-30],
    [1e30, 1e30, 1e-30, 1e-30],
    [1e30, -1e30, 1e30, 1e30],
    [1e-30, 1e-30, 1e-30, -1e-30],
    [3e38, 1.0, 1.0, 1.0],
    [1e-45, 1e-45, 1e-45, 1e-45],
    [1.0, 1e-45, 1e-45, 1e-45],
    [1.0, 1e-8, 1e-8, 0.0],
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_on_every_input(method, dtype):
    """Oracle 17."""
    x = torch.tensor(EXTREME, dtype=dtype)
    p = inclusion_probability(x, method=method)
    assert p.isfinite().all() and (p >= 0).all() and (p <= 1).all()
    nonzero = (x != 0).sum(-1)
    torch.testing.assert_close(p.sum(-1), nonzero.clamp(max=2).to(dtype), rtol=1e-5, atol=1e-5)
    for seed in range(50):
        out = mvue(x, generator=rng(seed), method=method)
        assert out.isfinite().all()
        assert ((out != 0).sum(-1) == nonzero.clamp(max=2)).all()
        assert ((out == 0) | (out.sign() == x.sign())).all()
        few = nonzero <= 2
        assert torch.equal(out[few], x[few])


@pytest.mark.parametrize("method", METHODS)
def test_sparse_activations_give_no_nan(method):
    """85% zeros: where cancelling sums made 12% of the groups NaN."""
    torch.manual_seed(0)
    x = torch.randn(4000, 4).square() * 30
    x[torch.rand_like(x) < 0.85] = 0
    assert mvue(x, generator=rng(), method=method).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_mean(method, dtype):
    x = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=dtype).expand(20_000, 4)
    out = mvue(x, generator=rng(), method=method)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float().mean(0), x[0].float(), atol=0.03, rtol=0.01)


def test_the_same_generator_draws_the_same_and_the_global_one_is_left_alone():
    x = torch.randn(64, 8)
    before = torch.get_rng_state()
    for method in METHODS:
        assert torch.equal(mvue(x, generator=rng(), method=method), mvue(x, generator=rng(), method=method))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gradient_passes():
    x = torch.randn(4, 4, requires_grad=True)
    assert not mvue(x, generator=rng()).requires_grad


def test_bad_input_is_refused_in_one_line():
    x = torch.ones(2, 8)
    bad = x.clone()
    bad[1, 6] = float("nan")
    overflow = torch.full((1, 4), 40_000.0, dtype=torch.float16)
    for call, words in (
        (lambda: mvue(x, method="best"), "unknown MVUE method 'best'.*exact, approximate"),
        (lambda: mvue(x, NMPattern(1, 4), method="approximate"), "draws two.*use method exact"),
        (lambda: mvue(x[:, :6]), "divisible by 4"),
        (lambda: mvue(x.int()), "floating-point"),
        (lambda: mvue(bad), r"NaN, the first at index \(1, 6\), group 1"),
        (lambda: mvue(bad.nan_to_num(float("inf"))), r"infinities, the first at index \(1, 6\)"),
        (lambda: mvue(overflow), "overflows torch.float16.*65504"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
