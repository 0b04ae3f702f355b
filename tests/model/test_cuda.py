"""On a CUDA device: every attention back-end, cached decoding, and a compiled training step."""

import pytest
import torch

from tiny_onn.model.packed_attention import DocumentSpans, plan_reference, plan_varlen, torch_varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (3, 17, 64, 190, 700)


def spans_on(device, share):
    prefixes = tuple(int(n * share) for n in LENGTHS)
    cu = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    return DocumentSpans(cu, torch.tensor(prefixes, device=device), LENGTHS, prefixes)


def varlen_functions():
    functions = {"torch": torch_varlen}
    try:
        from tiny_onn.model.flash_varlen import flash_varlen

        flash_varlen()
        functions["flash"] = flash_varlen
    except ImportError:
        pass
    return functions


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["torch", "flash"])
def test_varlen_attention_equals_the_reference_in_values_and_gradients(share, kv_heads, name):
    functions = varlen_functions()
    if name not in functions:
        pytest.skip("flash-attn is not installed")
    torch.manual_seed(0)
    total = sum(LENGTHS)
    half = [
        torch.randn(total, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    exact = [t.detach().cpu().double().requires_grad_() for t in half]
    weight = torch.randn(total, 4, 64, dtype=torch.float64)
    out = plan_varlen(spans_on("cuda", share), functions[name]())(*half)
    want = plan_reference(spans_on("cpu", share))(*exact)
    got_grads = torch.autograd.grad((out.double() * weight.cuda()).sum(), half)
    want_grads = torch.autograd.grad((want * weight).sum(), exact)
    for got, expected in zip((out, *got_grads), (want, *want_grads), strict=True):
        error = (got.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm()
        assert error < 1e-2, float(error)


@pytest.mark.slow
def test_preset_base_trains_and_predicts_on_the_gpu_at_small_size(predict_two, tmp_path):
    from tiny_onn.config.load import load_config
    from tiny_onn.training.run import run_training

    run = tmp_path / "run"
    config = load_config(
        [
            "preset=base",
            "network=sparse",
            f"out={run}",
            "model.width=128",
            "model.layers=2",
            "model.heads=2",
            "model.kv_heads=2",
            "model.ffn_width=256",
            "moe.expert_width=128",
            "budget.steps=6",
            "data.workers=2",
        ]
    )
    assert run_training(config) == 0
    assert (run / "checkpoint" / "weights.safetensors").is_file()
    predict_two(run)
