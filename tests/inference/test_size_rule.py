"""The size rule: what demonstrations dictate, and when they dictate nothing."""

import numpy as np
import pytest

from tiny_onn.arc.sources import load_packaged
from tiny_onn.arc.task import TrainingTask
from tiny_onn.arc.view import View, apply
from tiny_onn.inference.size_rule import output_size, output_sizes, size_under


@pytest.mark.parametrize(
    ("sizes", "test", "expected"),
    [
        ([((2, 3), (2, 3)), ((4, 4), (4, 4))], (7, 5), (7, 5)),
        ([((2, 3), (1, 6)), ((4, 4), (1, 6))], (7, 5), (1, 6)),
        ([((2, 3), (4, 6)), ((4, 4), (8, 8))], (7, 5), (14, 10)),
        ([((6, 4), (2, 4)), ((9, 5), (3, 5))], (12, 7), (4, 7)),
        ([((2, 3), (6, 3)), ((4, 4), (12, 4))], (7, 5), (21, 5)),
        ([((4, 2), (2, 6)), ((8, 3), (4, 9))], (6, 5), (3, 15)),
    ],
    ids=["same", "constant", "times", "fraction", "one axis", "up and down"],
)
def test_a_rule_that_all_demonstrations_obey_fixes_the_size(make_task, sizes, test, expected):
    assert output_sizes(make_task(sizes, [test])) == [expected]


@pytest.mark.parametrize(
    ("sizes", "test"),
    [
        ([((2, 3), (2, 3)), ((4, 4), (4, 5))], (7, 5)),
        ([((2, 3), (4, 6)), ((4, 4), (12, 12))], (7, 5)),
        ([((2, 2), (3, 3)), ((4, 4), (6, 6))], (8, 8)),
        ([((6, 4), (2, 4)), ((9, 5), (3, 5))], (10, 7)),
        ([((2, 3), (8, 12)), ((4, 4), (16, 16))], (8, 5)),
        ([((2, 3), (5, 6))], (7, 5)),
        ([], (7, 5)),
    ],
    ids=[
        "one disagrees",
        "ratios differ",
        "no integer ratio",
        "test does not divide",
        "over 30",
        "one demonstration",
        "none",
    ],
)
def test_otherwise_no_size_is_fixed(make_task, sizes, test):
    assert output_sizes(make_task(sizes, [test])) == [None]


def test_every_test_input_has_its_own_size(make_task):
    task = make_task([((6, 6), (3, 3)), ((4, 4), (2, 2))], [(8, 8), (5, 8), (2, 2)])
    assert output_sizes(task) == [(4, 4), None, (1, 1)]


@pytest.mark.parametrize("dihedral", range(8))
def test_the_size_turns_with_the_view(dihedral):
    view = View(dihedral)
    shown = apply(view, np.zeros((3, 8), dtype=np.uint8)).shape
    assert size_under(view, (3, 8)) == shown
    assert size_under(view, None) is None


def test_the_rule_is_right_wherever_it_speaks_on_training_tasks_but_once():
    tasks = [t for t in load_packaged("arc1", ["training"]) if isinstance(t, TrainingTask)]
    verdicts = [
        output_size(task.demos, pair.input) == pair.output.shape
        for task in tasks
        for pair in task.tests
        if output_size(task.demos, pair.input) is not None
    ]
    assert (len(verdicts), verdicts.count(False)) == (361, 1)
