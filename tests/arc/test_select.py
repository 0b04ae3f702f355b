"""Track nano and files of ids choose the right tasks."""

import numpy as np
import pytest

from tiny_onn.arc.select import in_nano_track, official_nano_ids, read_ids, select_ids, select_track
from tiny_onn.arc.sources import load_challenges, load_packaged
from tiny_onn.arc.task import Pair, Task, TrainingTask
from tiny_onn.arc.tokens import longest_orientation
from tiny_onn.errors import UserError


def test_track_nano_of_arc1_has_147_and_72_tasks():
    assert {name: len(ids) for name, ids in official_nano_ids().items()} == {
        "arc1:training": 147,
        "arc1:evaluation": 72,
    }
    evaluation = select_track(load_challenges("arc1:evaluation"), "nano")
    assert len(evaluation) == 72
    assert sum(len(task.test_inputs) for task in evaluation) == 82


def test_the_official_training_list_is_what_measuring_gives():
    tasks = load_packaged("arc1", ("training",))
    measured = {
        task.id
        for task in tasks
        if all(longest_orientation(pair) <= 192 for pair in task.demos + task.tests)
    }
    assert measured == official_nano_ids()["arc1:training"]


def test_every_visible_evaluation_pair_of_the_list_is_short():
    for task in select_track(load_challenges("arc1:evaluation"), "nano"):
        assert all(longest_orientation(pair) <= 192 for pair in task.demos)


def blank(height, width):
    return np.zeros((height, width), dtype=np.uint8)


def pair(height, width):
    return Pair(blank(height, width), blank(1, 1))


def test_elsewhere_the_longer_orientation_of_every_known_pair_is_measured():
    fits, long_when_turned, small = pair(10, 17), pair(9, 19), pair(2, 2)
    assert (longest_orientation(fits), longest_orientation(long_when_turned)) == (192, 195)
    assert in_nano_track(TrainingTask("t", "s", (fits,), (), (fits,)))
    assert in_nano_track(Task("t", "s", (fits,), (fits.input,)))
    assert not in_nano_track(Task("t", "s", (small, long_when_turned), ()))
    assert not in_nano_track(TrainingTask("t", "s", (small,), (), (long_when_turned,)))
    assert not in_nano_track(Task("t", "s", (small,), (long_when_turned.input,)))


def tasks(*names):
    return [Task(name, "s", (pair(1, 1),), (blank(1, 1),)) for name in names]


def test_ids_choose_tasks_in_their_own_order(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("# chosen\ncc\n\n  aa \n")
    assert read_ids(path) == ["cc", "aa"]
    assert [task.id for task in select_ids(tasks("aa", "bb", "cc"), path)] == ["aa", "cc"]


def test_an_unknown_id_is_answered_with_the_nearest(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("0a1b2c3e\nzz\n")
    with pytest.raises(UserError, match=r"2 unknown ids.*'0a1b2c3e'.*did you mean '0a1b2c3d'\?"):
        select_ids(tasks("ffffffff", "0a1b2c3d"), path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "no task ids"), ("# x\n", "no task ids"), ("a\nb\na\n", "'a' twice")],
)
def test_bad_files_of_ids_are_refused(tmp_path, text, complaint):
    path = tmp_path / "ids.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_ids(path)


def test_a_missing_file_of_ids_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt.*data\.ids"):
        read_ids(tmp_path / "none.txt")
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        read_ids(tmp_path / "bytes")
