"""The submit run from checkpoint to page, and everything that can be wrong with its settings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_onn.arc.submission import plain_grid
from tiny_onn.config.schema import Config, ModelConfig, PredictConfig, SubmitConfig
from tiny_onn.errors import UserError
from tiny_onn.inference import run
from tiny_onn.inference.run import (
    PREDICTIONS,
    REPORT,
    SCORE,
    SUBMISSION,
    choose_precision,
    run_submit,
)
from tiny_onn.model.checkpoint import save_checkpoint
from tiny_onn.model.tiny_onn import build_model

SIZES = ModelConfig(width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16)


@pytest.fixture
def job(tmp_path, make_task):
    """A settings object whose files all exist: two challenges, three outputs."""
    torch.manual_seed(0)
    model = build_model(SIZES, 2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    save_checkpoint(
        tmp_path / "model",
        model,
        Config(model=SIZES, out="runs/x"),
        ("t0", "t1"),
        {"commit": "abc"},
    )
    tasks = [
        make_task([((3, 3), (3, 3)), ((4, 3), (4, 3))], [(3, 3), (2, 4)], 0, "t0"),
        make_task([((3, 3), (2, 2)), ((4, 3), (2, 2))], [(3, 3)], 1, "t1"),
    ]
    challenges = {
        t.id: {
            "train": [
                {"input": plain_grid(d.input), "output": plain_grid(d.output)} for d in t.demos
            ],
            "test": [{"input": plain_grid(g)} for g in t.test_inputs],
        }
        for t in tasks
    }
    (tmp_path / "challenges.json").write_text(json.dumps(challenges))
    zeros = {"t0": [[[1] * 3] * 3, [[1] * 4] * 2], "t1": [[[1, 1], [1, 1]]]}
    (tmp_path / "solutions.json").write_text(json.dumps(zeros))
    return SubmitConfig(
        checkpoint=str(tmp_path / "model"),
        challenges=str(tmp_path / "challenges.json"),
        solutions=str(tmp_path / "solutions.json"),
        out=str(tmp_path / "out"),
        accelerator="cpu",
        precision="fp32",
        predict=PredictConfig(views=4),
    )


def read(job, name):
    return json.loads(Path(job.out, name).read_text())


def test_a_run_writes_submission_candidates_score_and_page(job, capsys):
    assert run_submit(job) == 0
    submission, predictions = read(job, SUBMISSION), read(job, PREDICTIONS)
    assert list(submission) == ["t0", "t1"]
    assert [len(tests) for tests in submission.values()] == [2, 1]
    for task_id, tests in submission.items():
        for test, entry in enumerate(tests):
            record = predictions["tasks"][task_id][test]
            ranked = [c["grid"] for c in record["candidates"]]
            assert entry["attempt_1"] == ranked[0]
            assert entry["attempt_2"] == ranked[1] != ranked[0]
            votes = [len(c["views"]) for c in record["candidates"]]
            assert votes == [c["votes"] for c in record["candidates"]]
            assert sum(votes) == 4 and votes == sorted(votes, reverse=True)
            shape = np.array(ranked[0]).shape
            assert list(shape) == record["size_rule"]
    assert predictions["stats"]["num_prompts"] == 12
    assert read(job, SCORE)["num_outputs"] == 3
    page = Path(job.out, REPORT).read_text()
    assert "t0" in page and "abc" in page
    printed = capsys.readouterr().out
    for words in ("task mean", "per output", "strict", SUBMISSION, REPORT, "no fallback"):
        assert words in printed


def test_the_same_settings_give_the_same_submission(job):
    run_submit(job)
    first = read(job, SUBMISSION), read(job, PREDICTIONS)["tasks"]
    run_submit(job)
    assert (read(job, SUBMISSION), read(job, PREDICTIONS)["tasks"]) == first
    run_submit(replace(job, seed=1))
    assert read(job, PREDICTIONS)["tasks"] != first[1]


def test_solutions_are_opened_only_once_the_submission_is_written(job, monkeypatch):
    seen = []

    def load(spec):
        seen.append(read(job, SUBMISSION))
        return {"t0": (np.ones((3, 3), np.uint8), np.ones((2, 4), np.uint8))}

    monkeypatch.setattr(run, "load_solutions", load)
    run_submit(replace(job, solutions=None))
    assert not seen
    job_elsewhere = replace(job, out=job.out + "2")
    monkeypatch.setattr(
        run,
        "load_solutions",
        lambda spec: seen.append(read(job_elsewhere, SUBMISSION)) or load(spec),
    )
    run_submit(job_elsewhere)
    assert len(seen) == 2 and seen[0] == seen[1]


def test_bad_solutions_still_leave_the_submission_and_an_unscored_page(job, tmp_path):
    (tmp_path / "solutions.json").write_text("{}")
    with pytest.raises(UserError):
        run_submit(job)
    assert list(read(job, SUBMISSION)) == ["t0", "t1"]
    assert (Path(job.out) / REPORT).is_file() and not (Path(job.out) / SCORE).exists()


def test_a_run_without_solutions_leaves_no_old_score_behind(job, tmp_path):
    run_submit(job)
    run_submit(replace(job, solutions=None))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [SUBMISSION, PREDICTIONS, REPORT]
    )


def test_failures_and_fallbacks_are_filled_counted_and_printed(job, capsys):
    unbound = PredictConfig(views=2, grammar=False, size_rule=False)
    run_submit(replace(job, predict=unbound))
    printed = capsys.readouterr().out
    predictions = read(job, PREDICTIONS)
    assert predictions["stats"]["failures"]
    assert predictions["fallbacks"]["num_fallbacks"] > 0
    assert f"{predictions['fallbacks']['num_fallbacks']} fallbacks" in printed
    assert "failed:" in printed
    for tests in read(job, SUBMISSION).values():
        for entry in tests:
            assert entry["attempt_1"] != entry["attempt_2"]


def test_ids_choose_the_tasks(job, tmp_path):
    (tmp_path / "ids.txt").write_text("t1\n")
    run_submit(replace(job, ids=str(tmp_path / "ids.txt")))
    assert list(read(job, SUBMISSION)) == ["t1"]
    assert read(job, SCORE)["num_tasks"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint": "nowhere"}, "checkpoint"),
        ({"challenges": "nowhere.json"}, "challenges"),
        ({"solutions": "nowhere.json"}, "solutions"),
        ({"accelerator": "abacus"}, "accelerator"),
        ({"predict": PredictConfig(views=0)}, "predict.views"),
        ({"predict": PredictConfig(views=None)}, "predict.minutes"),
        ({"predict": PredictConfig(minutes=0)}, "predict.minutes"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(job, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(run, "predict_tasks", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(UserError, match=words):
        run_submit(replace(job, **change))
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_is_a_file_is_refused_before_any_work(job, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "predict_tasks", lambda *a, **k: pytest.fail("work was done"))
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match="out"):
        run_submit(job)
    assert (tmp_path / "out").read_text() == "in the way"


def test_a_torn_checkpoint_is_refused_before_any_work(job, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "predict_tasks", lambda *a, **k: pytest.fail("work was done"))
    weights = tmp_path / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="torn"):
        run_submit(job)


def test_zero_tasks_after_filtering_are_refused(job, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_challenges", lambda spec: [])
    with pytest.raises(UserError, match="zero tasks"):
        run_submit(job)


def test_precision_auto_means_fp32_on_a_cpu_and_bf16_on_a_gpu():
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    assert choose_precision("auto", torch.device("cuda")) == "bf16"
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"
