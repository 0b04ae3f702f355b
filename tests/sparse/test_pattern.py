"""N:M patterns: the table, the groups along a dimension, what is refused."""

import math

import pytest
import torch

from tiny_onn.errors import UserError
from tiny_onn.sparse.pattern import NMPattern, patterns


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (4, 8)])
def test_table_has_every_pattern_once_in_lexicographic_order(n, m):
    table = patterns(n, m)
    assert table.dtype == torch.bool and table.shape == (math.comb(m, n), m)
    assert (table.sum(dim=1) == n).all()
    rows = [tuple(row.nonzero().flatten().tolist()) for row in table]
    assert rows == sorted(set(rows))


def test_the_six_patterns_of_two_in_four():
    rows = ["".join(str(int(bit)) for bit in row) for row in NMPattern().patterns()]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


def test_a_table_given_away_can_be_changed_without_harm():
    patterns(2, 4).zero_()
    assert patterns(2, 4).sum() == 12


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_groups_hold_consecutive_entries_of_the_dimension_and_go_back(dim):
    x = torch.arange(4 * 8 * 12).view(4, 8, 12)
    pattern = NMPattern(dim=dim)
    groups = pattern.group(x)
    assert groups.shape[-1] == 4
    step = x.stride(dim)
    assert (groups.diff(dim=-1) == step).all()
    assert torch.equal(pattern.ungroup(groups), x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 4), "0:4"),
        ((4, 4), "4:4"),
        ((5, 4), "5:4"),
        ((-1, 4), "-1:4"),
        ((2.0, 4), "whole"),
        ((True, 4), "whole"),
        ((2, 4, None), "whole"),
    ],
)
def test_impossible_patterns_are_refused(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        NMPattern(*arguments)
    assert "\n" not in str(caught.value)


def test_a_table_too_large_is_refused():
    with pytest.raises(UserError, match="601080390 patterns"):
        patterns(16, 32)


@pytest.mark.parametrize(
    ("shape", "dim", "words"),
    [
        ((3, 6), -1, "use 4 or 8"),
        ((3, 8), 0, "got 3 in .3, 8.; use 4 or 8"),
        ((8,), 1, "along dimension 1"),
        ((), -1, "along dimension -1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_would(shape, dim, words):
    with pytest.raises(UserError, match=words) as caught:
        NMPattern(dim=dim).check(torch.zeros(shape))
    assert "\n" not in str(caught.value)
