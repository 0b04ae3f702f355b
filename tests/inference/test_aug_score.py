"""AugScore: exact views of every candidate, sums by hand, and the vote that uses them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import IGNORE, encode_pair
from tiny_onn.arc.view import apply_pair
from tiny_onn.config.schema import PredictConfig
from tiny_onn.inference import aug_score
from tiny_onn.inference.aug_score import with_scores
from tiny_onn.inference.predict import predict_tasks, task_views
from tiny_onn.inference.vote import Candidate, rank, vote


def candidate(grid, votes, first=0, logprob=-1.0):
    views = tuple(range(first, first + votes))
    return Candidate(np.array(grid, dtype=np.uint8), (logprob,) * votes, views)


def test_scores_are_sums_over_the_views_of_the_whole_output_s_log_likelihood(tiny_model, make_task):
    """By one forward a document, of grids that are not square."""
    model = tiny_model(num_tasks=2)
    tasks = [
        make_task([((2, 3), (3, 2))], [(2, 3), (1, 4)], task_id="a"),
        make_task([((2, 2), (2, 2))], [(2, 2)], seed=1, task_id="b"),
    ]
    grids = [[[1, 2], [3, 4], [5, 6]], [[1, 2, 3]], [[7]]]
    candidates = {
        "a": [[candidate(g, n + 1, 9 * n) for n, g in enumerate(grids)], []],
        "b": [[candidate(grids[1], 3), candidate(grids[0], 1, 5)]],
    }
    views = [task_views(task, 5, seed=3) for task in tasks]
    rows, told = [1, -1], []
    found, read = with_scores(
        model, tasks, candidates, views, rows, report=lambda *n: told.append(n)
    )
    for t, task in enumerate(tasks):
        for test, given in enumerate(candidates[task.id]):
            for before, after in zip(given, found[task.id][test], strict=True):
                assert np.array_equal(before.grid, after.grid) and before.views == after.views
                want = 0.0
                for view in views[t]:
                    pair = apply_pair(view, Pair(task.test_inputs[test], before.grid))
                    batch = pack([encode_pair(pair, rows[t], view.dihedral)])
                    logp = model(batch).logits_MV.log_softmax(-1)
                    kept = batch.targets_N != IGNORE
                    want += float(logp[kept].gather(1, batch.targets_N[kept, None]).sum())
                assert after.score == pytest.approx(want, rel=1e-9)
    assert read == 5 and told == [(5, 5)] * 5


def test_a_lone_candidate_and_those_behind_the_first_few_are_not_read(
    tiny_model, make_task, monkeypatch
):
    monkeypatch.setattr(aug_score, "READ_CANDIDATES", 2)
    task = make_task([((2, 2), (2, 2))], [(2, 2), (2, 2)])
    many = [candidate([[n]], n, 5 * n) for n in (1, 3, 2)]
    found, _ = with_scores(
        tiny_model(), [task], {"task": [many, many[:1]]}, [task_views(task, 2, 0)], [0]
    )
    assert [c.score is None for c in found["task"][0]] == [True, False, False]
    assert found["task"][1][0].score is None
    best = rank(found["task"][0], "aug_score")
    assert best[-1].count == 1 and best[0].score >= best[1].score


def test_the_vote_follows_the_score_then_the_count():
    low = replace(candidate([[1]], 5), score=-9.0)
    high = replace(candidate([[2]], 1, 6), score=-2.0)
    unread = candidate([[3]], 4, 7, logprob=-0.1)
    for order in ([low, high, unread], [unread, high, low]):
        assert [int(g[0, 0]) for g in vote(order, 3, "aug_score")] == [2, 1, 3]


def test_predict_reads_its_own_candidates(tiny_model, make_task):
    model = tiny_model()
    tasks = [make_task([((2, 2), (2, 2))], [(2, 2)], seed=n, task_id=f"t{n}") for n in range(3)]
    rows = {task.id: n for n, task in enumerate(tasks)}
    given = PredictConfig(views=6, vote="aug_score", score_views=3)
    prediction = predict_tasks(model, tasks, rows, given, seed=0)
    plain = predict_tasks(model, tasks, rows, replace(given, vote="count"), seed=0)
    read = 0
    for task in tasks:
        (own,), (other,) = prediction.candidates[task.id], plain.candidates[task.id]
        assert [c.grid.tobytes() for c in own] == [c.grid.tobytes() for c in other]
        assert [c.views for c in own] == [c.views for c in other]
        read += sum(c.score is not None for c in own)
    assert read >= 4 and prediction.stats.score_seconds > 0
    assert prediction.stats.score_views == 3
    assert plain.stats.score_seconds == plain.stats.score_views == 0


def test_scoring_leaves_the_model_as_it_was(tiny_model, make_task):
    model = tiny_model(dropout=0.3).train()
    task = make_task([((2, 2), (2, 2))], [(2, 2)])
    given = {"task": [[candidate([[1]], 2), candidate([[2]], 1, 3)]]}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = with_scores(model, [task], given, [task_views(task, 3, 0)], [0])
    assert model.training and torch.equal(torch.get_rng_state(), state)
    again, _ = with_scores(model.eval(), [task], given, [task_views(task, 3, 0)], [0])
    assert [c.score for c in first["task"][0]] == [c.score for c in again["task"][0]]


@pytest.mark.parametrize(("budget", "views"), [(0.0, 0), (0.5, 1), (2.5, 2), (9.0, 5)])
def test_no_view_is_begun_that_does_not_fit_in_the_time(tiny_model, make_task, budget, views):
    """By a clock on which every view takes one second."""
    task, reads = make_task([((2, 2), (2, 2))], [(2, 2)]), []
    given = {"task": [[candidate([[1]], 2), candidate([[2, 3]], 1, 3)]]}
    model, seen = tiny_model(), task_views(task, 5, 0)
    found, read = with_scores(
        model,
        [task],
        given,
        [seen],
        [0],
        seconds_left=lambda: budget - len(reads),
        report=lambda *n: reads.append(n),
    )
    assert read == len(reads) == views
    want, _ = with_scores(model, [task], given, [seen[:views]], [0])
    assert [c.score for c in found["task"][0]] == [c.score for c in want["task"][0]]
    if not views:
        assert [c.score for c in found["task"][0]] == [None, None]


def test_all_candidates_are_read_after_the_same_demonstrations(tiny_model, make_task, monkeypatch):
    """A small candidate leaves room for a demonstration that the largest one does not."""
    task = make_task([((5, 5), (5, 5)), ((2, 2), (2, 2))], [(2, 2)])
    read = []

    def teacher_forced(model, documents, *others):
        read.extend(documents)
        return np.zeros(len(documents)), None, None

    monkeypatch.setattr(aug_score, "teacher_forced", teacher_forced)
    given = {"task": [[candidate([[1]], 2), candidate(np.ones((6, 6)), 1, 3)]]}
    with_scores(
        tiny_model(), [task], given, [task_views(task, 1, 0)], [0], context="demos", max_tokens=100
    )
    small, large = read
    assert small.prefix_len == large.prefix_len
    assert np.array_equal(small.tokens[: small.prefix_len], large.tokens[: large.prefix_len])
    assert small.prefix_len == 16 + 7  # one demonstration of two, and the test input
