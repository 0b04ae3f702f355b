"""The squared-ReLU FFN with 2:4 activations against autograd, loops and enumeration."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tiny_onn.errors import UserError
from tiny_onn.sparse.activation import (
    NUM_KEYS,
    ActSparse24,
    DropTally,
    feature_wise,
    inverse_order,
    num_sparse_features,
    squared_relu_24,
    squared_relu_24_frozen,
    token_keys,
    token_order,
    token_wise,
)

DENSE = ActSparse24(split_ratio=0.0)
METHODS = ("naive", "mvue", "soft_threshold")


def inputs(tokens=13, width=6, hidden=16, dtype=torch.float64, seed=0):
    """x, up, down and dy."""
    torch.manual_seed(seed)
    shapes = ((tokens, width), (hidden, width), (width, hidden))
    x, up, down = (torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    return (x, up, down), torch.randn(tokens, width, dtype=dtype)


def hidden_of(x, up):
    relu = F.linear(x, up).relu()
    return relu * relu


def gradients(y, leaves, dy):
    return torch.autograd.grad(y, leaves, dy)


def top2(values, dim):
    """By sorting: the 2 largest magnitudes of every 4 along ``dim``, the last group filled up."""
    moved = values.movedim(dim, -1)
    filled = F.pad(moved, (0, -moved.shape[-1] % 4)).unflatten(-1, (-1, 4))
    places = filled.abs().argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = torch.zeros_like(filled).scatter(-1, places, filled.gather(-1, places))
    return kept.flatten(-2)[..., : moved.shape[-1]].movedim(-1, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("split_ratio", [0.0, 1.0])
def test_dx_is_bitwise_that_of_autograd_through_the_masked_forward(dtype, split_ratio):
    leaves, dy = inputs(hidden=32, dtype=dtype)
    options = replace(DENSE, split_ratio=split_ratio)
    y = squared_relu_24(*leaves, options)
    hidden = hidden_of(*leaves[:2])
    mask = (top2(hidden.detach(), 1) != 0).to(dtype)
    expected = F.linear(hidden * mask, leaves[2])
    assert torch.equal(y, expected)
    dx, dup, ddown = gradients(y, leaves, dy)
    want = gradients(expected, leaves, dy)
    assert torch.equal(dx, want[0])
    if not split_ratio:  # and the weights' gradients are those of the masked dense network
        torch.testing.assert_close((dup, ddown), want[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["naive", "soft_threshold"])
def test_gradcheck_in_float64(method):
    """soft_threshold against its own definition: theta and beta held."""
    (x, up, down), _ = inputs(tokens=5)
    factor = torch.randn(5, 16, dtype=torch.float64).requires_grad_()
    options = replace(DENSE, method=method)
    if method == "naive":
        order = torch.randperm(5)

        def ffn(*leaves):
            return squared_relu_24(*leaves[:3], options, order, leaves[3])

        assert torch.autograd.gradcheck(ffn, (x, up, down, factor))
        return
    active = hidden_of(x, up)
    sparse, slope = token_wise(active.detach(), method)
    held = active * slope + (sparse - active.detach() * slope)  # the constant part of S
    expected, got = F.linear(held, down), squared_relu_24(x, up, down, options)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(got)
    wanted = gradients(expected, (x, up), dy)
    torch.testing.assert_close(gradients(got, (x, up), dy), wanted)


def test_a_ratio_of_one_takes_all_features_two_of_four_along_tokens():
    leaves, dy = inputs(tokens=13)
    x, up, down = leaves
    got = gradients(squared_relu_24(*leaves, ActSparse24(split_ratio=1.0)), leaves, dy)
    with torch.no_grad():
        sparse = top2(hidden_of(x, up), 1)
        dhidden = (dy @ down) * (sparse != 0) * 2 * F.linear(x, up).relu()
        torch.testing.assert_close(got[0], dhidden @ up)
        torch.testing.assert_close(got[1], top2(dhidden, 0).T @ x)
        torch.testing.assert_close(got[2], dy.T @ top2(sparse, 0))
        thin = F.pad(top2(sparse, 0) != 0, (0, 0, 0, 3)).unflatten(0, (-1, 4)).sum(dim=1)
        assert (thin <= 2).all() and thin.sum() < (sparse != 0).sum()


def test_the_densest_features_stay_dense_and_the_count_is_rounded_down():
    assert [num_sparse_features(f, 0.95) for f in (640, 1152, 4608, 16)] == [608, 1088, 4352, 0]
    assert num_sparse_features(48, 1.0) == 48
    torch.manual_seed(0)
    density = torch.linspace(0.05, 0.95, 96)[torch.randperm(96)]
    values = torch.randn(400, 96) * (torch.rand(400, 96) < density)
    thin = feature_wise(values, ActSparse24(split_ratio=0.7))  # 67.2 -> 64
    same = (thin == values).all(dim=0)
    densest = (values != 0).sum(dim=0).topk(32).indices
    assert same[densest].all()
    rest = torch.ones(96, dtype=torch.bool)
    rest[densest] = False
    assert torch.equal(thin[:, rest], top2(values, 0)[:, rest])
    lost = {
        by: float((values - feature_wise(values, ActSparse24(split_ratio=0.7, split_by=by))).norm())
        for by in ("nonzeros", "dropped", "random")
    }
    assert lost["nonzeros"] < 0.9 * lost["random"] and lost["dropped"] < 0.9 * lost["random"]


@pytest.mark.parametrize("method", ["naive", "soft_threshold"])
def test_the_order_of_tokens_changes_weight_gradients_only(method):
    leaves, dy = inputs(tokens=40, hidden=32)
    options = ActSparse24(method=method, split_ratio=1.0)
    order = token_order(token_keys(3), 40)
    assert torch.equal(order.sort().values, torch.arange(40))
    assert torch.equal(leaves[0][order][inverse_order(order)], leaves[0])
    assert torch.equal(inverse_order(order)[order], torch.arange(40))
    factor = torch.randn(40, 32, dtype=torch.float64).requires_grad_()
    found = []
    for permutation in (None, order):
        y = squared_relu_24(*leaves, options, permutation, factor)
        found.append((y.detach(), *gradients(y, (*leaves, factor), dy)))
    for place in (0, 1, 4):  # y, dx, dfactor
        torch.testing.assert_close(found[0][place], found[1][place])
    assert not torch.allclose(found[0][2], found[1][2])
    assert not torch.allclose(found[0][3], found[1][3])
    exact = replace(options, split_ratio=0.0)
    dense = [
        gradients(squared_relu_24(*leaves, exact, o, factor), leaves, dy) for o in (None, order)
    ]
    torch.testing.assert_close(dense[0], dense[1])


def test_the_order_spreads_tokens_that_are_alike():
    """Runs of like tokens have their nonzeros in the same features."""
    torch.manual_seed(0)
    alike = torch.randn(64, 6).repeat_interleave(8, dim=0)
    x = (alike + 0.1 * torch.randn_like(alike)).requires_grad_()
    up, down = torch.randn(32, 6, requires_grad=True), torch.randn(6, 32, requires_grad=True)
    dy = torch.randn(512, 6)
    exact = gradients(squared_relu_24(x, up, down, DENSE), (up, down), dy)
    error = {}
    for name, order in (("none", None), ("random", token_order(token_keys(0), 512))):
        y = squared_relu_24(x, up, down, ActSparse24(split_ratio=1.0), order)
        got = gradients(y, (up, down), dy)
        error[name] = float((got[1] - exact[1]).norm() / exact[1].norm())
    assert error["random"] < 0.7 * error["none"]


def test_the_order_depends_on_seed_and_length_alone():
    assert torch.equal(token_keys(5), token_keys(5))
    assert not torch.equal(token_keys(5), token_keys(6))
    keys = token_keys(5)
    long = token_order(keys, NUM_KEYS + 7)
    assert torch.equal(long.sort().values, torch.arange(NUM_KEYS + 7))
    short = token_order(keys, 50)
    assert torch.equal(short, token_order(keys, 100)[token_order(keys, 100) < 50])


def test_mvue_is_unbiased_forward_and_keeps_dx_two_of_four():
    (x, up, down), dy = inputs(tokens=4, hidden=8)
    options = replace(DENSE, method="mvue")
    dense = F.linear(hidden_of(x, up), down)
    torch.manual_seed(1)
    draws = torch.stack([squared_relu_24(x, up, down, options).detach() for _ in range(4000)])
    error = (draws.mean(0) - dense).abs()
    assert (error <= 5 * draws.std(0) / 4000**0.5 + 1e-9).all()
    sparse, slope = token_wise(hidden_of(x, up).detach(), "mvue")
    assert ((sparse != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    assert torch.equal(slope != 0, sparse != 0) and (slope[sparse != 0] >= 1 - 1e-12).all()
    torch.testing.assert_close(slope * hidden_of(x, up), sparse)
    dx = torch.stack(
        [gradients(squared_relu_24(x, up, down, options), (x,), dy)[0] for _ in range(4000)]
    )
    want = gradients(dense, (x,), dy)[0]
    assert ((dx.mean(0) - want).abs() <= 5 * dx.std(0) / 4000**0.5 + 1e-9).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient_method", ["naive", "mvue"])
def test_all_is_finite_on_zeros_lone_entries_and_extremes(method, gradient_method):
    up = torch.eye(8, requires_grad=True)
    rows = [[0.0] * 8, [1.0] + [0.0] * 7, [3.0, 0, 0, 2.0] * 2, [1e15, 1e-15] * 4, [2.0] * 8]
    x = torch.tensor([*rows, [-1.0] * 8], requires_grad=True)
    down = torch.randn(8, 8, requires_grad=True)
    options = ActSparse24(method=method, gradient_method=gradient_method, split_ratio=1.0)
    for seed in range(20):
        torch.manual_seed(seed)
        y = squared_relu_24(x, up, down, options)
        for tensor in (y, *gradients(y, (x, up, down), torch.ones_like(y) * 1e-3)):
            assert tensor.isfinite().all()
        assert (y[[0, 5]] == 0).all()
    if method != "soft_threshold":  # two nonzeros of four are exact
        two = F.linear(x.detach()[:3].square(), down)
        torch.testing.assert_close(y[:3], two)


def test_soft_threshold_keeps_two_without_a_jump_and_with_the_scale_of_each_token():
    torch.manual_seed(0)
    active = torch.rand(50, 32, dtype=torch.float64) ** 2
    sparse, slope = token_wise(active, "soft_threshold")
    assert ((sparse != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    torch.testing.assert_close((sparse * active).sum(1), sparse.square().sum(1))  # beta's equation
    torch.testing.assert_close(token_wise(3 * active, "soft_threshold")[0], 3 * sparse)
    low, high = (torch.tensor([[1.0, 0.5, 0.5 + e, 0.2]]) for e in (-1e-5, 1e-5))
    outputs = [token_wise(v, "soft_threshold")[0] for v in (low, high)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-3)
    zero = token_wise(torch.zeros(2, 8), "soft_threshold")[0]
    assert (zero == 0).all()


def test_switches_do_what_they_say():
    leaves, dy = inputs(tokens=16, hidden=32)
    x, up, down = leaves
    full = ActSparse24(split_ratio=1.0)
    with torch.no_grad():
        active = hidden_of(x, up)
        sparse = top2(active, 1)
        relu = F.linear(x, up).relu()
        masked = (dy @ down) * (sparse != 0) * 2 * relu
        unmasked = (dy @ down) * 2 * relu
    split_way = replace(full, dx_direct_sparse=False)
    got = gradients(squared_relu_24(*leaves, split_way), leaves, dy)
    torch.testing.assert_close(got[0], top2(masked, 0) @ up)
    torch.testing.assert_close(got[1], top2(masked, 0).T @ x)
    no_mask = replace(full, keep_forward_mask=False)
    got = gradients(squared_relu_24(*leaves, no_mask), leaves, dy)
    torch.testing.assert_close(got[0], top2(unmasked, 1) @ up)
    torch.testing.assert_close(got[1], top2(unmasked, 0).T @ x)
    torch.testing.assert_close(got[2], dy.T @ top2(active, 0))


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_draws_nothing_and_no_token_depends_on_another(method):
    (x, up, down), _ = inputs(tokens=9)
    before = torch.get_rng_state()
    y = squared_relu_24_frozen(x, up, down, method)
    rows = torch.cat([squared_relu_24_frozen(row[None], up, down, method) for row in x])
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(y, rows)
    if method != "mvue":
        torch.testing.assert_close(y, squared_relu_24(x, up, down, ActSparse24(method=method)))


def test_gradients_that_nobody_asks_for_are_left_out_and_there_are_no_second_ones():
    (x, up, down), dy = inputs()
    y = squared_relu_24(x.detach(), up.detach(), down, ActSparse24())
    (ddown,) = gradients(y, (down,), dy)
    assert ddown.shape == down.shape
    y = squared_relu_24(x, up, down, ActSparse24())
    (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_tally_counts_what_a_loop_counts():
    leaves, dy = inputs(tokens=16, hidden=32)
    tally, full = DropTally(), ActSparse24(split_ratio=1.0)
    assert tally.take() == [0] * 5
    y = squared_relu_24(*leaves, full, tally=tally)
    gradients(y, leaves, dy)
    active = hidden_of(*leaves[:2]).detach()
    sparse = top2(active, 1)
    dhidden = (dy @ leaves[2].detach()) * (sparse != 0) * active
    operands = [(t != 0).sum().item() for t in (sparse, dhidden)]
    kept = [(top2(t, 0) != 0).sum().item() for t in (sparse, dhidden)]
    nonzeros = (active != 0).sum().item()
    dropped = nonzeros - (sparse != 0).sum().item()
    assert tally.take() == [
        active.numel(),
        nonzeros,
        dropped,
        sum(operands),
        sum(operands) - sum(kept),
    ]
    tally.add_tokens(active, None)  # the dense warm-up says the same
    assert tally.take() == [active.numel(), nonzeros, dropped, 0, 0]


def test_independent_activations_half_zero_lose_three_sixteenths_of_their_nonzeros():
    """E[max(nnz - 2, 0)] / E[nnz] of binomial(4, 1/2): (4 * 1 + 1 * 2) / 16 / 2 = 18.75%."""
    torch.manual_seed(0)
    tally = DropTally()
    active = torch.randn(500, 400).relu().square()
    tally.add_tokens(active, token_wise(active, "naive")[0])
    _, nonzeros, dropped, *_ = tally.take()
    assert dropped / nonzeros == pytest.approx(0.1875, abs=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 18}, "hidden width of 18; expected a multiple of 4 .* use 20"),
        ({"dtype": torch.float16}, "float16 activations, whose squares overflow"),
    ],
)
def test_impossible_inputs_are_refused_in_one_line(change, message):
    leaves, _ = inputs(**change)
    with pytest.raises(UserError, match=message) as caught:
        squared_relu_24(*leaves, ActSparse24())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        squared_relu_24_frozen(*leaves, "naive")


@pytest.mark.parametrize(
    "given",
    [{"method": "top2"}, {"split_by": "size"}, {"split_ratio": 1.5}, {"gradient_method": ""}],
)
def test_unknown_options_are_refused(given):
    with pytest.raises(UserError, match="expected"):
        ActSparse24(**given)
