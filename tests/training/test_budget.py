import random

import pytest

from tiny_onn.config.schema import OptimConfig
from tiny_onn.training.budget import Budget, lr_scale


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_schedule_warms_up_stays_and_decays_linearly():
    optim = OptimConfig(warmup_share=0.1, decay_share=0.4, final_lr_share=0.2)
    shares = [0.0, 0.05, 0.1, 0.5, 0.6, 0.8, 1.0, 1.5]
    expected = [0.0, 0.5, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2]
    assert [lr_scale(s, optim) for s in shares] == pytest.approx(expected)


def test_schedule_without_warmup_and_decay_is_constant():
    optim = OptimConfig(warmup_share=0.0, decay_share=0.0)
    assert [lr_scale(s, optim) for s in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def run(minutes, step_seconds, startup, rng=None, spent=0.0):
    """Simulated run: elapsed at its end and the last step's schedule factor."""
    clock = Clock()
    budget = Budget(minutes=minutes, started=clock.now, spent=spent, clock=clock)
    clock.now += startup
    step, last = 0, None
    optim = OptimConfig(warmup_share=0.02, decay_share=0.3)
    while not budget.done(budget.elapsed(), step):
        budget.begin_step()
        last = lr_scale(budget.share(budget.elapsed(), step), optim)
        clock.now += step_seconds * (rng.uniform(0.7, 1.3) if rng else 1.0)
        budget.end_step()
        step += 1
        assert step < 10**6
    return budget.elapsed(), last


@pytest.mark.parametrize("step_seconds", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_minutes_run_ends_within_two_percent_with_the_decay_complete(step_seconds, seed):
    elapsed, last = run(1.0, step_seconds, startup=7.0, rng=random.Random(seed))
    assert elapsed == pytest.approx(60.0, rel=0.02)
    assert last < 1.3 * step_seconds / (0.3 * 60) + 1e-3  # within a step of the schedule's end


def test_a_resumed_minutes_run_keeps_what_is_left():
    elapsed, last = run(1.0, 0.1, startup=3.0, spent=45.0)
    assert elapsed == pytest.approx(60.0, rel=0.02)
    assert last < 0.02


def test_a_spent_budget_takes_no_further_step():
    clock = Clock()
    assert Budget(minutes=1.0, spent=60.0, clock=clock).done(60.0, 100)


def test_time_for_saving_is_kept_free_up_to_a_hundredth_of_the_budget():
    budget = Budget(minutes=10.0, clock=Clock())
    assert not budget.done(599.2, 1) and budget.done(599.4, 1)
    budget.reserve = 3.0
    assert not budget.done(596.2, 1) and budget.done(596.4, 1)
    budget.reserve = 100.0
    assert not budget.done(593.9, 1) and budget.done(594.1, 1)


def test_a_steps_budget_ignores_the_clock():
    clock = Clock()
    budget = Budget(steps=4, clock=clock)
    before = [budget.share(budget.elapsed(), s) for s in range(4)]
    clock.now += 1e6
    assert [budget.share(budget.elapsed(), s) for s in range(4)] == before
    assert before == [0.125, 0.375, 0.625, 0.875]
    assert [budget.done(0, s) for s in (3, 4)] == [False, True]


def test_a_slow_first_step_is_no_forecast():
    clock = Clock()
    budget = Budget(minutes=1.0, started=clock.now, clock=clock)
    for seconds in (40.0, 0.5):
        budget.begin_step()
        clock.now += seconds
        budget.end_step()
        assert not budget.done(budget.elapsed(), 1)
    assert budget.step_seconds == 0.5


def test_what_does_not_fit_before_the_end_has_no_time():
    budget = Budget(minutes=1.0, clock=Clock())
    assert budget.has_time_for(9.0, elapsed=50.0)
    assert not budget.has_time_for(9.6, elapsed=50.0)
    assert Budget(steps=3, clock=Clock()).has_time_for(1e9, elapsed=0.0)
