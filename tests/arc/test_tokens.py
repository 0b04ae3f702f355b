"""Documents spell their grids, positions see nothing later, and the decoder is strict."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import (
    END,
    MAX_DOCUMENT,
    NEWLINE,
    SEP,
    START,
    GridDecodeError,
    decode_grid,
    document_length,
    encode_demos,
    encode_pair,
    encode_prompt,
    longest_orientation,
)

SIDES = st.integers(1, 30)
GRIDS = hnp.arrays(np.uint8, st.tuples(SIDES, SIDES), elements=st.integers(0, 9))
N = NEWLINE


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


def test_a_small_pair_is_spelt_token_by_token():
    document = encode_pair(Pair(grid([1, 2]), grid([3], [4])), task=7, view=5)
    assert document.tokens.tolist() == [START, 1, 2, N, SEP, 3, N, 4, N, END]
    assert document.positions.tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [1, 0, 1],
        [2, 0, 1],
        [0, 0, 2],
        [0, 0, 3],
        [1, 0, 3],
        [0, 1, 3],
        [1, 1, 3],
        [0, 0, 4],
    ]
    assert (document.prefix_len, document.task, document.view) == (5, 7, 5)
    assert document.tokens.dtype == document.positions.dtype == np.int64


@given(GRIDS, GRIDS)
def test_pairs_decode_to_themselves_and_have_the_stated_length(first, second):
    document = encode_pair(Pair(first, second))
    assert len(document.tokens) == document_length(*first.shape, *second.shape)
    assert document.tokens[document.prefix_len - 1] == SEP
    assert np.array_equal(decode_grid(document.tokens[document.prefix_len :]), second)
    assert np.array_equal(decode_grid([*document.tokens[1 : document.prefix_len - 1], END]), first)


@given(GRIDS, GRIDS)
def test_a_prompt_is_the_beginning_of_its_document(first, second):
    document, prompt = encode_pair(Pair(first, second)), encode_prompt(first)
    length = len(prompt.tokens)
    assert prompt.prefix_len == length == document.prefix_len
    assert np.array_equal(document.tokens[:length], prompt.tokens)
    assert np.array_equal(document.positions[:length], prompt.positions)


@given(GRIDS, st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 30))
def test_positions_do_not_depend_on_later_rows(first, row, height):
    short = encode_pair(Pair(first, grid(row)))
    tall = encode_pair(Pair(first, np.repeat(grid(row), height, axis=0)))
    length = len(short.tokens) - 1
    assert np.array_equal(tall.positions[:length], short.positions[:length])


def test_the_longest_document_has_1863_tokens():
    full = np.zeros((30, 30), dtype=np.uint8)
    assert len(encode_pair(Pair(full, full)).tokens) == MAX_DOCUMENT == 1863


def test_the_longer_orientation_counts():
    tall = np.zeros((10, 1), dtype=np.uint8)  # 20 tokens standing, 11 lying
    assert longest_orientation(Pair(tall, tall)) == longest_orientation(Pair(tall.T, tall.T)) == 43


@given(st.lists(st.tuples(GRIDS, GRIDS), max_size=3), GRIDS, GRIDS)
def test_demonstrations_come_before_the_query(demos, first, second):
    pairs = [Pair(*demo) for demo in demos]
    document = encode_demos(pairs, Pair(first, second), task=2, view=3)
    parts = [encode_pair(pair) for pair in [*pairs, Pair(first, second)]]
    assert np.array_equal(document.tokens, np.concatenate([p.tokens for p in parts]))
    assert np.array_equal(document.positions, np.concatenate([p.positions for p in parts]))
    assert np.array_equal(decode_grid(document.tokens[document.prefix_len :]), second)
    prompt = encode_demos(pairs, first, task=2, view=3)
    assert len(prompt.tokens) == prompt.prefix_len == document.prefix_len
    assert np.array_equal(prompt.tokens, document.tokens[: prompt.prefix_len])
    assert (document.task, document.view) == (prompt.task, prompt.view) == (2, 3)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ([], "without END"),
        ([1, N], "without END"),
        ([END], "0 rows"),
        ([1, N, END, 1], "after END"),
        ([1, END], "inside row 0"),
        ([1, N, 2, END], "inside row 1"),
        ([N, END], "0 cells in row 0"),
        ([1, 2, N, 1, N, END], "1 cells in row 1, expected 2"),
        ([1, N, 1, 2, N, END], "2 cells in row 1, expected 1"),
        ([1, N, N, END], "0 cells in row 1"),
        ([1, SEP, N, END], "token 12 at 1"),
        ([START, 1, N, END], "token 10 at 0"),
        ([-1, N, END], "token -1 at 0"),
        ([1] * 31 + [N, END], "31 cells in row 0"),
        ([1, N] * 31 + [END], "31 rows"),
    ],
)
def test_the_decoder_says_what_is_wrong(tokens, complaint):
    with pytest.raises(GridDecodeError, match=complaint):
        decode_grid(tokens)


@given(st.lists(st.integers(0, 13), max_size=12))
def test_what_the_decoder_accepts_encodes_to_the_same_tokens(tokens):
    try:
        decoded = decode_grid(tokens)
    except GridDecodeError:
        return
    document = encode_pair(Pair(decoded, decoded))
    assert document.tokens[document.prefix_len :].tolist() == tokens
