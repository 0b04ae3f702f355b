"""Packed equals alone, and every dtype near float64 (properties 15, 17 and 19 of NSA's list)."""

import pytest
import torch

from tiny_onn_kernels.nsa.cases import Case

OPTIONS = {"heads": 4, "kv_heads": 2, "count": 4, "tile": 16}
LENGTHS, PREFIXES = (17, 1, 3, 30, 8, 17), (5, 1, 0, 0, 8, 17)


def one_by_one(case, pipeline, tensors, weights):
    """Outputs, choices and gradients of each document alone."""
    start, found = 0, []
    for length, prefix in zip(case.lengths, case.prefixes, strict=True):
        alone = Case((length,), (prefix,), **OPTIONS)
        rows = slice(start, start + length)
        found.append(run(alone, pipeline, [t[rows] for t in tensors], weights))
        start += length
    outputs = [torch.cat(parts) for parts in zip(*(f[0] for f in found), strict=True)]
    gradients = [torch.cat(parts) for parts in zip(*(f[1] for f in found), strict=True)]
    return outputs, gradients, [sum(parts) for parts in zip(*(f[2] for f in found), strict=True)]


def run(case, pipeline, tensors, weights):
    tensors = [t.clone().requires_grad_() for t in tensors]
    weights = [w.clone().requires_grad_() for w in weights]
    outputs = pipeline(*tensors, weights, case.layout(), case.count)
    loss = sum(out.square().sum() for out in outputs[:3])
    gradients = torch.autograd.grad(loss, tensors + weights)
    return outputs, gradients[:3], gradients[3:]


@pytest.mark.parametrize("order", [range(6), (3, 0, 5, 1, 4, 2), (1, 2, 4, 0, 5, 3)])
def test_packed_documents_equal_each_alone_in_any_order(order, pipeline, phi):
    case = Case(tuple(LENGTHS[i] for i in order), tuple(PREFIXES[i] for i in order), **OPTIONS)
    inputs, weights = case.inputs(), phi(case.block, case.width)
    tensors = [inputs.q, inputs.k_window, inputs.v_window]
    outputs, gradients, phi_gradients = run(case, pipeline, tensors, weights)
    expected, expected_gradients, expected_phi = one_by_one(case, pipeline, tensors, weights)
    assert torch.equal(outputs[3], expected[3])
    for got, want in zip(outputs[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(
        (*gradients, *phi_gradients), (*expected_gradients, *expected_phi), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_documents_do_not_reach_each_other(pipeline, phi):
    case = Case(LENGTHS, PREFIXES, **OPTIONS)
    inputs, weights = case.inputs(), phi(case.block, case.width)
    tensors = [inputs.q, inputs.k_window, inputs.v_window]
    before = pipeline(*tensors, weights, case.layout(), case.count)
    for tensor in tensors:
        tensor[21:51] *= -3  # the document of 30
    after = pipeline(*tensors, weights, case.layout(), case.count)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[:21], b[:21])
        torch.testing.assert_close(a[51:], b[51:])
        assert not torch.equal(a[21:51], b[21:51])


def relative_rms(got, want):
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


def eager(q, k, v, visible):
    """Softmax attention in the tensors' own dtype throughout."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hnm,mhe->nhe", weights, v)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_every_dtype_is_near_float64_and_no_worse_than_eager(dtype, limit, branches):
    case = Case((120,), (40,), 8, 2, 32, 32, block=8, stride=4, select_block=8, count=5, window=24)
    layout, low = case.layout(), case.inputs(dtype)
    exact = case.inputs(dtype)
    for name, tensor in vars(exact).items():
        setattr(exact, name, tensor.double())
    *want, _, index = branches(exact, layout, case.count)
    got = branches(low, layout, case.count, index)[:3]
    token, end = torch.arange(120), layout.end_N[:, None]
    first, stop = (t[:, None] for t in _bounds(layout))
    blocks = torch.arange(len(low.k_compressed))
    chosen = (index[..., None] == token // 8).any(2).transpose(0, 1)  # (K, N, T)
    visible = (
        blocks * 4 + 7 <= end,
        (chosen & (token <= end)).repeat_interleave(4, dim=0),
        (token >= first) & (token < stop),
    )
    pairs = (
        (low.k_compressed, low.v_compressed),
        (low.k_selected, low.v_selected),
        (low.k_window, low.v_window),
    )
    for out, expected, mask, (k, v) in zip(got, want, visible, pairs, strict=True):
        assert out.dtype == dtype
        error = relative_rms(out, expected)
        plain = relative_rms(eager(low.q, k, v, mask), expected)
        assert error <= limit and error <= 2 * plain


def _bounds(layout):
    from tiny_onn_kernels.nsa.layout import window_bounds

    return window_bounds(layout.time_N, layout.prefix_B[layout.doc_N], layout.window)


def test_autocast_does_not_lower_the_precision_inside():
    case = Case((60, 20), (0, 9), heads=4, kv_heads=2)
    inputs, layout = case.inputs(torch.float32), case.layout()
    plain = inputs.run(layout, case.count)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inputs.run(layout, case.count)[0], plain[0])


def test_autocast_around_the_backward_pass_does_not_lower_it_either(branches):
    case = Case(LENGTHS, PREFIXES, **OPTIONS)

    def gradients(autocast):
        inputs = case.inputs(torch.float32).require_grad()
        outputs = branches(inputs, case.layout(), case.count)[:3]
        loss = sum(out.square().sum() for out in outputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(loss, inputs.tensors()[:-1])

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_memory_holds_no_matrix_of_tokens_by_tokens(monkeypatch):
    """The largest tensor that forward and backward make grows with T (n l' + w) and T T / d."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    Largest.num_bytes = max(Largest.num_bytes, tensor.untyped_storage().nbytes())
            return out

    length = 1024
    case = Case((length,), (0,), 2, 1, 4, 4, 32, 16, 32, count=3, window=32)
    inputs, layout = case.inputs(torch.float32).require_grad(), case.layout()
    with Largest():
        out, _ = inputs.run(layout, case.count)
        out.sum().backward()
    numbers = length * 2 * (3 * 32 + 32 + 64 + 4 * 3) + length * length // 16 * 2
    assert Largest.num_bytes <= 4 * 2 * numbers
    assert Largest.num_bytes < 4 * length * length
