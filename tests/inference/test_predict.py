"""Prediction over views: exact inversion, equal numbers of views, the time budget."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tiny_onn.arc.task import Pair, Task, TrainingTask
from tiny_onn.arc.tokens import END, NEWLINE, SEP, START, VOCAB, encode_pair, encode_prompt
from tiny_onn.arc.view import IDENTITY, apply, apply_pair
from tiny_onn.config.schema import PredictConfig
from tiny_onn.errors import UserError
from tiny_onn.inference.predict import collect, failure_kind, predict_tasks, task_views
from tiny_onn.inference.vote import vote

SEED = 3


def voting(**settings) -> PredictConfig:
    """A vote that needs no reading (AugScore's would): the stub decodes only."""
    return PredictConfig(**({"vote": "count_then_likelihood"} | settings))


def full_grid(rng, height, width):
    """A random grid in which every colour occurs, so that each view looks different."""
    cells = np.concatenate([np.arange(10), rng.integers(0, 10, height * width - 10)])
    return rng.permutation(cells).reshape(height, width).astype(np.uint8)


def solved_task(task_id, seed, test_shapes=((3, 5),), ratio=1):
    """A task and the right outputs of its test inputs: the input shifted by one colour."""
    rng = np.random.default_rng(seed)

    def pair(shape):
        grid = full_grid(rng, *shape)
        return Pair(grid, np.kron((grid + 1) % 10, np.ones((ratio, ratio), np.uint8)))

    demos = (pair((4, 4)), pair((2, 6)))
    tests = [pair(shape) for shape in test_shapes]
    task = Task(task_id, "made", demos, tuple(t.input for t in tests))
    return task, [t.output for t in tests]


def oracle(solved, views, spoil=lambda task, test, view: False):
    """Scores that spell the right output for every view of every test input."""
    answers = {}
    for row, (task, outputs) in enumerate(solved):
        for number, view in enumerate(task_views(task, views, SEED)):
            for test, (grid, output) in enumerate(zip(task.test_inputs, outputs, strict=True)):
                prompt = encode_prompt(apply(view, grid), row, view.dihedral)
                document = encode_pair(apply_pair(view, Pair(grid, output)))
                answer = document.tokens[document.prefix_len :].tolist()
                if spoil(row, test, number):
                    answer[0] = (answer[0] + 1) % 10
                key = row, view.dihedral, tuple(prompt.tokens.tolist())
                assert answers.setdefault(key, answer) == answer

    def score(row):
        answer = answers[row.task, row.view, tuple(row.tokens[: row.prompt_len])]
        logits = np.zeros(VOCAB)
        logits[answer[min(len(row.written), len(answer) - 1)]] = 12.0
        return logits

    return score


def rows_of(tasks):
    return {task.id: row for row, task in enumerate(tasks)}


@pytest.mark.parametrize("size_rule", [True, False])
def test_an_oracle_of_every_view_is_inverted_into_unanimous_truth(stub, size_rule):
    solved = [
        solved_task("a", 0, ((3, 5), (5, 2))),
        solved_task("b", 1, ((7, 2),), ratio=2),
    ]
    tasks = [task for task, _ in solved]
    config = voting(views=24, size_rule=size_rule)
    made = predict_tasks(stub(oracle(solved, 24)), tasks, rows_of(tasks), config, SEED)
    for task, outputs in solved:
        assert len({v.dihedral for v in task_views(task, 24, SEED)}) == 8
        for candidates, output in zip(made.candidates[task.id], outputs, strict=True):
            (only,) = candidates
            np.testing.assert_array_equal(only.grid, output)
            assert only.views == tuple(range(24)) and only.count == 24
            assert max(only.logprobs) < 0
    assert made.stats.num_prompts == 24 * 3 and made.stats.num_failures == 0
    assert made.stats.views == made.stats.fewest_views == 24
    assert made.stats.sized_outputs == (3 if size_rule else 0)
    assert made.num_views == {"a": 24, "b": 24}


def test_a_few_mistaken_views_are_outvoted_and_become_the_second_attempt(stub):
    solved = [solved_task("a", 0)]
    task, (output,) = solved[0]
    score = oracle(solved, 8, spoil=lambda row, test, view: view == 0)
    made = predict_tasks(stub(score), [task], {"a": 0}, voting(views=8), SEED)
    first, second = vote(made.candidates["a"][0])
    np.testing.assert_array_equal(first, output)
    assert not np.array_equal(second, output)
    assert sorted(c.count for c in made.candidates["a"][0]) == [1, 7]


def test_the_first_view_is_the_identity_and_views_depend_on_seed_and_id_only(make_task):
    task = make_task([((3, 3), (3, 3)), ((4, 3), (4, 3))], [(3, 3)])
    views = task_views(task, 16, SEED)
    assert views[0] == IDENTITY and len(set(views)) == 16
    assert views == task_views(task, 16, SEED)
    assert views != task_views(task, 16, SEED + 1)
    assert views != task_views(replace(task, id="other"), 16, SEED)


def test_prediction_is_deterministic_and_blind_to_the_other_tasks(random_stub, make_task):
    sizes = [((3, 3), (3, 3)), ((4, 3), (4, 3))]
    a, b = make_task(sizes, [(3, 3)], 1, "a"), make_task(sizes, [(2, 4), (4, 4)], 2, "b")
    config = voting(views=5)

    def flat(made, task_id):
        return [
            [(c.grid.tolist(), c.views, c.logprobs) for c in test]
            for test in made.candidates[task_id]
        ]

    both = predict_tasks(random_stub, [a, b], {"a": 0, "b": 1}, config, SEED)
    again = predict_tasks(random_stub, [a, b], {"a": 0, "b": 1}, config, SEED)
    alone = predict_tasks(random_stub, [b], {"b": 1}, config, SEED)
    assert flat(both, "a") == flat(again, "a")
    assert flat(both, "b") == flat(again, "b") == flat(alone, "b")


@pytest.mark.parametrize("drop", [True, False])
def test_copies_of_the_input_are_dropped_and_counted_if_asked(stub, drop):
    task, _ = solved_task("a", 0)
    score = oracle([(task, list(task.test_inputs))], 4)
    config = voting(views=4, drop_input_copies=drop)
    made = predict_tasks(stub(score), [task], {"a": 0}, config, SEED)
    assert made.stats.input_copies == (4 if drop else 0)
    assert [c.count for c in made.candidates["a"][0]] == ([] if drop else [4])


def test_answers_of_a_task_that_has_them_are_never_looked_at(random_stub):
    task, outputs = solved_task("a", 0)
    config = voting(views=3)
    plain = predict_tasks(random_stub, [task], {"a": 0}, config, SEED)
    tests = (Pair(task.test_inputs[0], np.zeros((9, 9), np.uint8)),)
    told = TrainingTask(task.id, task.source, task.demos, task.test_inputs, tests)
    made = predict_tasks(random_stub, [told], {"a": 0}, config, SEED)
    assert [c.grid.tolist() for c in made.candidates["a"][0]] == [
        c.grid.tolist() for c in plain.candidates["a"][0]
    ]


def test_an_unknown_task_has_no_vector_and_is_counted(random_stub, make_task):
    task = make_task([((2, 2), (2, 2))], [(2, 2)])
    made = predict_tasks(random_stub, [task], {"other": 0}, voting(views=1), SEED)
    assert made.stats.unknown_tasks == 1
    assert [row.task for row in random_stub.asked] == [-1]


def test_what_is_no_grid_is_no_candidate_but_counted_by_kind(stub, make_task):
    task = make_task([((2, 2), (2, 2)), ((3, 2), (3, 2))], [(2, 2), (3, 3)])
    script = [1, 2, NEWLINE, 1, NEWLINE, END]

    def score(row):
        logits = np.zeros(VOCAB)
        logits[script[min(len(row.written), 5)]] = 9.0
        return logits

    config = voting(views=3, grammar=False, size_rule=False)
    made = predict_tasks(stub(score), [task], {}, config, SEED)
    assert made.candidates["task"] == [[], []]
    assert made.stats.failures == {"got N cells in row N, expected N": 6}
    assert failure_kind("got 3 cells in row 12") == "got N cells in row N"


def test_context_demos_shows_the_demonstrations_in_the_same_view(random_stub, make_task):
    task = make_task([((2, 2), (2, 2)), ((3, 2), (3, 2))], [(2, 3)])
    config = voting(views=2)
    predict_tasks(random_stub, [task], {}, config, SEED, context="demos")
    for view in task_views(task, 2, SEED):
        shown = [encode_pair(apply_pair(view, demo)).tokens for demo in task.demos]
        shown.append(encode_prompt(apply(view, task.test_inputs[0])).tokens)
        expected = np.concatenate(shown).tolist()
        assert expected in [row.tokens[: row.prompt_len] for row in random_stub.asked]
    predict_tasks(random_stub, [task], {}, config, SEED, context="demos", max_tokens=40)
    short = random_stub.asked[-1]
    assert Counter(short.tokens[: short.prompt_len])[START] == 2


class Clock:
    """Seconds that go by only when the model works."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def timed(stub, seconds_of_step):
    clock = Clock()

    def tick():
        clock.now += seconds_of_step(clock.now - 100.0)

    def score(row):
        logits = np.zeros(VOCAB)
        logits[[1, SEP]] = [4.0, 2.0]
        return logits

    return stub(score, on_step=tick), clock


def asked_views(model, num_tests):
    """How often every test input was asked, by (task, length of its prompt)."""
    counts = Counter((row.task, row.prompt_len) for row in model.asked)
    assert len(counts) == num_tests
    return counts


@pytest.mark.parametrize(("minutes", "step"), [(0.5, 0.05), (1.0, 0.3), (4.0, 1.0)])
def test_minutes_are_used_but_not_exceeded_and_views_are_equal(stub, minutes, step):
    solved = [solved_task("a", 0, ((5, 5), (6, 6))), solved_task("b", 1, ((4, 4),))]
    tasks = [task for task, _ in solved]
    model, clock = timed(stub, lambda t: step)
    config = voting(views=None, minutes=minutes)
    made = predict_tasks(model, tasks, rows_of(tasks), config, SEED, clock=clock)
    used = clock.now - 100.0
    assert used <= minutes * 60
    assert used >= 0.6 * minutes * 60
    assert made.stats.seconds == pytest.approx(used)
    assert set(asked_views(model, 3).values()) == {made.stats.views}
    assert made.stats.fewest_views == made.stats.views > 1
    assert made.stats.discarded_prompts == 0
    for tests in made.candidates.values():
        for candidates in tests:
            views = sorted(v for c in candidates for v in c.views)
            assert views == list(range(made.stats.views))


def test_a_machine_that_slows_down_discards_the_unfinished_round(stub):
    solved = [solved_task("a", 0, ((5, 5), (6, 6))), solved_task("b", 1, ((4, 4),))]
    tasks = [task for task, _ in solved]
    model, clock = timed(stub, lambda t: 0.01 if t < 20 else 0.08)
    config = voting(views=None, minutes=1.0, batch_tokens=200)
    made = predict_tasks(model, tasks, rows_of(tasks), config, SEED, clock=clock)
    assert clock.now - 100.0 <= 60
    assert made.stats.discarded_prompts > 0
    for tests in made.candidates.values():
        for candidates in tests:
            views = sorted(v for c in candidates for v in c.views)
            assert views == list(range(made.stats.views))


def test_one_view_is_completed_however_short_the_minutes(stub):
    task, _ = solved_task("a", 0, ((5, 5), (6, 6)))
    model, clock = timed(stub, lambda t: 10.0)
    config = voting(views=None, minutes=0.01, batch_tokens=1)
    made = predict_tasks(model, [task], {"a": 0}, config, SEED, clock=clock)
    assert made.stats.views == 1 and made.stats.num_prompts == 2


def test_views_are_a_limit_when_minutes_are_given_too(stub):
    task, _ = solved_task("a", 0)
    model, clock = timed(stub, lambda t: 0.01)
    config = voting(views=3, minutes=5)
    assert predict_tasks(model, [task], {}, config, SEED, clock=clock).stats.views == 3


def test_a_task_with_few_different_views_gets_those_it_has(random_stub):
    blank = np.zeros((3, 3), np.uint8)
    task = Task("blank", "made", (Pair(blank, blank), Pair(blank, blank)), (blank,))
    made = predict_tasks(random_stub, [task], {}, voting(views=16), SEED)
    assert made.num_views == {"blank": 1}
    assert made.stats.fewest_views == 1 and made.stats.num_prompts == 1


def test_progress_is_reported_after_every_batch(random_stub, make_task):
    task = make_task([((2, 2), (2, 2)), ((3, 2), (3, 2))], [(2, 2), (3, 3)])
    seen = []
    predict_tasks(
        random_stub,
        [task],
        {},
        voting(views=3, batch_tokens=1),
        SEED,
        report=seen.append,
    )
    assert [p.done for p in seen] == list(range(1, 7))
    assert {p.total for p in seen} == {6}
    assert seen[-1].seconds_left == 0 and seen[0].seconds_left >= 0


@pytest.mark.parametrize(
    "change",
    [
        {"views": None, "minutes": None},
        {"views": 0},
        {"minutes": 0.0},
        {"minutes": float("nan")},
        {"batch_tokens": 0},
        {"grammar": False, "size_rule": True},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(random_stub, change):
    with pytest.raises(UserError, match="expected"):
        predict_tasks(random_stub, [], {}, replace(voting(), **change), SEED)


def test_equal_grids_of_different_views_become_one_candidate():
    one, two = np.ones((2, 1), np.uint8), np.ones((1, 2), np.uint8)
    made = collect([(3, one, -3.0), (0, two, -1.0), (1, one.copy(), -2.0)])
    assert [(c.grid.shape, c.views, c.logprobs) for c in made] == [
        ((1, 2), (0,), (-1.0,)),
        ((2, 1), (1, 3), (-2.0, -3.0)),
    ]
