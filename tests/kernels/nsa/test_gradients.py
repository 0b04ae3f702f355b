"""Who influences whom, gradients and determinism (properties 9, 10, 14 and 21 of NSA's list)."""

import pytest
import torch

from tiny_onn_kernels.nsa import reference as nsa
from tiny_onn_kernels.nsa.cases import Case, choices_of
from tiny_onn_kernels.nsa.compressed import compress, take_blocks

CASE = Case((40,), (0,), heads=4, kv_heads=2, block=6, stride=3, select_block=3, count=5, window=7)
PREFIX = Case((40,), (14,), heads=4, kv_heads=2, block=6, stride=3, select_block=3, window=7)


def raw(case, seed=0):
    """Queries, and one key and value a token."""
    inputs = case.inputs(seed=seed)
    return inputs.q, inputs.k_window, inputs.v_window


@pytest.mark.parametrize("case", [CASE, PREFIX], ids=["causal", "prefix"])
@pytest.mark.parametrize("token", [0, 1, 2, 3, 5, 6, 7, 13, 14, 15, 38, 39])
def test_what_a_token_holds_reaches_no_query_that_may_not_see_it(case, token, pipeline, phi):
    layout, weights = case.layout(), phi(case.block, case.width)
    tensors = raw(case)
    before = pipeline(*tensors, weights, layout, case.count)
    for tensor in tensors:
        tensor[token] += torch.randn_like(tensor[token])
    after = pipeline(*tensors, weights, layout, case.count)
    blind = layout.end_N < token
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[blind], b[blind])
    for a, b in zip(before[1:3], after[1:3], strict=True):
        assert not torch.equal(a[token], b[token])


def receptive_field(out, source):
    """bool (T, T): whether output t depends on the source at s."""
    rows = []
    for t in range(len(out)):
        (grad,) = torch.autograd.grad(out[t].square().sum(), source, retain_graph=True)
        rows.append(grad.abs().amax((1, 2)) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("case", [CASE, PREFIX], ids=["causal", "prefix"])
def test_the_gradient_reaches_exactly_the_tokens_that_the_masks_allow(case, pipeline, phi):
    layout = case.layout()
    q, k, v = (t.requires_grad_() for t in raw(case))
    compressed, selected, window, index = pipeline(
        q, k, v, phi(case.block, case.width), layout, case.count
    )
    num_tokens = len(q)
    fields = {name: torch.zeros(num_tokens, num_tokens).bool() for name in ("c", "s", "w")}
    for t, heads in enumerate(choices_of(index)):
        end = int(layout.end_N[t])
        for i in range(nsa.num_compressed(num_tokens, case.block, case.stride)):
            last = i * case.stride + case.block - 1
            if last <= end:
                fields["c"][t, i * case.stride : last + 1] = True
        for s in range(end + 1):
            fields["s"][t, s] = any(s // case.select_block in chosen for chosen in heads)
        near = sorted(range(end + 1), key=lambda s, t=t: (abs(s - t), s))[: case.window]
        fields["w"][t, near] = True
    for out, name in ((compressed, "c"), (selected, "s"), (window, "w")):
        want = fields[name]
        assert torch.equal(receptive_field(out, v), want)
        several = want.sum(1) > (case.block if name == "c" else 1)
        by_keys = receptive_field(out, k)
        assert torch.equal(by_keys[several], want[several])
        assert not (by_keys & ~want).any()


@pytest.mark.parametrize("prefix", [0, 4])
def test_gradcheck_of_queries_keys_values_phi_and_gates_with_fixed_choices(prefix, phi):
    case = Case((9, 2), (prefix, 0), 2, 1, 3, 2, block=4, stride=2, select_block=2, window=3)
    layout = case.layout()
    q, _, _, k, _, kw, _, gate = (t.detach() for t in case.inputs().tensors())
    v, vw = torch.randn(11, 1, 2).double(), torch.randn(11, 1, 2).double()
    phi_k, phi_v = phi(4, 3), phi(4, 2, seed=8)
    with torch.no_grad():
        kc = compress(take_blocks(k, layout), *phi_k)
        _, share = nsa.compressed_attention(q, kc, kc, layout, want_share=True)
        index = nsa.select_blocks(share, layout, case.count)
    index[3] = -1

    def run(q, k, v, kw, vw, gate, *phis):
        kc = compress(take_blocks(k, layout), *phis[:3])
        vc = compress(take_blocks(v, layout), *phis[3:])
        return nsa.nsa_attention(q, kc, vc, k, v, kw, vw, gate, layout, case.count, index)[0]

    tensors = [t.clone().requires_grad_() for t in (q, k, v, kw, vw, gate, *phi_k, *phi_v)]
    assert torch.autograd.gradcheck(run, tensors)


def test_choices_carry_no_gradient_and_phi_learns_from_its_branch_only(pipeline, phi):
    layout = CASE.layout()
    weights = [w.requires_grad_() for w in phi(CASE.block, CASE.width)]
    q, k, v = raw(CASE)
    compressed, selected, window, index = pipeline(q, k, v, weights, layout, CASE.count)
    assert not index.requires_grad and not selected.requires_grad and not window.requires_grad
    grads = torch.autograd.grad(compressed.square().sum(), weights)
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_backward_runs_are_bit_equal(dtype):
    case = Case((70, 33), (20, 0), heads=4, kv_heads=2, count=5, window=9)
    gradients = []
    for _ in range(2):
        inputs = case.inputs(dtype).require_grad()
        out, _ = inputs.run(case.layout(), case.count)
        out.float().square().sum().backward()
        gradients.append([out, *(t.grad for t in inputs.tensors())])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
