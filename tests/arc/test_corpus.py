"""The corpus holds what was asked for, accounts for the rest, and keeps held-out pairs aside."""

import json
from pathlib import Path

import numpy as np
import pytest

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.sources import load_challenges
from tiny_onn.arc.tokens import longest_orientation
from tiny_onn.config.schema import DataConfig
from tiny_onn.errors import UserError


def keys(examples):
    return [example.key for example in examples]


def count(examples, kind):
    return sum(f"/{kind}/" in example.key for example in examples)


def write_tasks(path, tasks):
    """tasks: id -> (demos, tests) as lists of (input, output) grids; an output None is left out."""

    def entries(pairs):
        named = [{"input": i} if o is None else {"input": i, "output": o} for i, o in pairs]
        return named

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({k: {"train": entries(d), "test": entries(t)} for k, (d, t) in tasks.items()})
    )
    return str(path)


def pair(color, size=1):
    return [[color] * size] * size, [[color]]


@pytest.fixture
def job(tmp_path):
    return write_tasks(
        tmp_path / "job.json",
        {
            "one": ([pair(1), pair(2), pair(3)], [([[4]], None)]),
            "two": ([pair(5), pair(6, 9)], [([[7]], None)]),
        },
    )


def test_the_nano_race_learns_807_demonstrations_of_219_tasks():
    corpus = build_corpus(DataConfig(track="nano", learn="demos"), 0)
    assert len(corpus.task_ids) == len(corpus.tasks) == 219
    assert len(corpus.examples) == count(corpus.examples, "demo") == 807
    assert sum(len(task.test_inputs) for task in corpus.tasks) == 241
    assert max(longest_orientation(example.pair) for example in corpus.examples) <= 192


def test_standard_learning_adds_the_tests_of_training_tasks_only():
    corpus = build_corpus(DataConfig(track="nano"), 0)
    assert count(corpus.examples, "demo") == 807
    assert count(corpus.examples, "test") == 241 - 82
    by_source = corpus.report.sources
    assert by_source["arc1:evaluation"].tests_learned == 0
    assert by_source["arc1:training"].tests_learned == 159


def test_arc1_and_arc2_together_leave_no_overlap():
    corpus = build_corpus(DataConfig(sources=["arc1", "arc2"]), 0)
    report = corpus.report
    assert len(set(corpus.task_ids)) == len(corpus.task_ids) == report.num_tasks
    assert report.reasons["same id as a task of arc1:evaluation"]["tasks"] == 376 + 6
    assert report.reasons["same id as a task of arc1:training"]["tasks"] == 391
    # 40853293 (training) contains the answer to a test of 070dd51e (evaluation)
    assert [e.task for e in report.excluded if e.reason.startswith("shares")] == ["40853293"]
    used = {name: counts.tasks_used for name, counts in report.sources.items()}
    assert sum(used.values()) == report.num_tasks
    assert used["arc1:evaluation"] == 400 and used["arc2:evaluation"] == 114
    hidden = {e.key for e in corpus.examples if corpus.tasks[e.task].source.endswith(":evaluation")}
    assert hidden and not any("/test/" in key for key in hidden)


def test_arc2_alone_still_guards_the_evaluation_of_arc1():
    corpus = build_corpus(DataConfig(sources=["arc2"]), 0)
    assert corpus.report.reasons == {
        "same id as a task of arc1:evaluation": {"tasks": 376, "pairs": 0}
    }
    assert corpus.report.sources["arc2:training"].tasks_used == 624
    assert set(corpus.report.sources) == {"arc2:training", "arc2:evaluation"}


def test_a_folder_with_evaluation_answers_is_kept_out(tmp_path):
    task = load_challenges("arc2:evaluation")[0]
    demos = [(p.input.tolist(), p.output.tolist()) for p in task.demos]
    tests = [(grid.tolist(), [[1]]) for grid in task.test_inputs]
    tasks = {"renamed": (demos, tests), "own": ([pair(1)], [pair(2)])}
    write_tasks(tmp_path / "folder/more.json", tasks)
    corpus = build_corpus(DataConfig(sources=[], extra_dirs=[str(tmp_path / "folder")]), 0)
    assert corpus.task_ids == ("own",) and keys(corpus.examples) == ["own/demo/0", "own/test/0"]
    assert corpus.report.reasons == {
        "shares a pair with a task of arc2:evaluation": {"tasks": 1, "pairs": 0}
    }


def test_a_file_of_challenges_is_learnt_from_its_demonstrations(job):
    corpus = build_corpus(DataConfig(sources=[job]), 0)
    assert corpus.task_ids == ("one", "two")
    assert keys(corpus.examples) == [f"one/demo/{n}" for n in range(3)] + [
        "two/demo/0",
        "two/demo/1",
    ]
    assert [example.task for example in corpus.examples] == [0, 0, 0, 1, 1]


def test_held_out_training_tests_are_never_learnt():
    corpus = build_corpus(DataConfig(track="nano", holdout="train_tests"), 0)
    assert len(corpus.holdout) == count(corpus.holdout, "test") == 159
    assert len(corpus.examples) == count(corpus.examples, "demo") == 807
    answers = corpus.holdout_answers()
    tasks = corpus.holdout_tasks()
    assert [task.id for task in tasks] == list(answers)
    assert all(len(task.test_inputs) == len(answers[task.id]) for task in tasks)


def test_a_held_out_demonstration_is_in_no_task_and_no_example(job):
    corpus = build_corpus(DataConfig(sources=[job], holdout="demos"), 0)
    assert keys(corpus.holdout) == ["one/demo/2"]  # two has only two demonstrations
    assert "one/demo/2" not in keys(corpus.examples) and len(corpus.examples) == 4
    assert [len(task.demos) for task in corpus.tasks] == [2, 2]
    (task,) = corpus.holdout_tasks()
    assert task.id == "one" and len(task.demos) == 2
    assert np.array_equal(task.test_inputs[0], [[3]])
    assert np.array_equal(corpus.holdout_answers()["one"][0], [[3]])


def test_tasks_of_the_corpus_carry_no_answers():
    corpus = build_corpus(DataConfig(track="nano"), 0)
    assert all(set(vars(task)) == {"id", "source", "demos", "test_inputs"} for task in corpus.tasks)


def test_documents_over_the_limit_are_left_out_and_counted(job):
    corpus = build_corpus(DataConfig(sources=[job], max_tokens=94), 0)
    assert "two/demo/1" not in keys(corpus.examples)  # 3 + 9 x 10 + 1 x 2 = 95 tokens
    assert [(e.task, e.pair, e.reason) for e in corpus.report.excluded] == [
        ("two", "two/demo/1", "longer than 94 tokens")
    ]
    assert len(build_corpus(DataConfig(sources=[job], max_tokens=95), 0).examples) == 5


def test_with_demonstrations_a_query_needs_one_beside_it(tmp_path):
    path = write_tasks(
        tmp_path / "job.json",
        {"lone": ([pair(1)], [([[4]], None)]), "both": ([pair(1), pair(2)], [([[4]], None)])},
    )
    corpus = build_corpus(DataConfig(sources=[path], context="demos", max_tokens=14), 0)
    assert keys(corpus.examples) == ["both/demo/0", "both/demo/1"]  # 7 + 7 tokens
    assert [exclusion.pair for exclusion in corpus.report.excluded] == ["lone/demo/0"]


def test_ids_and_track_leave_a_trace_in_the_report(tmp_path, job):
    ids = tmp_path / "ids.txt"
    ids.write_text("two\n")
    corpus = build_corpus(DataConfig(sources=[job], ids=str(ids)), 0)
    assert corpus.task_ids == ("two",)
    assert corpus.report.reasons == {"not in data.ids": {"tasks": 1, "pairs": 0}}


def test_unknown_ids_and_empty_selections_are_user_errors(tmp_path, job):
    ids = tmp_path / "ids.txt"
    ids.write_text("tow\n")
    with pytest.raises(UserError, match="did you mean 'two'"):
        build_corpus(DataConfig(sources=[job], ids=str(ids)), 0)
    big = write_tasks(tmp_path / "big.json", {"big": ([pair(1, 20)], [([[1]], None)])})
    with pytest.raises(UserError, match=r"zero tasks after filtering.*data\.track=nano"):
        build_corpus(DataConfig(sources=[big], track="nano"), 0)
    with pytest.raises(UserError, match=r"no pair to learn from.*1 longer than 100 tokens"):
        build_corpus(DataConfig(sources=[big], max_tokens=100), 0)
    with pytest.raises(UserError, match=r"data\.sources"):
        build_corpus(DataConfig(sources=[]), 0)


def test_every_loaded_pair_is_learnt_held_out_or_excluded(job):
    for data in (
        DataConfig(holdout="demos", track="nano"),
        DataConfig(sources=["arc1", job], holdout="train_tests", max_tokens=300),
    ):
        corpus = build_corpus(data, 0)
        report = corpus.report
        gone = {e.task for e in report.excluded if not e.pair}
        dropped = [e for e in report.excluded if e.pair]
        assert report.num_tasks == sum(c.tasks for c in report.sources.values()) - len(gone)
        learnable = sum(
            c.demos_learned + c.tests_learned + c.held_out for c in report.sources.values()
        )
        assert learnable == len(corpus.examples) + len(corpus.holdout)
        kept = set(keys(corpus.examples)) | set(keys(corpus.holdout))
        assert len(kept) == learnable and kept.isdisjoint(e.pair for e in dropped)


def test_the_report_reads_as_text_and_as_json(job):
    report = build_corpus(DataConfig(sources=["arc1", job], track="nano"), 0).report
    data = json.loads(json.dumps(report.to_dict()))
    assert data["sources"]["arc1:evaluation"]["tests_without_answer"] == 419
    assert data["reasons"]["not in track nano"]["tasks"] == len(
        [e for e in data["excluded"] if e["reason"] == "not in track nano"]
    )
    assert len(data["corpus_sha256"]) == 64
    text = report.render()
    for expected in ("arc1:training", "job.json", "not in track nano", data["corpus_sha256"][:12]):
        assert expected in text
    assert len(text.splitlines()) < 12 and max(map(len, text.splitlines())) <= 120


def test_hashes_change_with_any_cell_and_with_nothing_else(tmp_path, job):
    first = build_corpus(DataConfig(sources=[job]), 0).report
    again = build_corpus(DataConfig(sources=[job]), 1).report
    assert first == again
    text = Path(job).read_text()
    other = tmp_path / "copy" / "job.json"
    other.parent.mkdir()
    other.write_text(text.replace("[[5]]", "[[8]]", 1))
    changed = build_corpus(DataConfig(sources=[str(other)]), 0).report
    assert changed.corpus_sha256 != first.corpus_sha256
    assert changed.sources["job.json"].sha256 != first.sources["job.json"].sha256


ONE = ([pair(1), pair(2)], [([[4]], None)])
TWO = ([pair(5), pair(6)], [([[7]], None)])


@pytest.mark.parametrize(
    "tasks",
    [
        {"one": ONE},
        {"two": TWO, "one": ONE},
        {"one": ONE, "other": TWO},
        {"one": ONE, "two": (TWO[0][::-1], TWO[1])},
        {"one": ONE, "two": ([pair(5), ([[6]], [[8]])], TWO[1])},
        {"one": ONE, "two": (TWO[0], [([[8]], None)])},
        {"one": ONE, "two": ([pair(5), pair(6), pair(6, 15)], TWO[1])},
    ],
    ids=["task", "order", "id", "pair-order", "cell", "test-input", "pair-too-long-to-learn"],
)
def test_whatever_training_reads_of_its_data_changes_the_corpus_hash(tmp_path, tasks):
    sources = [
        write_tasks(tmp_path / name / "job.json", content)
        for name, content in (("before", {"one": ONE, "two": TWO}), ("after", tasks))
    ]
    data = [DataConfig(sources=[source], track="all", max_tokens=100) for source in sources]
    before, after = (build_corpus(d).report.corpus_sha256 for d in data)
    assert before != after
