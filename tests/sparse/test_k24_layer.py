"""Masks of a matrix and the Linear that wears them: training, evaluation, activity, schedule."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tiny_onn.errors import UserError
from tiny_onn.sparse.k24_activity import Activity
from tiny_onn.sparse.k24_layer import K24Linear, PatternMask, PatternSettings
from tiny_onn.sparse.k24_schedule import K24Schedule, ScheduleState


def layer(agents=1, rows=12, columns=16, seed=0, **settings):
    torch.manual_seed(seed)
    state = ScheduleState()
    pattern = PatternMask(PatternSettings(**settings), state, agents, rows, columns)
    linear = K24Linear(columns, rows, pattern)
    pattern.reset_parameters()
    return linear


def rows_of(count=20, columns=16, seed=1):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def commit(linear):
    activity = linear.pattern.activity
    activity.commit(activity.take())


@pytest.mark.parametrize("logits", ["additive", "free"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_drawn_mask_is_a_function_of_seed_and_place(logits, rank):
    linear = layer(logits=logits, alpha_rank=rank if logits == "additive" else 0)
    x = rows_of()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = linear(x), linear(x)
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)
    linear.pattern.state.seed = 1
    other = linear(x)
    assert not torch.equal(first, other)
    linear.pattern.state.seed = 0
    linear.pattern.place = 1
    assert not torch.equal(first, linear(x))
    weight = linear.pattern(linear.weight)[0]
    assert ((weight != 0).unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()
    first.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in linear.parameters())


def test_evaluation_is_deterministic_and_wandas_where_alpha_is_constant():
    linear = layer(statistic="l2", alpha_init_std=0.0, momentum=0.5)
    batches = [rows_of(seed=s) * torch.linspace(0.1, 3, 16) for s in (1, 2)]
    linear(batches[0])
    commit(linear)
    linear.eval()
    norm = batches[0].norm(dim=0)
    wanda = linear.weight.abs() * norm
    keep = wanda.unflatten(-1, (-1, 4)).topk(2, dim=-1).indices
    expected = torch.zeros(12, 4, 4).scatter_(-1, keep, 1.0).flatten(1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for batch in batches:
                linear.pattern.state.seed += 1
                got = linear(batch)
                assert torch.equal(got, F.linear(batch, linear.weight * expected))


def test_the_activity_is_the_closed_form_of_its_average_and_bias_corrected():
    activity = Activity(1, 8, momentum=0.9, statistic="l1")
    assert torch.equal(activity.value(), torch.ones(1, 8))
    batches = [rows_of(10, 8, seed) for seed in range(5)]
    for batch in batches:
        activity.observe(batch)
        activity.commit(activity.take())
    means = torch.stack([b.abs().mean(dim=0) for b in batches])
    share = torch.tensor([0.1 * 0.9 ** (4 - t) for t in range(5)])
    expected = (means * share.unsqueeze(1)).sum(dim=0) / share.sum()
    assert torch.allclose(activity.value()[0], expected)


@pytest.mark.parametrize("statistic", ["l1", "l2"])
def test_the_activity_does_not_depend_on_how_a_step_is_cut_up_or_repeated(statistic):
    x = rows_of(30)
    runs = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    runs[:, 2] = False
    found = []
    for cuts in ([30], [7, 11, 12], [1] * 30):
        activity = Activity(3, 16, 0.99, statistic)
        for _ in range(2):  # as a recomputed forward would
            for part, own in zip(x.split(cuts), runs.split(cuts), strict=True):
                activity.observe(part, own)
        activity.commit(activity.take())
        found.append(activity.value())
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=1e-5)
    size = x.abs().mean if statistic == "l1" else None
    own = x[runs[:, 0]]
    by_hand = own.abs().mean(dim=0) if size else own.square().mean(dim=0).sqrt()
    assert torch.allclose(found[0][0], by_hand, rtol=1e-5)
    assert torch.equal(found[0][2], torch.ones(16))  # no row reached it


def test_only_forwards_that_learn_count_and_filler_does_not():
    linear = layer()
    x = rows_of()
    linear.eval()
    linear(x)
    linear.train()
    with torch.no_grad():
        linear(x)
    assert linear.pattern.activity.take().abs().max() == 0
    linear.pattern.state.num_rows = 15
    linear(x)
    found = linear.pattern.activity.take()
    assert torch.allclose(found[0, :-1], x[:15].abs().sum(dim=0)) and found[0, -1] == 15


def test_a_soft_reset_moves_the_average_by_its_ratio():
    activity = Activity(1, 8, 0.99, "l1")
    first, second = rows_of(10, 8, 1), rows_of(10, 8, 2) * 5
    for batch, ratio in ((first, None), (second, 0.9)):
        activity.observe(batch)
        activity.commit(activity.take(), ratio)
    expected = 0.1 * first.abs().mean(dim=0) + 0.9 * second.abs().mean(dim=0)
    assert torch.allclose(activity.value()[0], expected)
    fresh = Activity(1, 8, 0.99, "l1")
    fresh.observe(second)
    fresh.commit(fresh.take(), 0.9)  # nothing to move from
    assert torch.allclose(fresh.value()[0], second.abs().mean(dim=0))


def test_several_agents_share_a_weight_row_by_row():
    linear = layer(agents=3)
    x = rows_of()
    agent = torch.arange(20) % 3
    y = linear(x, agent)
    weight = linear.pattern(linear.weight)[0]
    for n in range(20):
        assert torch.allclose(y[n], weight[agent[n]] @ x[n], atol=1e-6)
    commit(linear)
    value = linear.pattern.activity.value()
    for a in range(3):
        assert torch.allclose(value[a], x[agent == a].abs().mean(dim=0))
    with pytest.raises(ValueError, match="no agent_N with 3 agents"):
        linear(x)


def test_the_cached_mask_follows_weights_statistics_and_modes():
    linear = layer().eval()
    with torch.no_grad():
        x = rows_of()
        before = linear(x)
        assert linear.pattern(linear.weight)[0] is linear.pattern(linear.weight)[0]
        linear.weight.mul_(-2)
        assert torch.allclose(linear(x), -2 * before)
        linear.pattern.alpha.neg_().mul_(20)
        changed = linear(x)
        linear.pattern.activity.observe(x * torch.linspace(0, 9, 16))
        commit(linear)
        assert not torch.equal(linear(x), changed)
        other = copy.deepcopy(linear)
        assert torch.equal(other(x), linear(x))
    fresh = layer(seed=4).eval()
    fresh.load_state_dict(linear.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), linear(x))


def test_overlap_is_told_to_learners_that_ask_only():
    linear = layer(agents=3, kernel="dot")
    assert 0 < float(linear.pattern(linear.weight)[1].detach()) < 1
    with torch.no_grad():
        assert linear.pattern(linear.weight)[1] is None
    assert layer(agents=3).pattern(linear.weight)[1] is None
    assert linear.eval().pattern(linear.weight)[1] is None


def test_windows_collect_what_any_step_selected():
    linear = layer()
    linear.pattern.track = True
    masks = []
    for seed in range(3):
        linear.pattern.state.seed = seed
        masks.append(linear.pattern(linear.weight)[0] != 0)
    assert torch.equal(linear.pattern.selected, masks[0] | masks[1] | masks[2])


@pytest.mark.parametrize("rank", [0, 4])
def test_alpha_starts_with_the_spread_that_was_asked_for(rank):
    pattern = PatternMask(
        PatternSettings(alpha_init_std=0.2, alpha_rank=rank), ScheduleState(), 2, 256, 256
    )
    pattern.reset_parameters(torch.Generator().manual_seed(0))
    alpha = pattern.alpha if not rank else pattern.alpha_left @ pattern.alpha_right
    assert float(alpha.detach().std()) == pytest.approx(0.2, rel=0.1)
    assert sum(p.numel() for p in pattern.parameters()) == (
        2 * 256 * 256 if not rank else 2 * 2 * 256 * rank
    )


def test_a_width_that_four_does_not_divide_is_refused():
    with pytest.raises(UserError, match="18 columns.*use 20"):
        layer(columns=18)
    pattern = PatternMask(PatternSettings(), ScheduleState(), 1, 4, 8)
    with pytest.raises(ValueError, match=r"mask of \(4, 8\) for a weight of \(8, 8\)"):
        K24Linear(8, 8, pattern)


# The schedule.


def test_the_schedules_ends_middle_and_continuity():
    schedule = K24Schedule((1.0, 16.0), (5.0, 1.0, 0.1), phase_split=0.4)
    assert [schedule.kappa_at(p) for p in (0, 0.5, 1)] == pytest.approx([1, 4, 16])
    assert [schedule.tau_at(p) for p in (0, 0.2, 0.4, 0.7, 1)] == pytest.approx(
        [5, 5**0.5, 1, 0.1**0.5, 0.1]
    )
    assert schedule.tau_at(0.4 - 1e-9) == pytest.approx(schedule.tau_at(0.4 + 1e-9), rel=1e-6)
    taus = [schedule.tau_at(i / 100) for i in range(101)]
    assert taus == sorted(taus, reverse=True)


def test_the_state_follows_the_step_and_stays_at_its_end():
    state = ScheduleState()
    state.set_step(6, 10)
    assert (state.kappa, state.tau) == pytest.approx((16**0.6, 0.1**0.2))
    state.set_step(25, 10)
    assert (state.kappa, state.tau) == (16.0, 0.1)


@pytest.mark.parametrize(
    "given", [{"kappa": (0.0, 1.0)}, {"tau": (1.0, -1.0, 1.0)}, {"phase_split": 1.0}]
)
def test_impossible_schedules_are_refused(given):
    with pytest.raises(ValueError, match="expected"):
        K24Schedule(**given)
