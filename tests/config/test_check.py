"""Checks of settings made in Python, which no loading has looked at."""

import pytest

from tiny_onn.config.check import check_budget, check_schedule
from tiny_onn.config.schema import BudgetConfig, OptimConfig
from tiny_onn.errors import UserError


@pytest.mark.parametrize(
    "given",
    [{}, {"minutes": 0}, {"epochs": -1}, {"steps": 0}, {"minutes": 1, "steps": 2},
     {"minutes": float("nan")}, {"minutes": float("inf")}],
)  # fmt: skip
def test_anything_but_one_positive_budget_is_refused(given):
    with pytest.raises(UserError, match="budget"):
        check_budget(BudgetConfig(**given))


@pytest.mark.parametrize("given", [{"minutes": 0.5}, {"epochs": 0.25}, {"steps": 1}])
def test_one_positive_budget_is_accepted(given):
    check_budget(BudgetConfig(**given))


@pytest.mark.parametrize(
    "given",
    [
        {"warmup_share": 0.6, "decay_share": 0.6},
        {"decay_share": -0.1},
        {"warmup_share": 2},
    ],
)
def test_impossible_schedules_are_refused(given):
    with pytest.raises(UserError, match="optim"):
        check_schedule(OptimConfig(**given))
