"""Blocks that the fused selection chooses, held against the reference's in float64."""

import pytest
import torch

from tiny_onn_kernels.nsa import reference
from tiny_onn_kernels.nsa.cases import Case, choices_of

pytestmark = pytest.mark.usefixtures("poison")

SIZES = ((4, 2, 4), (32, 16, 64), (8, 2, 4), (6, 3, 3), (1, 1, 5), (5, 5, 5), (12, 1, 3), (2, 2, 8))
NEARLY_TIED = 1e-5
"""Scores of float32 that may rank either way."""


def chosen(implementation, inputs, layout, count):
    return implementation.attend_compressed_and_choose(*inputs.tensors()[:3], layout, count)[1]


@pytest.fixture
def same_choices(kernel, device):
    """Asserts that choices differ from the reference's in nearly tied blocks only."""

    def check(case):
        low, layout = case.inputs(torch.float32, device), case.layout(device)
        got = chosen(kernel, low, layout, case.count)
        exact, on_cpu = case.inputs(torch.float64), case.layout()
        for name, tensor in vars(low).items():
            setattr(exact, name, tensor.double().cpu())
        _, share = reference.compressed_attention(*exact.tensors()[:3], on_cpu, want_share=True)
        sizes = (case.block, case.stride, case.select_block, on_cpu.most_select_blocks)
        scores = reference.block_scores(share, *sizes)
        want = reference.select_blocks(share, on_cpu, case.count)
        assert got.shape == want.shape and got.dtype == want.dtype
        pairs = zip(choices_of(got.cpu()), choices_of(want), strict=True)
        for t, (found, right) in enumerate(pairs):
            for h, (a, b) in enumerate(zip(found, right, strict=True)):
                assert len(a) == len(b) == (got[t, h] >= 0).sum()  # no block twice
                for extra in a - b:
                    lost = min(scores[t, h, j] for j in b - a)
                    assert abs(scores[t, h, extra] - lost) < NEARLY_TIED
        return got

    return check


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_block_lengths_and_strides(sizes, same_choices):
    block, stride, select_block = sizes
    length = 7 * max(block, select_block) + 3
    lengths, prefixes = (min(length, 130), block, 2), (0, block // 2, 2)
    options = {"block": block, "stride": stride, "select_block": select_block}
    same_choices(Case(lengths, prefixes, 2, 1, **options))


@pytest.mark.parametrize(("length", "prefix"), [(1, 0), (3, 3), (4, 0), (5, 2), (13, 13), (61, 0)])
def test_any_length_around_the_blocks_with_and_without_a_prefix(length, prefix, same_choices):
    same_choices(Case((length, 1), (prefix, 0), heads=2, kv_heads=1, count=4))


@pytest.mark.parametrize("heads", [1, 3, 16, 64])
def test_any_group_size(heads, same_choices):
    same_choices(Case((41, 6), (0, 0), heads, 1, 20, count=6))


def test_more_blocks_than_a_tile_holds(same_choices):
    case = Case((150,), (0,), 2, 1, block=1, stride=1, select_block=2, count=7)
    assert case.layout().most_select_blocks > 64
    same_choices(case)


def test_the_first_and_the_local_blocks_are_always_there(kernel, device):
    case = Case((37, 2), (0, 0), 4, 2)
    index = chosen(kernel, case.inputs(torch.float32, device), case.layout(device), case.count)
    for t, heads in enumerate(index.tolist()):
        own = (t if t < 37 else t - 37) // case.select_block
        for row in heads:
            assert {0, own, max(own - 1, 0)} <= set(row)
            assert sum(j >= 0 for j in row) == min(case.count, own + 1)


@pytest.mark.parametrize("head", [0, 2, 4])
def test_any_head_of_a_group_can_change_its_choice_and_only_its(head, kernel, device):
    case = Case((60,), (0,), heads=6, kv_heads=2)
    inputs, layout = case.inputs(torch.float32, device), case.layout(device)
    before = choices_of(chosen(kernel, inputs, layout, case.count))
    inputs.q[:, head] *= -4
    after = choices_of(chosen(kernel, inputs, layout, case.count))
    group = head // 3
    assert any(a[group] != b[group] for a, b in zip(after, before, strict=True))
    assert all(a[1 - group] == b[1 - group] for a, b in zip(after, before, strict=True))


def test_ties_go_to_the_earlier_block(kernel, device):
    case = Case((48,), (0,), 2, 1, block=4, stride=4, select_block=4, count=6)
    inputs, layout = case.inputs(torch.float32, device), case.layout(device)
    inputs.k_compressed.zero_()  # all blocks score the same
    index = chosen(kernel, inputs, layout, case.count)
    for t in range(47, 3, -4):
        own = t // 4
        want = {0, own, max(own - 1, 0)} | set(range(min(own, 4)))
        assert {j for j in index[t, 0].tolist() if j >= 0} == want


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_still_choose_the_reference_way(size, kernel, device):
    case = Case((44,), (0,), 4, 2)
    inputs, layout = case.inputs(torch.float32, device), case.layout(device)
    inputs.q.abs_()
    inputs.k_compressed[0] = size
    inputs.k_compressed[5] = 2 * abs(size)
    index = chosen(kernel, inputs, layout, case.count)
    assert all({2, 3} & {j for j in row if j >= 0} for row in index[20:, 0].tolist())
    assert index.max() <= 43 // 4 and index.min() >= -1


def test_shares_are_the_references(kernel, device, assert_close):
    case = Case((41, 3, 17), (7, 0, 17), heads=6, kv_heads=2)
    low, layout = case.inputs(torch.float32, device), case.layout(device)
    _, got = kernel.compressed_attention(*low.tensors()[:3], layout, want_share=True)
    exact = [t.double().cpu() for t in low.tensors()[:3]]
    _, want = reference.compressed_attention(*exact, case.layout(), want_share=True)
    assert_close(got, want, 1e-5)
