"""A training step is compiled without our kernels' operations breaking its graph."""

import pytest
import torch

from tiny_onn.arc.packing import pack

pytestmark = pytest.mark.slow

PLANNING = "plan_attention"
"""The host's work on a batch's lengths: the one call that is kept out of graphs."""


@pytest.fixture
def step(nsa_model, documents):
    """(device) -> the model with both sorts of kernels, a batch, and the loss of a batch."""
    kernel = pytest.importorskip("tiny_onn_kernels.nsa.kernel", reason="triton is not installed")

    def build(device):
        if device == "cpu" and not kernel.INTERPRETED:
            pytest.skip("kernels run on a CPU in the interpreter only")
        torch._dynamo.reset()
        model = nsa_model({"layers": 1, "kv_heads": 2, "ffn": "dynmoe"}).float().to(device).train()
        model.use_backend("auto", device, "fp32", "triton", "triton")
        return model, pack(documents()[1:3]).to(device), loss

    def loss(model, batch):
        return model(batch).logits_MV.square().mean()

    return build


def where_it_breaks(model, batch, loss):
    found = torch._dynamo.explain(loss)(model, batch)
    return [reason.user_stack[-1].line for reason in found.break_reasons]


def test_the_graph_breaks_where_the_batch_is_planned_and_nowhere_else(step):
    lines = where_it_breaks(*step("cpu"))
    assert len(lines) == 1 and PLANNING in lines[0], lines


@pytest.mark.gpu
def test_the_compiled_step_is_the_step_and_one_graph_after_planning(step):
    model, batch, loss = step("cuda")
    lines = where_it_breaks(model, batch, loss)
    assert len(lines) == 1 and PLANNING in lines[0], lines
    wanted = torch.autograd.grad(loss(model, batch), list(model.parameters()), allow_unused=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss)(model, batch)
    got = torch.autograd.grad(compiled, list(model.parameters()), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
