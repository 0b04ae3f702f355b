"""Views invert exactly, keep fixed colours, and never show one content twice."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiny_onn.arc.task import Pair, Task
from tiny_onn.arc.view import (
    IDENTITY,
    NUM_DIHEDRALS,
    View,
    ViewSampler,
    ViewSpace,
    apply,
    apply_pair,
    fixed_colors,
    invert,
    sample_views,
    swaps_sides,
    turn,
    unturn,
)

SIDES = st.integers(1, 6)


def grids(max_color=9):
    return hnp.arrays(np.uint8, st.tuples(SIDES, SIDES), elements=st.integers(0, max_color))


VIEWS = st.builds(
    lambda dihedral, colors: View(dihedral, (0, *colors)),
    st.integers(0, 7),
    st.permutations(range(1, 10)),
)
PAIRS = st.builds(Pair, grids(4), grids(4))
TASKS = st.builds(
    lambda demos, inputs: Task("t", "s", tuple(demos), tuple(inputs)),
    st.lists(PAIRS, min_size=1, max_size=3),
    st.lists(grids(4), min_size=1, max_size=2),
)


def content(view, shown):
    turned = [apply(view, grid) for grid in shown]
    return tuple((grid.shape, grid.tobytes()) for grid in turned)


def of_task(task):
    return [g for pair in task.demos for g in (pair.input, pair.output)] + list(task.test_inputs)


def all_contents(shown, fixed):
    """Brute force over every view: feasible when few colours may move."""
    movable = [c for c in range(10) if c not in fixed and c != 0]
    contents = set()
    for dihedral in range(8):
        for targets in itertools.permutations(movable):
            colors = list(range(10))
            for color, target in zip(movable, targets, strict=True):
                colors[color] = target
            contents.add(content(View(dihedral, tuple(colors)), shown))
    return contents


@given(VIEWS, grids())
def test_invert_undoes_apply_and_the_reverse(view, grid):
    assert np.array_equal(invert(view, apply(view, grid)), grid)
    assert np.array_equal(apply(view, invert(view, grid)), grid)
    assert apply(view, grid).dtype == invert(view, grid).dtype == np.uint8


@given(VIEWS, PAIRS)
def test_a_pair_is_shown_under_one_view(view, pair):
    shown = apply_pair(view, pair)
    assert np.array_equal(shown.input, apply(view, pair.input))
    assert np.array_equal(shown.output, apply(view, pair.output))


@pytest.mark.parametrize("dihedral", range(NUM_DIHEDRALS))
def test_turns_are_transposition_then_quarter_turns(dihedral):
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    expected = np.rot90(grid.T if dihedral >= 4 else grid, dihedral % 4)
    assert np.array_equal(turn(dihedral, grid), expected)
    assert np.array_equal(unturn(dihedral, expected), grid)
    assert swaps_sides(dihedral) == (expected.shape == (3, 2))


def test_the_eight_turns_differ():
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert len({content(View(d), [grid]) for d in range(8)}) == 8


@pytest.mark.parametrize(
    "colors", [(1, 0, *range(2, 10)), (0, 1, 1, *range(3, 10)), (0, 2, 3, *range(3, 10))]
)
def test_a_view_that_is_no_bijection_or_moves_black_is_refused(colors):
    with pytest.raises(AssertionError):
        View(0, colors)


def test_colours_of_outputs_alone_are_fixed():
    one = Pair(np.array([[1, 2]]), np.array([[2, 5]]))
    two = Pair(np.array([[1, 3]]), np.array([[6, 6]]))
    task = Task("t", "s", (one, two), (np.array([[6, 7]]),))
    assert fixed_colors(task) == {0, 5}


@settings(max_examples=30, deadline=None)
@given(st.lists(grids(4), min_size=1, max_size=2), st.sets(st.integers(1, 9), min_size=5))
def test_the_space_holds_each_content_exactly_once(shown, fixed):
    fixed = frozenset(fixed | {0})
    space = ViewSpace(shown, fixed)
    numbered = [content(space.view(i, pick=i), shown) for i in range(space.size)]
    assert len(set(numbered)) == space.size
    assert set(numbered) == all_contents(shown, fixed)


@given(st.lists(grids(), min_size=1, max_size=3), st.sets(st.integers(1, 9)), st.integers(0, 99))
def test_numbered_views_keep_fixed_colours_and_equivalent_picks_agree(shown, fixed, number):
    space = ViewSpace(shown, frozenset(fixed))
    index = number * 7919 % space.size
    picks = [space.view(index, pick) for pick in range(8)]
    assert len({content(view, shown) for view in picks}) == 1
    for pick, view in enumerate(picks):
        assert all(view.colors[c] == c for c in fixed | {0})
        assert space.dihedrals(np.array([index]), np.array([pick])).tolist() == [view.dihedral]
    assert content(space.view(space.identity_index), shown) == content(IDENTITY, shown)


@given(st.lists(grids(), min_size=1, max_size=2))
def test_dihedral_mode_leaves_colours_alone_and_none_leaves_all(shown):
    space = ViewSpace(shown, frozenset(), "dihedral")
    views = [space.view(i) for i in range(space.size)]
    assert all(view.colors == tuple(range(10)) for view in views)
    distinct = {content(View(d), shown) for d in range(8)}
    assert {content(view, shown) for view in views} == distinct and space.size == len(distinct)
    only = ViewSpace(shown, frozenset(), "none")
    assert [only.view(i) for i in range(only.size)] == [IDENTITY]


@given(TASKS, st.integers(1, 40), st.integers(0, 5))
def test_sampled_views_are_distinct_and_start_with_the_identity(task, count, seed):
    views = sample_views(task, count, np.random.default_rng(seed))
    shown = of_task(task)
    space = ViewSpace(shown, fixed_colors(task))
    assert views[0] == IDENTITY
    assert len(views) == min(count, space.size)
    assert len({content(view, shown) for view in views}) == len(views)
    for view in views:
        assert all(view.colors[c] == c for c in fixed_colors(task))
    assert views == sample_views(task, count, np.random.default_rng(seed))


@pytest.mark.parametrize("colors", [9, 2])  # 9: turns equal recolourings; 2: they do not
def test_sixteen_views_show_every_orientation_about_twice(colors):
    cells = np.arange(1, 10, dtype=np.uint8).reshape(3, 3)
    if colors == 2:
        cells = np.array([[1, 1, 0], [2, 0, 0], [0, 0, 0]], dtype=np.uint8)
    task = Task("t", "s", (Pair(cells, cells),), (cells,))
    views = sample_views(task, 16, np.random.default_rng(0))
    counts = np.bincount([view.dihedral for view in views], minlength=8)
    assert counts.min() >= 1 and counts.max() <= 3 and counts.sum() == 16


def test_a_blank_task_has_one_view():
    blank = np.zeros((3, 3), dtype=np.uint8)
    task = Task("t", "s", (Pair(blank, blank),), (blank,))
    assert sample_views(task, 10, np.random.default_rng(0)) == [IDENTITY]


def sampler(pair, seed=0, max_views=1000):
    task = Task("t", "s", (pair,), ())
    shown = [([pair], fixed_colors(task), [pair.input])] * 2
    return ViewSampler(shown, seed, "all", max_views)


@settings(max_examples=30, deadline=None)
@given(PAIRS, st.integers(0, 3))
def test_an_example_sees_no_content_twice_before_it_has_seen_all(pair, seed):
    views = sampler(pair, seed)
    shown = [pair.input, pair.output]
    cycle = min(1000, ViewSpace(shown, fixed_colors(Task("t", "s", (pair,), ()))).size)
    epochs = min(cycle, 200)
    seen = [content(views.view(1, epoch), shown) for epoch in range(epochs)]
    assert len(set(seen)) == epochs
    assert views.view(1, 3 + cycle) == views.view(1, 3)
    assert all(views.dihedrals(e)[1] == views.view(1, e).dihedral for e in range(epochs))


def test_the_sampler_is_a_function_of_seed_example_and_epoch():
    cells = np.arange(9, dtype=np.uint8).reshape(3, 3)
    pair = Pair(cells, cells)
    first, again, other = sampler(pair), sampler(pair), sampler(pair, seed=1)
    late = first.view(0, 500)
    assert [again.view(0, e) for e in (500, 2, 0)] == [late, first.view(0, 2), first.view(0, 0)]
    assert [first.view(0, e) for e in range(9)] != [other.view(0, e) for e in range(9)]
    assert [first.view(0, e) for e in range(9)] != [first.view(1, e) for e in range(9)]


def test_a_new_colour_of_a_training_answer_is_fixed():
    test = Pair(np.array([[1]], dtype=np.uint8), np.array([[8]], dtype=np.uint8))
    views = ViewSampler([([test], frozenset({0}), [test.input])], 0)
    assert {views.view(0, epoch).colors[8] for epoch in range(20)} == {8}
    assert len({views.view(0, epoch).colors[1] for epoch in range(20)}) == 8
