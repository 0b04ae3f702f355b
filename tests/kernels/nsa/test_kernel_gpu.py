"""What only a GPU can show of NSA's kernels: no waiting, CUDA graphs, places beyond 2^31."""

import pytest
import torch

from tiny_onn_kernels.nsa import reference
from tiny_onn_kernels.nsa.cases import Case

kernel_selected = pytest.importorskip("tiny_onn_kernels.nsa.kernel_selected")
kernel_selected_plan = pytest.importorskip("tiny_onn_kernels.nsa.kernel_selected_plan")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = (4, 2, 4)

LONG = {"block": 32, "stride": 16, "select_block": 64, "count": 16, "window": 512}
SHORT = {"block": 32, "stride": 16, "select_block": 32, "count": 8, "window": 128}


def shape(heads, kv_heads, width):
    return {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": width}


SETTINGS = (shape(64, 4, 128) | LONG, shape(12, 12, 64) | SHORT, shape(16, 2, 64) | SHORT)


@pytest.fixture(params=["queries first", "keys first", "sliced"])
def way(request, monkeypatch):
    """Every way of the selected branch."""
    share = 0 if request.param == "queries first" else 1000
    monkeypatch.setattr(kernel_selected_plan, "KEYS_FIRST_SHARE", share)
    if request.param == "sliced":
        monkeypatch.setattr(kernel_selected, "tokens_of_a_slice", lambda *_: 1024)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_values_and_gradients_at_the_presets_shapes(setting, kernel, way, assert_close):
    """Packed documents of some thousand tokens in bfloat16, against the reference in float32 with
    the same choices; two runs give the same bits."""
    case = Case((2100, 1, 700, 33), (0, 0, 150, 33), **setting)
    inputs, layout = case.inputs(torch.bfloat16, "cuda"), case.layout("cuda")
    leaves = [t.requires_grad_() for t in inputs.tensors()]
    pull = torch.randn(sum(case.lengths), case.heads, case.value_width, device="cuda")

    def run(implementation, tensors, index=None):
        out, index = implementation.nsa_attention(*tensors, layout, case.count, index)
        return index, [out, *torch.autograd.grad(out, tensors, pull.to(out))]

    index, got = run(kernel, leaves)
    again, repeated = run(kernel, leaves)
    assert torch.equal(index, again)
    assert all(torch.equal(a, b) for a, b in zip(got, repeated, strict=True))
    wide = [t.detach().float().requires_grad_() for t in leaves]
    for a, b in zip(got, run(reference, wide, index)[1], strict=True):
        assert_close(a, b, 1e-2)


def test_a_training_step_waits_for_nothing(kernel, way):
    case = Case((2000, 61), (0, 17), heads=8, kv_heads=2, width=32, value_width=32)
    inputs, layout = case.inputs(torch.bfloat16, "cuda"), case.layout("cuda")
    layout.compute_for_kernels()
    leaves = [t.requires_grad_() for t in inputs.tensors()]
    for mode in (0, 2):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, _ = inputs.run_with(kernel, layout, case.count)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode(0)


def decode(kernel, q_BHD, caches, time_B, count=5, window=9):
    """A step of all branches on shared caches; the compressed one reads time // d of its rows."""
    block, stride, select_block = SIZES
    count_B = ((time_B + 1 - block + stride) // stride).clamp(min=0)
    compressed, share_BKC = kernel.decode_compressed(q_BHD, *caches, count_B)
    blocks = caches[0].shape[2] // select_block
    index_BKn = kernel.choose_in_step(share_BKC, time_B, *SIZES, blocks, count)
    selected = kernel.decode_selected(q_BHD, *caches, index_BKn, time_B, select_block)
    return compressed + 2 * selected + 3 * kernel.decode_window(q_BHD, *caches, time_B, window)


def test_a_decoding_step_is_recorded_once_and_replayed_at_any_time(kernel):
    def normal(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q_BHD, caches = normal(3, 8, 32), [normal(3, 2, 96, 32) for _ in range(2)]
    time_B = torch.tensor([0, 40, 95], device="cuda")
    decode(kernel, q_BHD, caches, time_B)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BHD = decode(kernel, q_BHD, caches, time_B)
    for times in ([0, 40, 95], [7, 8, 9], [95, 3, 64]):
        time_B.copy_(torch.tensor(times))
        q_BHD.normal_()
        graph.replay()
        assert torch.equal(out_BHD, decode(kernel, q_BHD, caches, time_B))


@pytest.mark.slow
def test_places_beyond_two_to_the_31(kernel, way):
    """The last document of a batch whose queries have more than 2^31 numbers is as if alone."""
    tail, width, heads = 40, 128, 64
    long = 2**31 // (width * heads) + 100

    def run(lengths):
        case = Case(lengths, (0,) * len(lengths), heads, 2, width, width, **SHORT)
        layout = case.layout("cuda")
        rows = len(layout.compressed_rows_ML)
        generator = torch.Generator("cuda").manual_seed(5)
        last_rows = case.layout("cuda").compressed.doc_M.eq(len(lengths) - 1).sum()

        def leaf(count, num_heads, own):
            x = torch.zeros(count, num_heads, width, device="cuda", dtype=torch.bfloat16)
            x[-own:].normal_(generator=generator)
            return x.requires_grad_()

        q, k, v = leaf(sum(lengths), heads, tail), *(leaf(sum(lengths), 2, tail) for _ in "kv")
        compressed = [leaf(rows, 2, int(last_rows)) for _ in "kv"]
        gates = torch.full((sum(lengths), heads, 3), 0.5, device="cuda", dtype=torch.bfloat16)
        tensors = (q, *compressed, k, v, k, v)
        out, _ = kernel.nsa_attention(*tensors, gates, layout, case.count)
        grads = torch.autograd.grad(out[-tail:].square().sum(), (q, k, v))
        return [t[-tail:] for t in (out, *grads)]

    for got, want in zip(run((long, tail)), run((tail,)), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
