"""A decoding step by kernels: the reference's step, and the last row of a parallel forward."""

import pytest
import torch

from tiny_onn_kernels.nsa import decode as reference
from tiny_onn_kernels.nsa import reference as parallel
from tiny_onn_kernels.nsa.cases import Case, choices_of

pytestmark = pytest.mark.usefixtures("poison")

BATCHES = ((3, 4, 2, 8, 8), (1, 1, 1, 16, 24), (2, 6, 2, 20, 12))
"""Rows, heads, key/value heads, width, value width."""


@pytest.fixture(params=[16, 64])
def places(request, kernel, monkeypatch):
    """Small tiles split a step over several programs, large ones leave it to one."""
    from tiny_onn_kernels.nsa import kernel_decode

    monkeypatch.setattr(kernel_decode, "keys_beside_few_rows", lambda *_: request.param)
    return request.param


def step(sizes, room, device, seed=0):
    """A query, and keys and values of ``room`` places."""
    batch, heads, kv_heads, width, value_width = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    return (
        normal(batch, heads, width),
        normal(batch, kv_heads, room, width),
        normal(batch, kv_heads, room, value_width),
    )


@pytest.mark.parametrize("sizes", BATCHES, ids=str)
@pytest.mark.parametrize("room", [1, 15, 70])
def test_the_compressed_branch_and_its_shares(sizes, room, places, kernel, device, assert_close):
    tensors = step(sizes, room, device)
    count_B = torch.tensor([room, 0, room // 2])[: sizes[0]].to(device)
    got = kernel.decode_compressed(*tensors, count_B)
    want = reference.decode_compressed(*(t.double().cpu() for t in tensors), count_B.cpu())
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5)
    assert (got[0][count_B == 0] == 0).all()


@pytest.mark.parametrize("sizes", [(4, 2, 4), (32, 16, 64), (8, 2, 4), (6, 3, 3), (1, 1, 5)])
def test_choices_from_shares(sizes, kernel, device):
    block, stride, select_block = sizes
    time_B = torch.tensor([699, 0, block - 1, 350])
    count_B = (time_B + 1 - block + stride) // stride
    room = int(count_B.max()) + 3
    share_BKC = torch.rand(4, 2, room, generator=torch.Generator().manual_seed(1))
    share_BKC[torch.arange(room).expand(4, 2, room) >= count_B[:, None, None]] = 0
    options = (*sizes, 699 // select_block + 1, 7)
    got = kernel.choose_in_step(share_BKC.to(device), time_B.to(device), *options)
    want = parallel.choose_in_step(share_BKC, time_B, *options)
    assert choices_of(got.cpu()) == choices_of(want)


@pytest.mark.parametrize("sizes", BATCHES, ids=str)
@pytest.mark.parametrize("select_block", [3, 16, 20])
def test_the_selected_branch(sizes, select_block, places, kernel, device, assert_close):
    tensors = step(sizes, 70, device)
    time_B = torch.tensor([69, 0, 41])[: sizes[0]]
    index_BKn = torch.tensor([0, 2, -1, 1, -1]).expand(sizes[0], sizes[2], 5).clone()
    index_BKn = index_BKn.masked_fill(index_BKn * select_block > time_B[:, None, None], -1)
    got = kernel.decode_selected(*tensors, index_BKn.to(device), time_B.to(device), select_block)
    exact = (t.double().cpu() for t in tensors)
    assert_close(got, reference.decode_selected(*exact, index_BKn, time_B, select_block), 1e-5)


@pytest.mark.parametrize("sizes", BATCHES, ids=str)
@pytest.mark.parametrize("window", [1, 9, 50, 100])
def test_the_window(sizes, window, places, kernel, device, assert_close):
    tensors = step(sizes, 70, device)
    time_B = torch.tensor([69, 0, 41])[: sizes[0]]
    got = kernel.decode_window(*tensors, time_B.to(device), window)
    exact = (t.double().cpu() for t in tensors)
    assert_close(got, reference.decode_window(*exact, time_B, window), 1e-5)


def test_what_a_step_does_not_read_may_be_anything(kernel, device):
    q, k, v = step(BATCHES[0], 70, device)
    time_B = torch.tensor([69, 30, 41], device=device)
    index_BKn = torch.tensor([0, 2, -1], device=device).expand(3, 2, 3)
    read = torch.zeros(3, 70, dtype=torch.bool, device=device)
    read[:, 0:8] = read[:, 16:24] = True
    for b, t in enumerate(time_B.tolist()):
        read[b, t - 4 : t + 1] = True
        read[b, t + 1 :] = False
    poisoned = [t.masked_fill(~read[:, None, :, None], torch.nan) for t in (k, v)]
    for pair in ((k, v), poisoned):
        selected = kernel.decode_selected(q, *pair, index_BKn, time_B, 8)
        window = kernel.decode_window(q, *pair, time_B, 5)
        if pair[0] is k:
            want = (selected, window)
    assert torch.equal(selected, want[0]) and torch.equal(window, want[1])


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12, 13, 37])
def test_a_step_equals_the_last_row_of_a_parallel_forward(length, kernel, device):
    case = Case((length,), (0,), heads=4, kv_heads=2, window=5)
    inputs, layout = case.inputs(torch.float32, device), case.layout(device)
    q, kc, vc, ks, vs, kw, vw, _ = inputs.tensors()
    compressed, index = kernel.attend_compressed_and_choose(q, kc, vc, layout, case.count)
    _, share = kernel.compressed_attention(q, kc, vc, layout, want_share=True)
    selected = kernel.selected_attention(q, ks, vs, index, layout)
    window = kernel.window_attention(q, kw, vw, layout)
    last, time_B = q[-1:], torch.tensor([length - 1], device=device)
    count_B = torch.tensor([len(layout.compressed.doc_M)], device=device)

    def cache(x):
        return x.transpose(0, 1)[None]

    got, got_share = kernel.decode_compressed(last, cache(kc), cache(vc), count_B)
    torch.testing.assert_close(got, compressed[-1:])
    torch.testing.assert_close(got_share, share[-1:])
    got = kernel.decode_selected(last, cache(ks), cache(vs), index[-1:], time_B, case.select_block)
    torch.testing.assert_close(got, selected[-1:])
    got = kernel.decode_window(last, cache(kw), cache(vw), time_B, case.window)
    torch.testing.assert_close(got, window[-1:])
