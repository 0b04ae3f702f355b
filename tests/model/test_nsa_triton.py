"""The network with NSA by Triton kernels (in the interpreter, float64) is the network without."""

import pytest
import torch

from tiny_onn.arc.packing import pack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interpreted():
    kernel = pytest.importorskip("tiny_onn_kernels.nsa.kernel", reason="triton is not installed")
    if not kernel.INTERPRETED:
        pytest.skip("the kernels sum in float64 in the interpreter only")


def test_logits_and_gradients_are_the_references(nsa_model, documents, interpreted):
    changes, nsa = {"layers": 1, "kv_heads": 2}, {"kv": "per_branch"}
    batch, found = pack(documents()[1:3]), {}
    for backend in ("reference", "triton"):
        model = nsa_model(changes, nsa).use_backend("auto", "cpu", "fp32", nsa=backend)
        logits = model(batch).logits_MV
        logits.square().mean().backward()
        found[backend] = [logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    for got, want in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_decoding_equals_the_parallel_forward(
    nsa_model, documents, interpreted, assert_decoding_is_parallel
):
    model = nsa_model({"layers": 1, "mask": "causal"})
    model.use_backend("auto", "cpu", "fp32", nsa="triton")
    doc = documents()[1]
    assert_decoding_is_parallel(model, [doc], [len(doc.tokens) - 6])


def test_under_autocast_all_parts_meet_in_one_dtype(nsa_model, documents, interpreted):
    batch, found = pack(documents()[1:3]), {}
    for backend in ("reference", "triton"):
        model = nsa_model({"layers": 1, "ffn": "dynmoe"}).float()
        model.use_backend("auto", "cpu", "bf16", experts="loop", nsa=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch).logits_MV
        logits.square().mean().backward()
        found[backend] = [logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    for got, want in zip(found["triton"], found["reference"], strict=True):
        assert (got - want).norm() <= 0.1 * want.norm()  # bfloat16, truncated by the interpreter
