"""Nothing that is learnt from gives away an answer, and nothing is learnt twice."""

import numpy as np

from tiny_onn.arc.overlap import remove_overlaps
from tiny_onn.arc.task import Pair, Task, TrainingTask


def grid(number):
    return np.array([[number // 10, number % 10]], dtype=np.uint8)


def pair(first, second):
    return Pair(grid(first), grid(second))


def solve(name, demos, tests, source="job"):
    return Task(name, source, tuple(pair(*d) for d in demos), tuple(grid(t) for t in tests))


def train(name, demos, tests, source="books"):
    answers = tuple(pair(*t) for t in tests)
    inputs = tuple(answer.input for answer in answers)
    return TrainingTask(name, source, tuple(pair(*d) for d in demos), inputs, answers)


def outcome(tasks, protected=()):
    kept, excluded = remove_overlaps(tasks, protected)
    assert len(kept) + len(excluded) == len(tasks)
    return [task.id for task in kept], [(e.task, e.reason) for e in excluded]


def test_a_training_task_with_the_id_of_a_task_to_solve_goes_out():
    tasks = [train("x", [(1, 2)], [(3, 4)]), solve("x", [(5, 6)], [7])]
    kept, excluded = remove_overlaps(tasks)
    assert kept == [tasks[1]]
    assert [(e.task, e.source, e.reason) for e in excluded] == [
        ("x", "books", "same id as a task of job")
    ]


def test_a_training_task_that_holds_a_demonstration_to_solve_goes_out():
    for books in (train("y", [(5, 6)], [(3, 4)]), train("y", [(1, 2)], [(5, 6)])):
        kept, excluded = outcome([books, solve("x", [(5, 6)], [7])])
        assert kept == ["x"] and excluded == [("y", "shares a pair with a task of job")]


def test_a_training_task_that_answers_a_test_input_goes_out():
    for books in (train("y", [(7, 8)], [(3, 4)]), train("y", [(1, 2)], [(7, 8)])):
        kept, excluded = outcome([books, solve("x", [(5, 6)], [7])])
        assert kept == ["x"] and excluded == [("y", "shares a pair with a task of job")]


def test_a_shared_demonstration_input_with_another_output_is_no_overlap():
    kept, excluded = outcome([train("y", [(5, 9)], [(3, 4)]), solve("x", [(5, 6)], [7])])
    assert kept == ["y", "x"] and not excluded


def test_protected_tasks_guard_without_being_used():
    kept, excluded = outcome(
        [train("y", [(7, 8)], [(3, 4)]), train("z", [(1, 2)], [(3, 4)])],
        protected=[solve("x", [(5, 6)], [7], "exam")],
    )
    assert kept == ["z"] and excluded == [("y", "shares a pair with a task of exam")]


def test_the_first_of_two_tasks_with_one_id_stays():
    kept, excluded = outcome([solve("x", [(1, 2)], [3]), solve("x", [(5, 6)], [7], "late")])
    assert kept == ["x"] and excluded == [("x", "same id as a task of job")]
    tasks = [train("x", [(1, 2)], [(3, 4)]), train("x", [(5, 6)], [(7, 8)], "late")]
    kept, _ = remove_overlaps(tasks)
    assert kept == [tasks[0]]


def test_training_tasks_with_the_same_demonstrations_in_any_order_count_once():
    kept, excluded = outcome(
        [train("a", [(1, 2), (3, 4)], [(5, 6)]), train("b", [(3, 4), (1, 2)], [(7, 8)])]
    )
    assert kept == ["a"] and excluded == [("b", "same demonstrations as a task of books")]


def test_tasks_to_solve_are_all_kept_even_with_equal_demonstrations():
    kept, excluded = outcome([solve("a", [(1, 2)], [3]), solve("b", [(1, 2)], [4])])
    assert kept == ["a", "b"] and not excluded


def test_grids_of_other_shapes_with_the_same_cells_are_different():
    wide, tall = grid(12), grid(12).T
    books = TrainingTask("y", "b", (Pair(tall, tall),), (tall,), (Pair(tall, tall),))
    job = Task("x", "j", (Pair(wide, wide),), (wide,))
    kept, _ = remove_overlaps([books, job])
    assert [task.id for task in kept] == ["y", "x"]


def test_two_guarded_tasks_of_one_id_are_both_guarded_by_content():
    """ARC-AGI-1 and -2 share ids of evaluation tasks whose grids were revised."""
    tasks = [train("a", [(1, 2)], [(3, 4)]), solve("x", [(5, 6)], [7])]
    revised = [solve("x", [(1, 2)], [8], source="arc1:evaluation")]
    kept, excluded = outcome(tasks, revised)
    assert kept == ["x"]
    assert excluded == [("a", "shares a pair with a task of arc1:evaluation")]
