import json
from types import SimpleNamespace

import numpy as np
import pytest

from tiny_onn.config.schema import Config, DataConfig
from tiny_onn.errors import UserError
from tiny_onn.inference.vote import Candidate

RIGHT, WRONG, OTHER = (np.full((2, 2), n, dtype=np.uint8) for n in (1, 2, 3))


def candidate(grid, votes, first, logprob, score):
    return Candidate(grid, (logprob,) * votes, tuple(range(first, first + votes)), score)


@pytest.fixture
def votes(script, monkeypatch, tmp_path):
    """One task of two tests: most views wrong, right by likelihood; and one found by all."""
    module = script("eavi", "votes")
    candidates = {
        "t": [
            [
                candidate(WRONG, 5, 0, -9.0, -80.0),
                candidate(OTHER, 4, 5, -8.0, -70.0),
                candidate(RIGHT, 1, 9, -0.1, -3.0),
            ],
            [candidate(RIGHT, 10, 0, -1.0, None)],
        ]
    }
    stats = SimpleNamespace(seconds=2.0, score_seconds=1.0)
    corpus = SimpleNamespace(
        holdout_tasks=lambda: [SimpleNamespace(id="t")],
        holdout_answers=lambda: {"t": [RIGHT, RIGHT]},
    )
    monkeypatch.setattr(module, "build_corpus", lambda data, seed: corpus)
    monkeypatch.setattr(
        module,
        "predict_tasks",
        lambda *a, **k: SimpleNamespace(candidates=candidates, stats=stats),
    )
    config = Config(data=DataConfig(holdout="train_tests"))
    monkeypatch.setattr(
        module,
        "load_model",
        lambda run: SimpleNamespace(model=None, config=config, task_ids=("t",)),
    )
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_rules_are_scored_on_the_same_candidates(votes, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["votes.py", "runs/eavi/x_seed0"])
    assert votes.main() == 0
    found = json.loads((tmp_path / "votes_eavi_x_seed0.json").read_text())
    for rule in ("count", "count_then_likelihood"):
        assert found["rules"][rule] == {"pass1": 0.5, "pass2": 0.5}
    for rule in ("aug_score", "sum_prob"):
        assert found["rules"][rule] == {"pass1": 1.0, "pass2": 1.0}
    assert found["outputs"] == 2 and found["tasks"] == 1


def test_a_run_that_held_nothing_out_is_refused(votes, monkeypatch):
    monkeypatch.setattr(
        votes,
        "load_model",
        lambda run: SimpleNamespace(model=None, config=Config(), task_ids=("t",)),
    )
    monkeypatch.setattr("sys.argv", ["votes.py", "runs/x"])
    with pytest.raises(UserError, match="data.holdout=none; expected one trained"):
        votes.main()


def test_results_of_runs_of_one_name_are_kept_apart(votes):
    assert votes.result_name("runs/a/x") != votes.result_name("runs/b/x")
    assert votes.result_name("other/runs/a/x/checkpoint") == "other_a_x"
