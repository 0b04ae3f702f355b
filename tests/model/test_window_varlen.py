"""NSA's windows by flash-attn's function are NSA's windows."""

import pytest
import torch

from tiny_onn.arc.packing import pack
from tiny_onn.model.packed_attention import DocumentSpans
from tiny_onn.model.window_varlen import plan_window_varlen, window_runs
from tiny_onn.ops import nsa

LENGTHS = (30, 1, 7, 23, 16)
PREFIXES = {
    "causal": (0, 0, 0, 0, 0),
    "some": (17, 0, 7, 0, 9),
    "all": LENGTHS,
}


def spans_of(lengths, prefixes):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return DocumentSpans(cu, torch.tensor(prefixes), lengths, prefixes)


@pytest.mark.parametrize("window", [1, 2, 5, 8, 16, 40])
@pytest.mark.parametrize("kind", PREFIXES)
def test_values_and_gradients_are_the_references(kind, window, dense_varlen):
    prefixes = PREFIXES[kind]
    spans = spans_of(LENGTHS, prefixes)
    layout = nsa.lay_out(
        spans.cu_seqlens_B1,
        block=4,
        stride=2,
        select_block=4,
        window=window,
        prefix_lens_B=spans.prefix_lens_B,
        lengths=LENGTHS,
    )
    generator = torch.Generator().manual_seed(window)

    def normal(heads):
        shape = (sum(LENGTHS), heads, 6)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v, weight = normal(4), normal(2), normal(2), normal(4).detach()
    found = []
    for out in (
        plan_window_varlen(spans, window, dense_varlen)(q, k, v),
        nsa.window_attention(q, k, v, layout),
    ):
        found.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("prefix", [0, 5, 8, 9, 20, 21])
def test_runs_hold_each_query_once_in_order(prefix):
    runs = window_runs(21, prefix, 8)
    queries = [t for run in runs for t in range(run.first_query, run.stop_query)]
    assert queries == list(range(21))


def test_a_causal_batch_is_one_call_without_copies(dense_varlen):
    calls = []

    def watched(q, *rest):
        calls.append(q)
        return dense_varlen(q, *rest)

    q, k, v = (torch.randn(sum(LENGTHS), 2, 4) for _ in range(3))
    plan_window_varlen(spans_of(LENGTHS, PREFIXES["causal"]), 3, watched)(q, k, v)
    assert len(calls) == 1 and calls[0] is q


@pytest.mark.parametrize("changes", [{}, {"mask": "causal", "kv_heads": 2}], ids=str)
def test_the_network_with_flash_windows_is_the_network_without(
    changes, nsa_model, documents, dense_varlen, monkeypatch
):
    monkeypatch.setattr("tiny_onn.model.attention_plan.flash_varlen", lambda: dense_varlen)
    batch, found = pack(documents()), {}
    for backend in ("reference", "flash"):
        model = nsa_model(changes)
        model.attention_backend = backend
        plan = model.plan_attention(batch)
        assert plan.window.layout is None or (plan.window.sparse is None) == (backend != "flash")
        found[backend] = [model(batch).logits_MV]
        found[backend][0].square().mean().backward()
        found[backend] += [p.grad for p in model.parameters() if p.grad is not None]
    assert plan.window.sparse is not None
    for got, want in zip(found["flash"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
