"""Voting: the rules, and ties that always fall the same way."""

import itertools
import math

import numpy as np
import pytest

from tiny_onn.inference.vote import Candidate, rank, vote


def candidate(cell, logprobs, views):
    return Candidate(np.full((1, 2), cell, dtype=np.uint8), tuple(logprobs), tuple(views))


def cells(candidates):
    return [int(c.grid[0, 0]) for c in candidates]


MANY_BUT_UNLIKELY = candidate(1, [-9.0, -9.0, -9.0], [2, 3, 4])
FEW_BUT_LIKELY = candidate(2, [-0.1, -0.3], [1, 5])
FEW_AND_EARLY = candidate(3, [-5.0, -5.0], [0, 6])
ALL = [MANY_BUT_UNLIKELY, FEW_BUT_LIKELY, FEW_AND_EARLY]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("count", [1, 3, 2]),
        ("count_then_likelihood", [1, 2, 3]),
        ("sum_prob", [2, 3, 1]),
    ],
)
def test_each_rule_ranks_by_its_own_measure_in_any_order_of_arrival(rule, expected):
    for order in itertools.permutations(ALL):
        assert cells(rank(order, rule)) == expected


def test_equal_counts_and_likelihoods_fall_to_the_earliest_view_then_to_the_cells():
    late = candidate(1, [-1.0], [7])
    early = candidate(5, [-1.0], [2])
    assert cells(rank([late, early], "count_then_likelihood")) == [5, 1]
    twin = candidate(4, [-1.0], [2])
    assert cells(rank([early, twin], "count_then_likelihood")) == [4, 5]


def test_two_attempts_are_always_different_grids():
    grids = vote([FEW_BUT_LIKELY, candidate(2, [-1.0], [9]), FEW_AND_EARLY], rule="count")
    assert [int(g[0, 0]) for g in grids] == [3, 2]


def test_fewer_candidates_than_attempts_give_fewer_grids():
    assert vote([]) == []
    assert len(vote([FEW_AND_EARLY])) == 1
    assert len(vote(ALL, k=2)) == 2


def test_candidate_measures():
    assert FEW_BUT_LIKELY.count == 2
    assert FEW_BUT_LIKELY.logprob_sum == pytest.approx(-0.4)
    assert FEW_BUT_LIKELY.logprob_mean == pytest.approx(-0.2)
    assert FEW_BUT_LIKELY.logprob_max == -0.1
    assert FEW_BUT_LIKELY.log_sum_prob == pytest.approx(math.log(math.exp(-0.1) + math.exp(-0.3)))
    assert candidate(1, [-2000.0, -2000.0], [0, 1]).log_sum_prob == pytest.approx(
        -2000 + math.log(2)
    )
