"""Overlaps between tasks: by id, and by content under another id."""

from __future__ import annotations

from collections.abc import Sequence

from tiny_onn.arc.leak_report import Exclusion
from tiny_onn.arc.task import Grid, Pair, Task, TrainingTask


def _grid_key(grid: Grid) -> tuple[tuple[int, ...], bytes]:
    return grid.shape, grid.tobytes()


def _pair_key(pair: Pair) -> tuple:
    return _grid_key(pair.input), _grid_key(pair.output)


def remove_overlaps(
    tasks: Sequence[Task], protected: Sequence[Task] = ()
) -> tuple[list[Task], list[Exclusion]]:
    """Keep each task once, and none that could give away an answer.

    Tasks to solve (those without answers) come before training tasks: a training task goes out
    when it has the id of one of them, a demonstration of one of them, or a test input of one of
    them among its inputs. Of two tasks with one id, and of two training tasks with the same
    demonstrations, the first stays. ``protected`` tasks are guarded like those to solve, without
    being used. The order of ``tasks`` is kept.
    """
    solve = [task for task in tasks if not isinstance(task, TrainingTask)]
    guards = [*protected, *solve]  # two of them may share an id and differ in content
    guarded = {task.id: task.source for task in guards}
    demo_of = {_pair_key(pair): t.source for t in guards for pair in t.demos}
    test_of = {_grid_key(grid): t.source for t in guards for grid in t.test_inputs}
    seen_ids: dict[str, str] = {}
    seen_demos: dict[frozenset, str] = {}
    kept, excluded = [], []
    for task in tasks:
        training = isinstance(task, TrainingTask)
        reason = None
        content = frozenset(_pair_key(pair) for pair in task.demos)
        if training and task.id in guarded:
            reason = f"same id as a task of {guarded[task.id]}"
        elif training and (other := _meets(task, demo_of, test_of)):
            reason = f"shares a pair with a task of {other}"
        elif task.id in seen_ids:
            reason = f"same id as a task of {seen_ids[task.id]}"
        elif training and content in seen_demos:
            reason = f"same demonstrations as a task of {seen_demos[content]}"
        if reason is None:
            seen_ids[task.id] = task.source
            if training:
                seen_demos[content] = task.source
            kept.append(task)
        else:
            excluded.append(Exclusion(task.id, task.source, reason))
    return kept, excluded


def _meets(task: Task, demo_of: dict, test_of: dict) -> str | None:
    assert isinstance(task, TrainingTask)
    for pair in task.demos + task.tests:
        other = demo_of.get(_pair_key(pair)) or test_of.get(_grid_key(pair.input))
        if other:
            return other
    return None
