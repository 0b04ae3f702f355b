"""The branches against the definitions, full attention and their limits (properties 1-4, 11-13,
20, 22, 23 of NSA's list)."""

from dataclasses import replace

import pytest
import torch

from tiny_onn_kernels.nsa import reference as nsa
from tiny_onn_kernels.nsa.cases import CASES, Case
from tiny_onn_kernels.nsa.compressed import compress, take_blocks

PACKED = (
    Case((5, 1, 17, 30), (0, 0, 0, 0), heads=4, kv_heads=2, tile=8),
    Case((5, 1, 17, 30), (3, 1, 17, 9), heads=4, kv_heads=2, tile=8),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_branches_scores_and_choices_equal_the_definitions(case, agrees):
    agrees(case)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_enough_blocks_make_the_selected_branch_full_attention(case, branches, full_attention):
    case = replace(case, count=8)
    inputs, layout = case.inputs(), case.layout()
    selected = branches(inputs, layout, case.count)[1]
    want = full_attention(inputs.q, inputs.k_selected, inputs.v_selected, layout)
    torch.testing.assert_close(selected, want)


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("window", [30, 31, 200])
def test_a_window_as_long_as_the_document_is_full_attention(case, window, full_attention):
    case = replace(case, window=window)
    inputs, layout = case.inputs(), case.layout()
    tensors = (inputs.q, inputs.k_window, inputs.v_window, layout)
    torch.testing.assert_close(nsa.window_attention(*tensors), full_attention(*tensors))


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_a_window_of_one_returns_the_own_value(case):
    case = replace(case, window=1)
    inputs = case.inputs()
    window = nsa.window_attention(inputs.q, inputs.k_window, inputs.v_window, case.layout())
    torch.testing.assert_close(window, inputs.v_window.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("window", [1, 2, 5, 6, 100])
@pytest.mark.parametrize("prefix", [0, 4, 20])
def test_a_window_has_w_keys_the_own_among_them(window, prefix):
    layout = Case((20, 3), (prefix, 0), window=window, tile=4).layout()
    row_SC, visible_SCR = layout.window_keys
    seen = torch.zeros(23, 23, dtype=torch.long)
    tiles = layout.tiles
    for s in range(len(row_SC)):
        for r, token in enumerate(tiles.token_X.view(len(row_SC), -1)[s].tolist()):
            if token >= 0:
                seen[token].index_add_(0, row_SC[s], visible_SCR[s, :, r].long())
    assert seen.max() == 1 and (seen.diagonal() == 1).all()
    available = layout.end_N + 1
    assert torch.equal(seen.sum(1), available.clamp(max=window))


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_blocks_of_one_with_identity_phi_make_the_compressed_branch_full_attention(
    case, full_attention
):
    case = replace(case, block=1, stride=1)
    inputs, layout = case.inputs(), case.layout()
    identity = (torch.zeros(1, 1, 8), torch.randn(8, 8), torch.zeros(8, 8))
    k, v = (
        compress(take_blocks(t, layout), *(p.double() for p in identity))
        for t in (inputs.k_window, inputs.v_window)
    )
    torch.testing.assert_close(k, inputs.k_window)
    got, _ = nsa.compressed_attention(inputs.q, k, v, layout)
    torch.testing.assert_close(
        got, full_attention(inputs.q, inputs.k_window, inputs.v_window, layout)
    )


def test_phi_pools_position_coded_blocks_by_mean_and_perceptron(phi):
    position, inner, outer = phi(4, 3)
    x = torch.randn(7, 4, 2, 3, dtype=torch.float64)
    got = compress(x, position, inner, outer)
    for m in range(7):
        for h in range(2):
            z = x[m, :, h] + position[:, 0]
            hidden = torch.nn.functional.gelu(inner @ z.reshape(-1))
            torch.testing.assert_close(got[m, h], z.mean(0) + outer @ hidden)


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_one_hot_gates_isolate_a_branch(branch, branches):
    case = PACKED[1]
    inputs, layout = case.inputs(), case.layout()
    inputs.gate = torch.eye(3, dtype=torch.float64)[branch].expand_as(inputs.gate)
    out, _ = inputs.run(layout, case.count)
    torch.testing.assert_close(out, branches(inputs, layout, case.count)[branch])


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_three_full_branches_gated_by_a_third_are_full_attention(case, full_attention):
    case = replace(case, block=1, stride=1, count=8, window=30)
    inputs, layout = case.inputs(), case.layout()
    k, v = inputs.k_window, inputs.v_window
    inputs.k_compressed = inputs.k_selected = k
    inputs.v_compressed = inputs.v_selected = v
    inputs.gate = torch.full_like(inputs.gate, 1 / 3)
    torch.testing.assert_close(
        inputs.run(layout, case.count)[0], full_attention(inputs.q, k, v, layout)
    )


@pytest.mark.parametrize("lengths", [(3,), (1, 2, 3), (3, 40, 2)])
def test_tokens_that_no_whole_block_precedes_get_exactly_zero_and_finite_gradients(lengths):
    case = Case(lengths, (0,) * len(lengths), block=4, stride=2, select_block=2)
    inputs, layout = case.inputs().require_grad(), case.layout()
    out, _ = nsa.compressed_attention(inputs.q, inputs.k_compressed, inputs.v_compressed, layout)
    early = layout.end_N < case.block - 1
    assert early.any() and (out[early] == 0).all()
    assert (out[~early].abs().amax((1, 2)) > 0).all()
    (out * torch.randn_like(out)).sum().backward()
    assert (inputs.q.grad[early] == 0).all()
    for tensor in (inputs.q, inputs.k_compressed, inputs.v_compressed):
        assert tensor.grad.isfinite().all()


def test_a_prefix_sees_whole_blocks_ahead_but_none_that_crosses_its_end():
    layout = Case((12,), (7,), block=4, stride=2).layout()  # blocks end at 3, 5, 7, 9, 11
    _, visible_SCR = layout.compressed_keys
    counts = visible_SCR[0, :, :12].sum(0).tolist()
    assert counts == [2, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize("rows", ["some", "all"])
def test_rows_without_any_block_are_zero_with_finite_gradients(rows):
    case = Case((9, 6), (0, 4), heads=4, kv_heads=2)
    inputs, layout = case.inputs().require_grad(), case.layout()
    _, index = inputs.run(layout, case.count)
    empty = torch.ones(15, dtype=torch.bool) if rows == "all" else torch.arange(15) % 3 == 0
    index = index.masked_fill(empty[:, None, None], -1)
    out = nsa.selected_attention(inputs.q, inputs.k_selected, inputs.v_selected, index, layout)
    assert (out[empty] == 0).all() and out.isfinite().all()
    (out * torch.randn_like(out)).sum().backward()
    for tensor in (inputs.q, inputs.k_selected, inputs.v_selected):
        assert tensor.grad.isfinite().all()
    assert (inputs.q.grad[empty] == 0).all()


@pytest.mark.parametrize("size", [100.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_constant_values_come_back(size, dtype, branches):
    case = Case((40, 2), (0, 2), heads=4, kv_heads=2, tile=16)
    inputs, layout = case.inputs(dtype), case.layout()
    for name in ("k_compressed", "k_selected", "k_window"):
        getattr(inputs, name)[0] = size  # token 0 as a sink, or as the opposite
        getattr(inputs, name)[3] = -size
    for name in ("v_compressed", "v_selected", "v_window"):
        getattr(inputs, name).fill_(1.5)
    inputs.q.abs_()
    inputs.require_grad()
    compressed, selected, window, *_ = branches(inputs, layout, case.count)
    late = layout.end_N >= case.block - 1
    for out in (compressed[late], selected, window):
        torch.testing.assert_close(out, torch.full_like(out, 1.5))
    (compressed.square().sum() + selected.square().sum() + window.square().sum()).backward()
    for tensor in inputs.tensors()[:7]:
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("width", "value_width"), [(32, 32), (64, 16), (80, 80), (128, 64)])
def test_any_group_size_head_width_and_stride(groups, width, value_width, full_attention):
    case = Case((21,), (6,), groups * 2, 2, width, value_width, count=6, window=21, tile=8)
    inputs, layout = case.inputs(), case.layout()
    q, _, _, k, v, *_ = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs.tensors())
    assert not q.is_contiguous()
    want = full_attention(q, k, v, layout)
    choices = torch.arange(6).expand(21, 2, 6)
    torch.testing.assert_close(nsa.selected_attention(q, k, v, choices, layout), want)
    torch.testing.assert_close(nsa.window_attention(q, k, v, layout), want)


def test_grouped_queries_equal_repeated_heads_and_keys_gather_the_groups_gradient(branches):
    case = Case((23, 9), (5, 0), heads=6, kv_heads=2)
    inputs, layout = case.inputs().require_grad(), case.layout()
    repeated = replace(case, kv_heads=6).inputs()
    index = inputs.run(layout, case.count)[1]
    for name, tensor in vars(inputs).items():
        copied = tensor if name in ("q", "gate") else tensor.repeat_interleave(3, dim=1)
        setattr(repeated, name, copied.detach())
    repeated.require_grad()
    weight = torch.randn(32, 6, 8, dtype=torch.float64)
    got, _ = inputs.run(layout, case.count, index)
    want, _ = repeated.run(layout, case.count, index.repeat_interleave(3, dim=1))
    torch.testing.assert_close(got, want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for name, tensor in vars(inputs).items():
        expected = getattr(repeated, name).grad
        if name not in ("q", "gate"):
            expected = expected.unflatten(1, (2, 3)).sum(2)
        torch.testing.assert_close(tensor.grad, expected)


def test_long_documents_take_longer_tiles_and_agree(monkeypatch):
    from tiny_onn_kernels.nsa import layout as module

    case = Case((90, 7), (20, 0), heads=4, kv_heads=2)
    outputs = []
    for long in (10_000, 8):
        monkeypatch.setattr(module, "LONG", long)
        monkeypatch.setattr(module, "LONG_TILE", 70)
        outputs.append(case.inputs().run(case.layout(), case.count)[0])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(
    "sizes", [(4, 3, 6, 5), (6, 3, 4, 5), (4, 0, 4, 5), (0, 1, 4, 5), (4, 2, 4, 0)]
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    names = ("block", "stride", "select_block", "window")
    with pytest.raises(ValueError, match="stride that divides both"):
        nsa.lay_out(torch.tensor([0, 5]), **dict(zip(names, sizes, strict=True)))


def test_lengths_are_read_from_the_offsets_if_not_given():
    layout = nsa.lay_out(torch.tensor([0, 5, 6]), block=2, stride=1, select_block=2, window=3)
    assert layout.lengths == (5, 1) and layout.end_N.tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("sizes", [(4, 2), (4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(9, 6, 3), (5,), (2, 1), (40, 1, 12)], ids=str)
def test_phi_by_chunks_is_phi_of_every_block_in_values_and_gradients(sizes, lengths):
    block, stride = sizes
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    layout = nsa.lay_out(offsets, block=block, stride=stride, select_block=block * stride, window=4)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x_NKD = leaf(sum(lengths), 2, 5)
    weights = (leaf(block, 1, 5), leaf(7, block * 5), leaf(5, 7))
    by_chunks = nsa.compress_packed(x_NKD, layout, *weights)
    by_blocks = nsa.compress(nsa.take_blocks(x_NKD, layout), *weights)
    torch.testing.assert_close(by_chunks, by_blocks, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(by_blocks)
    for a, b in zip(
        torch.autograd.grad(by_chunks, (x_NKD, *weights), pull),
        torch.autograd.grad(by_blocks, (x_NKD, *weights), pull),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
