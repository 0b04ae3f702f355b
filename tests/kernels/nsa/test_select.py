"""Scores, choices and their inverse (properties 5-8, 16 and 24 of NSA's list)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_onn_kernels.nsa import reference as nsa
from tiny_onn_kernels.nsa.cases import Case, choices_of
from tiny_onn_kernels.nsa.select import NUM_FORCED, block_scores, choose_blocks, overlap_taps
from tiny_onn_kernels.nsa.selected import invert_index

SIZES = [
    (32, 16, 64),
    (32, 16, 32),
    (16, 8, 32),
    (4, 2, 4),
    (8, 2, 4),
    (6, 3, 3),
    (1, 1, 5),
    (5, 5, 5),
    (12, 1, 3),
    (2, 2, 8),
]


@pytest.mark.parametrize(("block", "stride", "select_block"), SIZES)
@pytest.mark.parametrize("length", [1, 31, 64, 97, 200])
def test_block_scores_count_the_tokens_that_blocks_share(block, stride, select_block, length):
    count = nsa.num_compressed(length, block, stride)
    num_blocks = -(-length // select_block)
    share = torch.rand(3, 2, max(1, count), dtype=torch.float64)
    share[..., count:] = 0
    want = torch.zeros(3, 2, num_blocks, dtype=torch.float64)
    for i in range(count):
        for s in range(i * stride, i * stride + block):
            want[..., s // select_block] += share[..., i] / stride
    torch.testing.assert_close(block_scores(share, block, stride, select_block, num_blocks), want)


def test_the_papers_sizes_have_the_weights_1_2_2_2_1():
    assert overlap_taps(32, 16, 64) == (-1, [1, 2, 2, 2, 1])


def brute_force(score, time, end, select_block, count):
    own = time // select_block
    chosen = {0, own, max(0, own - 1)}
    last = min(end // select_block, len(score) - 1)
    free = sorted((j for j in range(last + 1) if j not in chosen), key=lambda j: (-score[j], j))
    return chosen | set(free[: count - len(chosen)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_choices_are_the_best_with_ties_to_the_earlier_and_none_twice(data):
    num_blocks = data.draw(st.integers(1, 12))
    select_block = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(NUM_FORCED, 8))
    length = num_blocks * select_block - data.draw(st.integers(0, select_block - 1))
    prefix = data.draw(st.integers(0, length))
    levels = torch.tensor([0.0, 0.25, 0.5, 1e-30, 3.0])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    score = levels[torch.randint(5, (length, num_blocks), generator=generator)]
    time = torch.arange(length)
    end = torch.where(time < prefix, prefix - 1, time)
    index = choose_blocks(score[:, None], time, end, select_block, count)
    assert index.shape == (length, 1, count)
    for t, row in enumerate(index[:, 0].tolist()):
        chosen = [j for j in row if j >= 0]
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) == brute_force(score[t].tolist(), t, int(end[t]), select_block, count)


def test_the_first_and_the_local_blocks_are_always_there_once():
    case = Case((37,), (0,))
    inputs, layout = case.inputs(), case.layout()
    for t, (row,) in enumerate(inputs.run(layout, case.count)[1].tolist()):
        own = t // case.select_block
        valid = [j for j in row if j >= 0]
        assert {0, own, max(own - 1, 0)} <= set(valid)
        assert len(valid) == len(set(valid)) == min(case.count, own + 1)


def test_zero_scored_past_blocks_come_before_future_ones():
    time = torch.tensor([19])
    index = choose_blocks(torch.zeros(1, 1, 9), time, time, 4, 5)
    assert sorted(index[0, 0].tolist()) == [0, 1, 2, 3, 4]


def test_a_token_of_the_prefix_chooses_among_all_its_blocks_and_no_later_one():
    score = torch.zeros(1, 1, 9)
    score[..., 5], score[..., 6], score[..., 8] = 2.0, 3.0, 9.0
    index = choose_blocks(score, torch.tensor([1]), torch.tensor([27]), 4, 3)
    assert sorted(index[0, 0].tolist()) == [0, 5, 6]


def test_a_choice_is_one_for_a_group_and_may_differ_between_groups():
    case = Case((60,), (0,), heads=6, kv_heads=2)
    index = case.inputs().run(case.layout(), case.count)[1]
    assert index.shape == (60, 2, case.count)
    sets = choices_of(index)
    assert any(heads[0] != heads[1] for heads in sets)


@pytest.mark.parametrize("head", range(6))
def test_any_head_of_a_group_can_change_its_choice_and_only_its(head):
    case = Case((60,), (0,), heads=6, kv_heads=2)
    inputs, layout = case.inputs(), case.layout()
    before = choices_of(inputs.run(layout, case.count)[1])
    inputs.q[:, head] *= -4
    after = choices_of(inputs.run(layout, case.count)[1])
    group = head // 3
    assert any(a[group] != b[group] for a, b in zip(after, before, strict=True))
    assert all(a[1 - group] == b[1 - group] for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_choices_of_lower_precision_differ_in_nearly_tied_blocks_only(dtype):
    case = Case((90, 41), (30, 0), heads=4, kv_heads=2, count=5)
    layout, low = case.layout(), case.inputs(dtype)
    exact = case.inputs(dtype)
    for name, tensor in vars(exact).items():
        setattr(exact, name, tensor.double())
    found = []
    for inputs in (low, exact):
        _, share = nsa.compressed_attention(
            inputs.q, inputs.k_compressed, inputs.v_compressed, layout, want_share=True
        )
        sizes = (case.block, case.stride, case.select_block, layout.most_select_blocks)
        found.append((choices_of(nsa.select_blocks(share, layout, 5)), block_scores(share, *sizes)))
    (got, _), (want, scores) = found
    for t, heads in enumerate(want):
        for h, chosen in enumerate(heads):
            extra, lost = got[t][h] - chosen, chosen - got[t][h]
            assert len(extra) == len(lost)
            for a in extra:
                for b in lost:
                    assert abs(scores[t, h, a] - scores[t, h, b]) < 1e-4


def test_the_inverse_index_names_every_choice_once_and_nothing_else():
    case = Case((30, 1, 17), (4, 0, 17), heads=4, kv_heads=2, count=4)
    layout = case.layout()
    index = case.inputs().run(layout, case.count)[1].clone()
    index[5] = -1
    inverse = invert_index(index, layout)
    blocks = layout.selectable.blocks
    num_blocks = len(blocks.doc_M)
    assert inverse.offset_Z1[-1] == (index >= 0).sum()
    assert sorted(inverse.pair_P.tolist()) == list(range(index.numel()))
    rebuilt = torch.full_like(index, -1).flatten()
    for z in range(2 * num_blocks):
        pairs = inverse.pair_P[inverse.offset_Z1[z] : inverse.offset_Z1[z + 1]]
        assert torch.equal(pairs, pairs.sort().values)  # tokens ascending
        token, head = pairs // 4 // 2, pairs // 4 % 2
        assert (head == z // num_blocks).all()
        assert (layout.doc_N[token] == blocks.doc_M[z % num_blocks]).all()
        rebuilt[pairs] = blocks.number_M[z % num_blocks]
    assert torch.equal(rebuilt.view_as(index), index)


def test_block_0_is_chosen_by_every_token_and_still_right(agrees):
    case = Case((150,), (0,), heads=1, kv_heads=1, width=4, value_width=4, count=4)
    layout = case.layout()
    inverse = invert_index(case.inputs().run(layout, case.count)[1], layout)
    assert inverse.offset_Z1[1] == 150  # over more than two tiles
    agrees(case)
