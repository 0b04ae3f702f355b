"""Batched decoding: the same as one by one, the same as the parallel forward."""

import numpy as np
import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import END, NEWLINE, SEP, VOCAB, encode_pair, encode_prompt
from tiny_onn.inference.generate import generate, generate_batches, plan_batches
from tiny_onn.inference.grammar import MAX_NEW_TOKENS
from tiny_onn.inference.holdout import teacher_forced

SHAPES = [(3, 2), (1, 1), (5, 5), (2, 7), (5, 5), (4, 1)]


def prompts(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return [
        encode_prompt(rng.integers(0, 10, shape).astype(np.uint8), task=i % 5, view=i % 8)
        for i, shape in enumerate(shapes)
    ]


SIZES = [(3, 2), None, (2, 2), (1, 9), None, (4, 4)]


def same(a, b):
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.logprob == pytest.approx(b.logprob, rel=1e-9)
    np.testing.assert_array_equal(a.grid, b.grid)
    assert a.failure == b.failure


@pytest.mark.parametrize("changes", [{}, {"mask": "causal"}, {"loops": 2}], ids=str)
def test_cached_decoding_has_the_likelihood_and_choices_of_the_parallel_forward(
    tiny_model, changes
):
    model = tiny_model(**changes)
    asked = prompts()
    for prompt, size, made in zip(asked, SIZES, generate(model, asked, SIZES), strict=True):
        source = prompt.tokens[1:-1].reshape(-1, np.flatnonzero(prompt.tokens == NEWLINE)[0])
        pair = Pair(source[:, :-1].astype(np.uint8), made.grid)
        document = encode_pair(pair, prompt.task, prompt.view)
        np.testing.assert_array_equal(document.tokens[len(prompt.tokens) :], made.tokens)
        nll, _, _ = teacher_forced(model, [document])
        assert made.logprob == pytest.approx(-nll[0], rel=1e-9)
        assert size is None or made.grid.shape == size
        with torch.no_grad():
            logits = model(pack([document])).logits_MV[len(prompt.tokens) - 1 :]
        colors = made.tokens < 10
        if size is not None:
            best = logits[:, :10].argmax(-1).numpy()
            np.testing.assert_array_equal(best[colors], made.tokens[colors])


@pytest.mark.parametrize("grammar", [True, False])
def test_a_batch_equals_one_prompt_at_a_time(random_stub, tiny_model, grammar):
    sizes = SIZES if grammar else [None] * len(SIZES)
    for model in (random_stub, tiny_model()) if grammar else (random_stub,):
        together = generate(model, prompts(), sizes, grammar=grammar)
        for prompt, size, made in zip(prompts(), sizes, together, strict=True):
            same(made, generate(model, [prompt], [size], grammar=grammar)[0])


def test_decoding_is_deterministic_and_blind_to_the_order_and_batches(random_stub):
    asked = prompts()
    first = generate(random_stub, asked, SIZES)
    turned = generate(random_stub, asked[::-1], SIZES[::-1], batch_tokens=60)[::-1]
    for a, b, c in zip(first, turned, generate(random_stub, asked, SIZES), strict=True):
        same(a, b)
        same(a, c)


def test_fixed_sizes_are_honoured(random_stub):
    sizes = [(1, 1), (30, 30), (1, 30), (30, 1), (7, 3), (2, 2)]
    made = generate(random_stub, prompts(), sizes)
    assert [g.grid.shape for g in made] == sizes
    assert [len(g.tokens) for g in made] == [h * (w + 1) + 1 for h, w in sizes]


def test_finished_outputs_leave_and_nothing_is_decoded_after_the_last_end(random_stub):
    sizes = [(1, 1), (1, 1), (2, 2), (2, 2), (4, 4), (4, 4)]
    made = generate(random_stub, prompts(), sizes)
    longest = max(len(g.tokens) for g in made)
    assert random_stub.prefills == [6]
    assert len(random_stub.steps) == longest - 1
    # 1x1 ends with 3 tokens, 2x2 with 7, 4x4 with 21
    assert random_stub.steps == [6] * 2 + [4] * 4 + [2] * 14


def test_every_token_is_fed_at_the_position_encode_pair_gives_it(random_stub):
    asked = prompts()
    made = generate(random_stub, asked, SIZES, batch_tokens=1)
    assert random_stub.prefills == [1] * 6
    fed = {tuple(row.tokens[: row.prompt_len]): row for row in random_stub.asked}
    for prompt, generation in zip(asked, made, strict=True):
        row = fed[tuple(prompt.tokens.tolist())]
        document = encode_pair(Pair(np.zeros((1, 1), np.uint8), generation.grid))
        expected = document.positions[document.prefix_len :][:-1]
        assert row.written == generation.tokens[:-1].tolist()
        np.testing.assert_array_equal(row.positions[row.prompt_len :], expected)


def test_log_likelihood_is_of_the_full_softmax_and_counts_forced_tokens(stub):
    logits = np.zeros(VOCAB)
    logits[SEP] = 5.0  # never legal, yet it takes its share of the probability
    made = generate(stub(lambda row: logits), prompts()[:1], [(2, 3)])[0]
    per_token = -np.log(np.exp(logits).sum())
    assert made.logprob == pytest.approx(9 * per_token, rel=1e-6)


def test_without_grammar_what_is_no_grid_is_a_failure_with_a_reason(stub):
    script = {
        0: [1, NEWLINE, END],
        1: [1, 2, NEWLINE, 1, NEWLINE, END],
        2: [END],
        3: [1, SEP],
        4: [5] * MAX_NEW_TOKENS,
    }

    def score(row):
        logits = np.zeros(VOCAB)
        script_here = script[row.task]  # rows that are done are fed until they leave
        logits[script_here[min(len(row.written), len(script_here) - 1)]] = 9.0
        return logits

    asked = [encode_prompt(np.zeros((1, 1), np.uint8), task=task) for task in script]
    made = generate(stub(score), asked, grammar=False)
    assert made[0].failure is None and made[0].grid.tolist() == [[1]]
    assert [g.grid is None for g in made] == [False, True, True, True, True]
    for generation, words in zip(made[1:], ("row 1", "rows", "END", "without END"), strict=True):
        assert words in generation.failure
    assert [len(g.tokens) for g in made] == [3, 6, 1, 2, MAX_NEW_TOKENS]


def test_logits_that_are_not_finite_are_a_failure(stub):
    made = generate(stub(lambda row: np.full(VOCAB, np.nan)), prompts()[:1], [(2, 2)])
    assert made[0].grid is None and "not finite" in made[0].failure


def test_batches_are_sorted_and_stay_within_their_tokens():
    asked = prompts([(n, n) for n in (9, 2, 7, 3, 5, 4, 8, 6)] * 3)
    sizes = [None, (1, 1)] * 12
    batches = plan_batches(asked, sizes, batch_tokens=400)
    assert sorted(i for batch in batches for i in batch) == list(range(24))
    rooms = [
        max(3 if sizes[i] else len(asked[i].tokens) for i in batch)
        + max(len(asked[i].tokens) for i in batch)
        for batch in batches
    ]
    assert all(
        room * len(batch) <= 400 or len(batch) == 1
        for room, batch in zip(rooms, batches, strict=True)
    )
    assert len(batches) > 3 and max(len(batch) for batch in batches) > 2
    assert rooms == sorted(rooms)


def test_batches_arrive_one_by_one(random_stub):
    arrivals = generate_batches(random_stub, prompts(), batch_tokens=1)
    indices, generations = next(arrivals)
    assert indices == [1] and len(generations) == 1
    assert random_stub.prefills == [1]


def test_the_model_is_left_in_training_mode_with_its_gradients_on(random_stub):
    random_stub.train()
    generate(random_stub, prompts()[:2], [(1, 1)] * 2)
    assert random_stub.training and torch.is_grad_enabled()


def test_bf16_decodes_the_same_shapes(tiny_model):
    model = tiny_model().float()
    made = generate(model, prompts(), SIZES, precision="bf16")
    assert all(g.failure is None for g in made)
    exact = generate(model, prompts(), SIZES)
    for a, b in zip(made, exact, strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=0.2)
