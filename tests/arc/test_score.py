import json
import subprocess
import sys

import numpy as np
import pytest

from tiny_onn.arc.score import load_solutions, score_submission
from tiny_onn.errors import UserError


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


def answer(first, second):
    return {"attempt_1": first, "attempt_2": second}


A, B, C, WRONG = [[1, 2]], [[3], [4]], [[5]], [[0]]
SOLUTIONS = {
    "three": (grid([1, 2]), grid([3], [4]), grid([5])),
    "one": (grid([5]),),
    "two": (grid([1, 2]), grid([5])),
    "absent": (grid([7]),),
}


def test_three_rules_agree_with_the_hand_computed_oracle():
    submission = {
        # pass@1: 1 of 3; pass@2: 2 of 3
        "three": [answer(A, WRONG), answer(WRONG, B), answer(WRONG, WRONG)],
        # pass@1: 0 of 1; pass@2: 1 of 1
        "one": [answer(WRONG, C)],
        # pass@1 and pass@2: 2 of 2
        "two": [answer(A, WRONG), answer(C, WRONG)],
        # "absent" is not there: 0 of 1
    }
    report = score_submission(submission, SOLUTIONS)
    assert report.num_tasks == 4
    assert report.num_outputs == 7
    assert report.task_mean_pass1 == pytest.approx((1 / 3 + 0 + 1 + 0) / 4)
    assert report.task_mean_pass2 == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    assert report.micro_pass1 == pytest.approx(3 / 7)
    assert report.micro_pass2 == pytest.approx(5 / 7)
    assert report.strict_pass1 == pytest.approx(1 / 4)
    assert report.strict_pass2 == pytest.approx(2 / 4)
    assert (report.outputs_right_pass1, report.outputs_right_pass2) == (3, 5)
    assert (report.tasks_solved_pass1, report.tasks_solved_pass2) == (1, 2)
    assert (report.missing_tasks, report.missing_outputs, report.missing_attempts) == (1, 1, 2)
    by_id = {task.id: task for task in report.per_task}
    assert by_id["three"].pass1 == (True, False, False)
    assert by_id["three"].pass2 == (True, True, False)
    assert by_id["absent"].pass2 == (False,)


def test_the_mean_over_tasks_and_over_outputs_differ():
    submission = {
        "three": [answer(WRONG, WRONG)] * 3,
        "one": [answer(C, WRONG)],
        "two": [answer(WRONG, WRONG)] * 2,
    }
    report = score_submission(submission, SOLUTIONS)
    assert report.task_mean_pass1 == pytest.approx(1 / 4)
    assert report.micro_pass1 == pytest.approx(1 / 7)


def test_swapped_test_answers_are_wrong():
    solutions = {"two": (grid([1, 2]), grid([5]))}
    right = {"two": [answer(A, WRONG), answer(C, WRONG)]}
    swapped = {"two": [answer(C, WRONG), answer(A, WRONG)]}
    assert score_submission(right, solutions).micro_pass2 == 1
    assert score_submission(swapped, solutions).micro_pass2 == 0


def test_omitting_tasks_does_not_raise_the_score():
    report = score_submission({"one": [answer(C, C)]}, SOLUTIONS)
    assert report.task_mean_pass2 == pytest.approx(1 / 4)
    assert report.micro_pass2 == pytest.approx(1 / 7)
    assert (report.missing_tasks, report.missing_outputs) == (3, 6)


def test_omitting_a_test_counts_it_as_wrong():
    report = score_submission({"two": [answer(A, A)]}, {"two": SOLUTIONS["two"]})
    assert report.task_mean_pass2 == pytest.approx(1 / 2)
    assert (report.missing_tasks, report.missing_outputs, report.missing_attempts) == (0, 1, 2)


def test_an_absent_attempt_is_wrong_and_counted():
    report = score_submission({"one": [{"attempt_2": C}]}, {"one": SOLUTIONS["one"]})
    assert (report.micro_pass1, report.micro_pass2) == (0, 1)
    assert report.missing_attempts == 1


def test_shape_counts_not_only_cells():
    solutions = {"x": (grid([1, 1]),)}
    for wrong in ([[1]], [[1], [1]], [[1, 1, 1]], [[1, 1], [1, 1]]):
        assert score_submission({"x": [answer(wrong, wrong)]}, solutions).micro_pass2 == 0


@pytest.mark.parametrize(
    "bad", [[["5"]], [[5.0]], [[np.uint8(5)]], ((5,),), [[5], [5, 5]], None, [[True]], [5]]
)
def test_a_grid_that_breaks_the_schema_is_wrong_and_counted(bad):
    report = score_submission({"one": [answer(bad, WRONG)]}, {"one": SOLUTIONS["one"]})
    assert report.micro_pass2 == 0
    assert report.malformed_attempts == 1


def test_true_is_not_taken_for_one():
    report = score_submission({"x": [answer([[True]], [[1.0]])]}, {"x": (grid([1]),)})
    assert (report.micro_pass2, report.malformed_attempts) == (0, 2)


def test_more_answers_than_tests_are_refused():
    with pytest.raises(UserError, match="task 'one': got 2 answers, expected a list of 1"):
        score_submission({"one": [answer(C, C)] * 2}, SOLUTIONS)


def test_a_submission_that_is_none_is_refused():
    with pytest.raises(UserError, match="got a submission of type list"):
        score_submission([answer(C, C)], SOLUTIONS)
    with pytest.raises(UserError, match="task 'one' test 0: got list"):
        score_submission({"one": [[[5]]]}, SOLUTIONS)


def test_ids_restrict_the_denominator():
    submission = {"one": [answer(C, C)], "two": [answer(A, A), answer(WRONG, WRONG)]}
    report = score_submission(submission, SOLUTIONS, ids={"one", "unknown"})
    assert (report.num_tasks, report.num_outputs, report.task_mean_pass2) == (1, 1, 1.0)
    assert (report.tasks_not_scored, report.ids_without_solution) == (1, 1)
    with pytest.raises(UserError, match="no task to score"):
        score_submission(submission, SOLUTIONS, ids={"unknown"})


def test_report_table_holds_all_six_figures_and_the_missing():
    submission = {
        "three": [answer(A, WRONG), answer(WRONG, B), answer(WRONG, WRONG)],
        "one": [answer(WRONG, C)],
        "two": [answer(A, WRONG), answer(C, WRONG)],
    }
    report = score_submission(submission, SOLUTIONS)
    table = report.render()
    rows = {line[:10].strip(): line for line in table.splitlines()}
    assert "33.33%" in rows["task mean"] and "66.67%" in rows["task mean"]
    assert "42.86%" in rows["per output"] and "71.43%" in rows["per output"]
    assert "(3/7)" in rows["per output"] and "(5/7)" in rows["per output"]
    assert "25.00%" in rows["strict (al"] and "50.00%" in rows["strict (al"]
    assert "missing: 1 tasks" in table
    assert json.loads(json.dumps(report.to_dict()))["micro_pass2"] == report.micro_pass2


def test_kaggle_solutions_are_loaded(tmp_path):
    path = tmp_path / "solutions.json"
    path.write_text(json.dumps({"a": [[[1, 2]], [[3]]], "b": [[[4]]]}))
    solutions = load_solutions(path)
    assert [g.tolist() for g in solutions["a"]] == [[[1, 2]], [[3]]]
    assert solutions["b"][0].dtype == np.uint8


def test_arc_format_file_and_folder_are_loaded(tmp_path):
    pair = {"input": [[1]], "output": [[2]]}
    (tmp_path / "aa.json").write_text(json.dumps({"train": [pair], "test": [pair]}))
    joined = {"bb": {"train": [pair], "test": [pair, {"input": [[1]], "output": [[9]]}]}}
    (tmp_path / "more.json").write_text(json.dumps(joined))
    assert [g.tolist() for g in load_solutions(tmp_path / "aa.json")["aa"]] == [[[2]]]
    folder = load_solutions(tmp_path)
    assert {k: [g.tolist() for g in v] for k, v in folder.items()} == {
        "aa": [[[2]]],
        "bb": [[[2]], [[9]]],
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": {"train": [], "test": [{"input": [[1]]}]}}, "challenges file"),
        ({"a": [[[1, 2], [3]]]}, "task 'a' test 0: row 1"),
        ({"a": []}, "task 'a'"),
        ({"a": 3}, "task 'a'"),
        ([], "no JSON object"),
        ({}, "no JSON object"),
    ],
)
def test_what_are_no_solutions_is_a_user_error(tmp_path, content, said):
    path = tmp_path / "solutions.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        load_solutions(path)


def test_unknown_solutions_name_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="arc1:evaluation"):
        load_solutions("arc9:evaluation")
    with pytest.raises(UserError, match="without any"):
        load_solutions(tmp_path)


@pytest.mark.parametrize(
    ("name", "tasks", "outputs"),
    [("arc1:evaluation", 400, 419), ("arc1:training", 400, 416), ("arc2:evaluation", 120, 167)],
)
def test_packaged_solutions_have_the_published_sizes(name, tasks, outputs):
    solutions = load_solutions(name)
    assert len(solutions) == tasks
    assert sum(map(len, solutions.values())) == outputs


def test_the_solutions_submitted_as_answers_score_all_and_copies_of_zero_none():
    solutions = load_solutions("arc1:evaluation")
    perfect = {k: [answer(g.tolist(), [[0]]) for g in v] for k, v in solutions.items()}
    report = score_submission(perfect, solutions)
    assert (report.task_mean_pass1, report.micro_pass2, report.strict_pass2) == (1, 1, 1)
    zero = {k: [answer([[0]], [[0]]) for _ in v] for k, v in solutions.items()}
    assert score_submission(zero, solutions).micro_pass2 == 0


def run_scorer(*args):
    return subprocess.run(
        [sys.executable, "-m", "tiny_onn.arc.score", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_prints_the_table_and_writes_json(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"b": [answer([[0]], [[4]])]}))
    (tmp_path / "t.json").write_text(json.dumps({"a": [[[1]]], "b": [[[4]]]}))
    (tmp_path / "ids.txt").write_text("b\n")
    done = run_scorer(tmp_path / "s.json", tmp_path / "t.json", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert "50.00%" in done.stdout
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["task_mean_pass1"], written["task_mean_pass2"]) == (0.0, 0.5)
    done = run_scorer(tmp_path / "s.json", tmp_path / "t.json", "--ids", tmp_path / "ids.txt")
    assert "100.00%" in done.stdout


def test_command_answers_bad_input_with_one_line_and_status_2(tmp_path):
    (tmp_path / "s.json").write_text("{")
    (tmp_path / "t.json").write_text(json.dumps({"a": [[[1]]]}))
    for args in ((tmp_path / "s.json", tmp_path / "t.json"), (tmp_path / "t.json", "nowhere")):
        done = run_scorer(*args)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
