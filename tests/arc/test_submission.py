import json
import subprocess
import sys

import numpy as np
import pytest

from tiny_onn.arc.parse import grid_problem, read_json
from tiny_onn.arc.select import select_track
from tiny_onn.arc.sources import load_challenges
from tiny_onn.arc.submission import (
    build_submission,
    filler_grid,
    find_problems,
    plain_grid,
    validate_submission,
    write_submission,
)
from tiny_onn.arc.task import Pair, Task
from tiny_onn.errors import UserError


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


def task(task_id, *test_inputs):
    return Task(task_id, "test", (Pair(grid([1]), grid([2])),), test_inputs)


TWO = task("two", grid([1, 2]), grid([3], [4]))
ONE = task("one", grid([5]))


def test_every_test_input_gets_two_attempts_in_challenge_order():
    attempts = {
        "one": [[grid([7]), grid([8])]],
        "two": [[grid([1]), grid([2])], [grid([3]), grid([4])]],
    }
    submission, counts = build_submission([TWO, ONE], attempts)
    assert list(submission) == ["two", "one"]
    assert submission["two"] == [
        {"attempt_1": [[1]], "attempt_2": [[2]]},
        {"attempt_1": [[3]], "attempt_2": [[4]]},
    ]
    assert submission["one"] == [{"attempt_1": [[7]], "attempt_2": [[8]]}]
    assert (counts.num_tasks, counts.num_outputs, counts.num_attempts) == (2, 3, 6)
    assert counts.num_fallbacks == 0
    validate_submission(submission, [TWO, ONE])


def test_fallbacks_are_counted_by_reason_and_located():
    three = task("three", grid([0, 0]), grid([1, 1]), grid([2, 2]))
    attempts = {"three": [[], [grid([9]), grid([9])]]}
    submission, counts = build_submission([three, ONE], attempts)
    assert counts.by_reason == {
        "no valid grid": 2,
        "test input not predicted": 2,
        "task not predicted": 2,
        "only one distinct grid": 1,
    }
    assert counts.num_fallbacks == 7
    where = [(f.task, f.test, f.attempt) for f in counts.fallbacks]
    assert where[:3] == [("three", 0, 0), ("three", 0, 1), ("three", 1, 1)]
    assert submission["three"][0] == {"attempt_1": [[0, 0]], "attempt_2": [[1, 1]]}
    assert submission["three"][1] == {"attempt_1": [[9]], "attempt_2": [[0, 0]]}
    assert "7 fallbacks" in counts.render() and "no valid grid 2" in counts.render()
    validate_submission(submission, [three, ONE])


def test_a_missing_first_test_does_not_shift_the_second_answer():
    submission, _ = build_submission([TWO], {"two": [[], [grid([6]), grid([7])]]})
    assert submission["two"][1] == {"attempt_1": [[6]], "attempt_2": [[7]]}


def test_a_filler_differs_from_the_attempt_it_stands_beside():
    assert filler_grid(grid([5, 5]), []) == [[0, 0]]
    assert filler_grid(grid([5, 5]), [[[0, 0]]]) == [[1, 1]]


def test_a_repeated_grid_is_not_spent_on_the_second_attempt():
    submission, counts = build_submission([ONE], {"one": [[grid([7]), grid([7]), grid([8])]]})
    assert submission["one"] == [{"attempt_1": [[7]], "attempt_2": [[8]]}]
    assert counts.num_fallbacks == 0


def test_numpy_integers_become_plain_ints():
    for value in (np.array([[1, 2]], dtype=np.int64), [[np.uint8(1), np.int32(2)]]):
        plain = plain_grid(value)
        assert plain == [[1, 2]]
        assert all(type(cell) is int for cell in plain[0])
        json.dumps(plain)


@pytest.mark.parametrize(
    "bad",
    [
        np.array([[1.0]]),
        np.array([[True]]),
        np.array([1, 2]),
        np.zeros((31, 1), dtype=np.uint8),
        [[1, 2], [3]],
        [[10]],
        [[-1]],
        [["1"]],
        [[True]],
        [[np.float32(1)]],
        [[]],
        [],
    ],
    ids=str,
)
def test_building_from_something_that_is_no_grid_names_the_place(bad):
    with pytest.raises(UserError, match=r"task 'one' test 0 attempt 2"):
        build_submission([ONE], {"one": [[grid([7]), bad]]})


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([[1, 2], [3]], "row 1: got 1 cells, expected 2"),
        ([[1], []], "row 1"),
        ([[0] * 31], "got 31 cells"),
        ([[0]] * 31, "got 31 rows"),
        ([[1.0]], "1.0 (float)"),
        ([["1"]], "'1' (str)"),
        ([[True]], "True (bool)"),
        ([[np.uint8(1)]], "uint8"),
        ([[10]], "expected an integer 0 to 9"),
        (([1],), "(tuple)"),
        (None, "None"),
        ([], "non-empty list of rows"),
    ],
)
def test_strict_grid_check_says_what_is_wrong(bad, said):
    assert said in grid_problem(bad)


def test_strict_grid_check_accepts_the_extremes():
    assert grid_problem([[0]]) is None
    assert grid_problem([[9] * 30 for _ in range(30)]) is None


def test_attempts_for_a_task_that_is_no_challenge_are_refused():
    with pytest.raises(UserError, match="'stranger'"):
        build_submission([ONE], {"stranger": [[grid([1])]]})


def test_attempts_for_more_tests_than_the_challenge_has_are_refused():
    with pytest.raises(UserError, match="task 'one': got attempts for 2 test inputs, expected 1"):
        build_submission([ONE], {"one": [[grid([1])], [grid([2])]]})


def test_a_challenge_given_twice_is_refused():
    with pytest.raises(UserError, match="'one' twice"):
        build_submission([ONE, ONE], {})


GOOD = {
    "two": [{"attempt_1": [[1]], "attempt_2": [[2]]}, {"attempt_1": [[1]], "attempt_2": [[2]]}],
    "one": [{"attempt_1": [[1]], "attempt_2": [[2]]}],
}


def broken(change):
    submission = json.loads(json.dumps(GOOD))
    change(submission)
    return submission


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("two"), "task 'two': missing"),
        (lambda s: s["two"].pop(), "task 'two': got 1 answers, expected 2"),
        (lambda s: s["one"].append(s["one"][0]), "task 'one': got 2 answers, expected 1"),
        (lambda s: s["two"][1].pop("attempt_2"), "task 'two' test 1 attempt_2: missing"),
        (lambda s: s["two"][1].update(attempt_2=[[1, 2], [3]]), "task 'two' test 1 attempt_2: row"),
        (lambda s: s["one"][0].update(attempt_1=[["3"]]), "task 'one' test 0 attempt_1: row 0"),
        (lambda s: s["one"][0].update(attempt_3=[[3]]), "task 'one' test 0: got key 'attempt_3'"),
        (lambda s: s.update(x=[]), "task 'x': not among the challenges"),
        (lambda s: s.update(one=5), "task 'one': got 5 (int)"),
        (lambda s: s["two"].__setitem__(0, [[1]]), "task 'two' test 0: got [[1]] (list)"),
    ],
)
def test_validator_names_task_test_and_attempt(change, said):
    problems = find_problems(broken(change), [TWO, ONE])
    assert len(problems) == 1
    assert said in problems[0]
    with pytest.raises(UserError):
        validate_submission(broken(change), [TWO, ONE])


def test_validator_counts_the_further_problems():
    with pytest.raises(UserError, match=r"task 'two': missing.*and 1 more problems"):
        validate_submission({}, [TWO, ONE])


def test_written_file_reads_back_equal_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "submission.json"
    path.write_text("old")
    write_submission(path, GOOD)
    assert read_json(path, "a submission") == GOOD
    assert [p.name for p in tmp_path.iterdir()] == ["submission.json"]


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "submission.json"
    write_submission(path, GOOD)
    with pytest.raises(TypeError):
        write_submission(path, {"one": [{"attempt_1": [[np.uint8(1)]]}]})
    assert read_json(path, "a submission") == GOOD


def test_writing_where_it_cannot_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        write_submission(tmp_path / "absent" / "submission.json", GOOD)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": [1', "not JSON"),
        (b'{"a": [], "a": []}', "key 'a' twice"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"", "not JSON"),
    ],
)
def test_torn_or_ambiguous_json_is_one_line(tmp_path, text, said):
    path = tmp_path / "s.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=said) as caught:
        read_json(path, "a submission")
    assert "\n" not in str(caught.value)


def run_validator(*args):
    return subprocess.run(
        [sys.executable, "-m", "tiny_onn.arc.submission", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_exits_0_on_a_valid_file_and_2_with_one_line_otherwise(tmp_path):
    challenges = tmp_path / "challenges.json"
    pair = {"input": [[1]], "output": [[2]]}
    challenges.write_text(
        json.dumps(
            {
                "two": {"train": [pair], "test": [{"input": [[1, 2]]}, {"input": [[3]]}]},
                "one": {"train": [pair], "test": [{"input": [[5]]}]},
            }
        )
    )
    path = tmp_path / "submission.json"
    write_submission(path, GOOD)
    done = run_validator(path, challenges)
    assert (done.returncode, done.stderr) == (0, "")
    assert "valid: 2 tasks, 3 outputs, 6 attempts" in done.stdout
    write_submission(path, broken(lambda s: s["two"][1].pop("attempt_1")))
    done = run_validator(path, challenges)
    assert done.returncode == 2
    assert done.stderr.startswith("error: task 'two' test 1 attempt_1: missing")
    assert done.stderr.count("\n") == 1


def test_command_validates_a_submission_of_track_nano_alone(tmp_path):
    nano = select_track(load_challenges("arc1:evaluation"), "nano")
    submission, _ = build_submission(nano, {})
    (tmp_path / "s.json").write_text(json.dumps(submission))
    assert run_validator(tmp_path / "s.json", "arc1:evaluation").returncode == 2
    done = run_validator(tmp_path / "s.json", "arc1:evaluation", "--track", "nano")
    assert done.stdout.startswith("valid: 72 tasks, 82 outputs")
    score = [sys.executable, "-m", "tiny_onn.arc.score", str(tmp_path / "s.json")]
    scored = subprocess.run(
        [*score, "arc1:evaluation", "--track", "nano"], capture_output=True, text=True, check=True
    )
    assert "72 tasks, 82 test outputs; missing: 0 tasks" in scored.stdout
