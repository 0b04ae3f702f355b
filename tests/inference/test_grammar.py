"""The grammar: whatever the logits, a grid comes out; and it forbids no grid."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import END, NEWLINE, SEP, START, VOCAB, decode_grid, encode_pair
from tiny_onn.inference.grammar import MAX_NEW_TOKENS, OutputState, output_length

SIDES = st.integers(1, 30)
SIZES = st.one_of(st.none(), st.tuples(SIDES, SIDES))


def write_all(state, logits_of_step):
    """Tokens of every output, END included."""
    num_outputs = len(state.done_B)
    written = [[] for _ in range(num_outputs)]
    for step in range(MAX_NEW_TOKENS):
        was_done = state.done_B.clone()
        tokens_B = state.choose(logits_of_step(step))
        state.advance(tokens_B)
        for b in range(num_outputs):
            if not was_done[b]:
                written[b].append(int(tokens_B[b]))
    return written


@settings(max_examples=15, deadline=None)
@given(
    st.lists(SIZES, min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.floats(-8, 8),
    st.floats(-8, 8),
)
def test_any_logits_spell_a_grid_of_the_fixed_size(sizes, seed, newline_bias, end_bias):
    rng = np.random.default_rng(seed)
    state = OutputState(sizes, grammar=True)

    def logits(step):
        values = rng.normal(size=(len(sizes), VOCAB))
        values[:, NEWLINE] += newline_bias
        values[:, END] += end_bias
        return torch.tensor(values)

    for size, tokens in zip(sizes, write_all(state, logits), strict=True):
        grid = decode_grid(tokens)
        assert size is None or grid.shape == size
    assert state.done_B.all()


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf"), 0.0], ids=["nan", "inf", "-inf", "equal"]
)
def test_worthless_logits_spell_a_grid_too(value):
    tokens = write_all(OutputState([None], True), lambda step: torch.full((1, VOCAB), value))[0]
    assert decode_grid(tokens).shape == (30, 30) and len(tokens) == MAX_NEW_TOKENS == 931


@pytest.mark.parametrize(
    ("favourite", "shape"), [(7, (30, 30)), (NEWLINE, (30, 1)), (END, (1, 30)), (SEP, (30, 30))]
)
def test_a_stubborn_model_is_held_to_thirty_a_side(favourite, shape):
    logits = torch.zeros(1, VOCAB)
    logits[0, favourite] = 50.0
    assert decode_grid(write_all(OutputState([None], True), lambda s: logits)[0]).shape == shape


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.booleans(), st.integers(0, 2**32 - 1))
def test_every_grid_is_legal_and_stands_where_encode_pair_puts_it(height, width, fixed, seed):
    grid = np.random.default_rng(seed).integers(0, 10, (height, width)).astype(np.uint8)
    document = encode_pair(Pair(np.zeros((1, 1), dtype=np.uint8), grid))
    tokens = document.tokens[document.prefix_len :]
    positions = document.positions[document.prefix_len :]
    state = OutputState([(height, width) if fixed else None], grammar=True)
    for token, position in zip(tokens.tolist(), positions.tolist(), strict=True):
        assert state.legal()[0, token]
        if token != END:
            assert state.positions()[0].tolist() == position
        state.advance(torch.tensor([token]))
    assert state.done_B.item() and len(tokens) == output_length((height, width))


def test_a_fixed_size_leaves_only_colours_or_one_structure_token():
    state = OutputState([(1, 2)], grammar=True)
    kinds = []
    for token in (4, 4, NEWLINE, END):
        kinds.append(torch.nonzero(state.legal()[0]).squeeze(-1).tolist())
        state.advance(torch.tensor([token]))
    assert kinds == [list(range(10)), list(range(10)), [NEWLINE], [END]]


def test_start_and_separator_are_never_legal():
    state = OutputState([None, (2, 2)], grammar=True)
    for token in (1, 1, NEWLINE, 1, 1, NEWLINE):
        assert not state.legal()[:, [START, SEP]].any()
        state.advance(torch.tensor([token, token]))


def test_without_grammar_the_likeliest_token_wins_and_start_ends_the_output():
    state = OutputState([None], grammar=False)
    logits = torch.zeros(1, VOCAB)
    logits[0, START] = 1.0
    assert state.choose(logits).item() == START
    state.advance(torch.tensor([START]))
    assert state.done_B.item()
