"""Every attention back-end equals the per-document float64 softmax, values and gradients."""

import pytest
import torch

from tiny_onn.model import packed_attention
from tiny_onn.model.packed_attention import (
    DocumentSpans,
    group_documents,
    plan_reference,
    plan_sdpa,
    plan_varlen,
)

LENGTHS = [(1,), (5,), (1, 1, 7), (3, 4, 4, 9, 30), (17, 64, 64), (300,)]


def make_spans(lengths, prefix_share):
    prefixes = tuple(int(n * prefix_share) for n in lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return DocumentSpans(cu, torch.tensor(prefixes), tuple(lengths), prefixes)


def naive(q, k, v, spans):
    """Three loops: document, head, query."""
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    start = 0
    for length, prefix in zip(spans.lengths, spans.prefixes, strict=True):
        for h in range(q.shape[1]):
            for i in range(length):
                last = max(i + 1, prefix) if i < prefix else i + 1
                keys = k[start : start + last, h // groups]
                weights = (keys @ q[start + i, h] * q.shape[-1] ** -0.5).softmax(0)
                out[start + i, h] = weights @ v[start : start + last, h // groups]
        start += length
    return out


def tensors(lengths, heads, kv_heads, width=8):
    torch.manual_seed(0)
    total = sum(lengths)
    shapes = [(total, heads, width), (total, kv_heads, width), (total, kv_heads, width)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("lengths", LENGTHS[:4])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_reference_equals_three_loops(lengths, share):
    spans = make_spans(lengths, share)
    q, k, v = tensors(lengths, 4, 2)
    torch.testing.assert_close(plan_reference(spans)(q, k, v), naive(q, k, v, spans))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("short", [0, 256, "torch"])
def test_sdpa_equals_reference_in_values_and_gradients(
    lengths, share, kv_heads, short, monkeypatch
):
    if short != "torch":  # "torch": what float64 and float32 take by default
        monkeypatch.setattr(packed_attention, "SHORT_TOKENS", short)
        monkeypatch.setattr(packed_attention, "SHORT_DTYPES", (torch.float64,))
    spans = make_spans(lengths, share)
    inputs = tensors(lengths, 4, kv_heads)
    weight = torch.randn(sum(lengths), 4, 8, dtype=torch.float64)
    results = []
    for plan in (plan_reference, plan_sdpa):
        out = plan(spans)(*inputs)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_two_varlen_calls_make_prefix_attention(share, dense_varlen):
    lengths = (3, 4, 9, 30)
    spans = make_spans(lengths, share)
    inputs = tensors(lengths, 4, 4)
    weight = torch.randn(sum(lengths), 4, 8, dtype=torch.float64)
    results = []
    for attend in (plan_varlen(spans, dense_varlen), plan_reference(spans)):
        out = attend(*inputs)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_documents_do_not_see_each_other():
    spans = make_spans((6, 6, 7), 0.5)
    q, k, v = (t.detach() for t in tensors((6, 6, 7), 2, 2))
    before = plan_sdpa(spans)(q, k, v)
    k[6:12] += 100.0
    v[6:12] += 100.0
    after = plan_sdpa(spans)(q, k, v)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[12:], after[12:])
    assert not torch.equal(before[6:12], after[6:12])


def test_prefix_sees_itself_both_ways_and_the_rest_is_causal():
    spans = make_spans((8,), 0.5)
    q, k, v = (t.detach() for t in tensors((8,), 1, 1))
    out = plan_sdpa(spans)(q, k, v)
    k2, v2 = k.clone(), v.clone()
    k2[3] += 1.0
    changed = (plan_sdpa(spans)(q, k2, v) - out).abs().amax((1, 2)) > 1e-9
    assert changed.tolist() == [True] * 8  # a prefix key reaches every query, earlier ones too
    v2[6] += 1.0
    changed = (plan_sdpa(spans)(q, k, v2) - out).abs().amax((1, 2)) > 1e-9
    assert changed.tolist() == [False] * 6 + [True] * 2


def test_groups_cover_documents_in_order_and_bound_the_padding():
    lengths = tuple(sorted([5, 5, 5, 6, 40, 41, 41, 190, 12, 13]))
    runs = group_documents(lengths)
    assert [r[0] for r in runs[1:]] == [r[1] for r in runs[:-1]]
    assert runs[0][0] == 0 and runs[-1][1] == len(lengths)
    for first, last, longest in runs:
        assert longest == max(lengths[first:last])
        real = sum(lengths[first:last])
        assert longest * (last - first) <= (1 + packed_attention.PADDING_WASTE) * real + 1e-9
