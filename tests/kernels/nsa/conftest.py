"""What NSA's tests share: comparison with the naive branches, full attention, phi's parameters."""

import importlib.util

import pytest
import torch

from tiny_onn_kernels.nsa import reference as nsa
from tiny_onn_kernels.nsa.cases import choices_of
from tiny_onn_kernels.nsa.compressed import compress, take_blocks


@pytest.fixture(scope="session")
def branches():
    """(inputs, layout, count, index or None) -> the three outputs, the scores and the index."""

    def run(inputs, layout, count, index=None):
        q, kc, vc, ks, vs, kw, vw, _ = inputs.tensors()
        compressed, share = nsa.compressed_attention(q, kc, vc, layout, want_share=True)
        sizes = (layout.block, layout.stride, layout.select_block, layout.most_select_blocks)
        scores = nsa.block_scores(share, *sizes)
        if index is None:
            index = nsa.select_blocks(share, layout, count)
        selected = nsa.selected_attention(q, ks, vs, index, layout)
        window = nsa.window_attention(q, kw, vw, layout)
        return compressed, selected, window, scores, index

    return run


@pytest.fixture(scope="session")
def agrees(branches):
    """Asserts that the reference computes, on a case, what the definitions say."""

    def check(case):
        inputs, layout = case.inputs(), case.layout()
        compressed, selected, window, scores, index = branches(inputs, layout, case.count)
        naive = case.naive(inputs)
        assert choices_of(index) == naive.choices
        for t, heads in enumerate(naive.scores):
            for h, score in enumerate(heads):
                want = torch.tensor([score[j] for j in sorted(score)], dtype=scores.dtype)
                torch.testing.assert_close(scores[t, h, : len(want)], want)
        torch.testing.assert_close(compressed, naive.compressed)
        torch.testing.assert_close(selected, naive.selected)
        torch.testing.assert_close(window, naive.window)
        out, chosen = inputs.run(layout, case.count)
        assert torch.equal(chosen, index)
        gates = inputs.gate[..., None, :].unbind(-1)
        parts = (naive.compressed, naive.selected, naive.window)
        torch.testing.assert_close(out, sum(g * p for g, p in zip(gates, parts, strict=True)))

    return check


@pytest.fixture(scope="session")
def full_attention():
    """(q, k, v, layout) -> dense softmax attention to all visible tokens of each document."""

    def run(q, k, v, layout):
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        visible = (layout.doc_N[:, None] == layout.doc_N) & (layout.time_N <= layout.end_N[:, None])
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhe->nhe", weights, v)

    return run


@pytest.fixture(scope="session")
def phi():
    """(block, width, seed) -> PE, inner and outer weights of phi, float64."""

    def make(block, width, seed=7):
        generator = torch.Generator().manual_seed(seed)
        shapes = ((block, 1, width), (width, block * width), (width, width))
        return [torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for s in shapes]

    return make


@pytest.fixture(scope="session")
def pipeline(branches):
    """(q, k, v, phi, layout, count, index) -> the three outputs from raw keys and values."""

    def run(q, k, v, phi, layout, count, index=None):
        kc, vc = (compress(take_blocks(t, layout), *phi) for t in (k, v))
        compressed, share = nsa.compressed_attention(q, kc, vc, layout, want_share=True)
        if index is None:
            index = nsa.select_blocks(share, layout, count)
        selected = nsa.selected_attention(q, k, v, index, layout)
        return compressed, selected, nsa.window_attention(q, k, v, layout), index

    return run


@pytest.fixture(scope="session")
def kernel():
    """The Triton implementation, on a GPU or in the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    from tiny_onn_kernels.nsa import kernel

    if not (kernel.INTERPRETED or torch.cuda.is_available()):
        pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before triton was imported")
    return kernel


@pytest.fixture(scope="session")
def device(kernel):
    """Where kernels run."""
    return "cpu" if kernel.INTERPRETED else "cuda"


@pytest.fixture
def poison():
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def assert_close():
    """Root mean square of the difference to a float64 reference, at most ``limit`` of its own; of
    0.1 where the right numbers are smaller (gradients that are zero but for rounding)."""

    def check(got, want, limit, what=""):
        got, want = got.detach().double().cpu(), want.detach().double().cpu()
        assert got.shape == want.shape, what
        assert got.isfinite().all(), what
        error = (got - want).norm() / want.norm().clamp(min=0.1 * want.numel() ** 0.5)
        assert error <= limit, f"{what}: relative RMS {error:.2e}, at most {limit:.0e}"

    return check
