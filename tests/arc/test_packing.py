"""Batches hold their documents whole, without padding, with loss where it belongs."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiny_onn.arc.packing import fill, pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import END, IGNORE, SEP, encode_demos, encode_pair, encode_prompt

SIDES = st.integers(1, 5)
GRIDS = hnp.arrays(np.uint8, st.tuples(SIDES, SIDES), elements=st.integers(0, 9))
PAIRS = st.builds(Pair, GRIDS, GRIDS)
DOCUMENTS = st.lists(
    st.one_of(
        st.builds(encode_pair, PAIRS, st.integers(-1, 9), st.integers(0, 7)),
        st.builds(encode_prompt, GRIDS, st.integers(-1, 9), st.integers(0, 7)),
        st.builds(encode_demos, st.lists(PAIRS, max_size=2), PAIRS, st.integers(0, 9)),
    ),
    min_size=1,
    max_size=8,
)


@given(DOCUMENTS, st.integers(1, 70))
def test_filler_rounds_the_rows_and_leaves_every_document_as_it_was(documents, multiple):
    plain = pack(documents)
    filled = fill(plain, multiple)
    n = plain.num_tokens
    assert filled.num_tokens % multiple == 0 and 0 <= filled.num_tokens - n < multiple
    assert torch.equal(filled.tokens_N[:n], plain.tokens_N)
    assert torch.equal(filled.positions_N3[:n], plain.positions_N3)
    assert torch.equal(filled.layout.doc_N[:n], plain.layout.doc_N)
    assert filled.num_target_tokens == plain.num_target_tokens
    assert filled.layout.lengths == plain.layout.lengths
    rows = {len(t) for t in (filled.positions_N3, filled.targets_N, filled.layout.doc_N)}
    assert rows == {filled.num_tokens}


@given(DOCUMENTS)
def test_every_document_comes_back_out_of_the_batch(documents):
    batch = pack(documents)
    layout = batch.layout
    assert sorted(batch.order) == list(range(len(documents)))
    assert layout.cu_seqlens.dtype == torch.int32 and layout.cu_seqlens[0] == 0
    assert layout.lengths == tuple(sorted(layout.lengths))
    assert layout.max_seqlen == max(layout.lengths)
    assert batch.num_tokens == sum(layout.lengths) == int(layout.cu_seqlens[-1])
    for row, number in enumerate(batch.order):
        document = documents[number]
        begin, end = layout.cu_seqlens[row : row + 2].tolist()
        length = len(document.tokens) - int(document.tokens[-1] == END)
        assert end - begin == length == layout.lengths[row]
        assert batch.tokens_N[begin:end].tolist() == document.tokens[:length].tolist()
        assert batch.positions_N3[begin:end].tolist() == document.positions[:length].tolist()
        assert (layout.doc_N[begin:end] == row).all()
        assert layout.prefix_lens[row] == layout.prefixes[row] == document.prefix_len
        assert (batch.task_B[row], batch.view_B[row]) == (document.task, document.view)


@given(DOCUMENTS)
def test_loss_falls_on_the_query_output_and_its_end_only(documents):
    batch = pack(documents)
    for row, number in enumerate(batch.order):
        document = documents[number]
        begin, end = batch.layout.cu_seqlens[row : row + 2].tolist()
        targets = batch.targets_N[begin:end].tolist()
        if document.tokens[-1] != END:
            assert targets == [IGNORE] * len(targets)
            continue
        silent = document.prefix_len - 1
        assert targets[:silent] == [IGNORE] * silent
        assert targets[silent:] == document.tokens[document.prefix_len :].tolist()
        assert batch.tokens_N[begin + silent] == SEP
    assert batch.num_target_tokens == int((batch.targets_N >= 0).sum())


@given(DOCUMENTS)
def test_loss_on_inputs_covers_every_next_token(documents):
    batch = pack(documents, loss_on_inputs=True)
    for row, number in enumerate(batch.order):
        tokens = documents[number].tokens
        begin, end = batch.layout.cu_seqlens[row : row + 2].tolist()
        expected = tokens[1:].tolist() if tokens[-1] == END else [IGNORE] * len(tokens)
        assert batch.targets_N[begin:end].tolist() == expected


def test_equal_lengths_keep_their_order():
    same = [encode_prompt(np.full((2, 2), color, dtype=np.uint8)) for color in range(5)]
    assert pack(same).order == (0, 1, 2, 3, 4)


def test_moving_a_batch_moves_every_tensor():
    batch = pack([encode_pair(Pair(np.ones((1, 1), np.uint8), np.ones((1, 1), np.uint8)))])
    moved = batch.to("meta")
    tensors = [*vars(moved).values(), *vars(moved.layout).values()]
    devices = {value.device.type for value in tensors if isinstance(value, torch.Tensor)}
    assert devices == {"meta"}
