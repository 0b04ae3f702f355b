"""2:4 parts of the network by the Triton kernels: what they compute, and what they refuse."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

from tiny_onn.arc.packing import pack
from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig, MoeConfig
from tiny_onn.config.schema_24 import ActSparse24Config, K24Config
from tiny_onn.errors import BackendUnavailable
from tiny_onn.model.ffn import ActSparse24MLP, act24_layers
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.sparse.activation_packed import takes_packed
from tiny_onn.sparse.semi_structured import refusal

SMALL = ModelConfig(width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=24)
MOE = MoeConfig(experts=3, expert_width=8, target_active=1.5)
NOW = ActSparse24Config(activation_dense_warmup_steps=0)
K24 = replace(SMALL, weights="k24")
EXPERTS = replace(K24, ffn="dynmoe")
SHARED = replace(MOE, expert_weights="shared_k24")


@pytest.fixture
def batch(documents):
    return pack(documents())


def by_both(batch, config, moe=MOE, precision="fp32", **k24):
    """[logits, gradients, everything the masks or activations noted] in PyTorch and by kernels."""
    found = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = build_model(config, 5, moe, k24=K24Config(**k24))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.use_backend("auto", "cpu", precision, pattern24=backend, relu2_24=backend)
        if model.k24 is not None:
            model.k24.state.seed, model.k24.state.watch = 2**62 + 5, True
            for pattern, _ in model.masked_weights:
                pattern.track = True
        output = model.train()(batch)
        overlaps = [r.mask_overlap for r in output.routing if r.mask_overlap is not None]
        (output.logits_MV.square().mean() + sum(overlaps)).backward()
        patterns = [pattern for pattern, _ in model.masked_weights]
        found.append(
            [output.logits_MV.detach()]
            + [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
            + [p.selected.float() for p in patterns]
            + [p.agreement for p in patterns]
            + [torch.tensor(layer.tally.take()) for layer in act24_layers(model)]
        )
    assert {p.backend for p in patterns} <= {"triton"}
    return found


@pytest.mark.parametrize(
    ("config", "moe", "k24"),
    [
        (K24, MOE, {}),
        (K24, MOE, {"weight_grad": "straight", "alpha_rank": 2}),
        (K24, MOE, {"weight_grad": "straight", "logits": "free"}),
        (replace(K24, ffn="relu2"), MOE, {"weight_grad": "score"}),
        (EXPERTS, MOE, {"logits": "free"}),
        (EXPERTS, SHARED, {"div_kernel": "overlap"}),
        (EXPERTS, SHARED, {"weight_grad": "straight", "logits": "free"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_masks_by_the_kernels_are_those_in_pytorch_with_their_gradients(batch, config, moe, k24):
    """The same noise: a run goes on alike by another back-end (oracle 25 of the design)."""
    for got, want in zip(*by_both(batch, config, moe, **k24), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "act24",
    [NOW, replace(NOW, split_ratio=1.0, permute_tokens=False, dx_direct_sparse=False)],
    ids=["default", "feature-wise"],
)
def test_activations_by_the_kernels_are_those_in_pytorch_with_their_gradients(batch, act24):
    config = replace(SMALL, ffn="relu2_act24", act24=act24)
    for got, want in zip(*by_both(batch, config), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_evaluation_by_the_kernels_is_that_in_pytorch_with_exact_gradients():
    torch.manual_seed(0)
    layer = ActSparse24MLP(8, 64, NOW).eval()
    found = []
    for backend in ("torch", "triton"):
        layer.backend = backend
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, interpreted
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_wild_activations_are_chosen_and_differentiated_alike(wild):
    """A NaN ranks below zero, an infinity first; what is dropped passes nothing."""
    torch.manual_seed(0)
    layer = ActSparse24MLP(4, 16, replace(NOW, split_ratio=0.0)).train()
    with torch.no_grad():  # each hidden number is one of the input's, two of them wild
        layer.up.weight.copy_(torch.eye(4).repeat(4, 1).roll(1, 0))
        layer.up.weight[4, 3] = layer.up.weight[9, 0] = wild
        layer.down.weight.normal_()
    found = []
    for backend in ("torch", "triton"):
        layer.backend = backend
        x = torch.tensor([[1.0, 2.0, 3.0, -1.0], [0.5, 4.0, 1.0, 2.0]], requires_grad=True)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"act24": replace(NOW, activation_sparse_method="mvue")}, "sparse_method=naive, got mvue"),
        ({"act24": replace(NOW, keep_forward_mask=False)}, "keep_forward_mask=true, got false"),
        ({"deep_embed": DeepEmbedConfig(keys=["token"], form="4x")}, "deep_embed.form=4x, not 1x"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_in_one_line_when_the_model_is_built(
    settings, needs, caplog
):
    model = build_model(replace(SMALL, ffn="relu2_act24", **{"act24": NOW} | settings), 2)
    with pytest.raises(BackendUnavailable, match=f"ops.relu2_24=triton needs .*{needs}") as caught:
        model.use_backend("auto", "cpu", "fp32", relu2_24="triton")
    assert "\n" not in str(caught.value) and "auto or torch" in str(caught.value)
    model.use_backend("auto", "cpu", "fp32")
    assert act24_layers(model)[0].backend == "torch"


def test_a_product_that_cutlass_cannot_take_is_dense_and_the_log_says_why(caplog):
    with caplog.at_level("INFO", "tiny_onn"):
        assert not takes_packed(128, "cpu", torch.bfloat16)
        assert not takes_packed(96, "cpu", torch.bfloat16)
        assert not takes_packed(128, "cpu", torch.float32)
    said = caplog.text
    assert "CUTLASS needs a CUDA device, got cpu" in said and "multiples of 32 x 64" in said
    assert "CUTLASS takes 16-bit numbers, got torch.float32" in said


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 37])
@pytest.mark.parametrize("packed", [True, False])
def test_on_a_gpu_the_product_by_the_kernels_is_the_one_in_pytorch(tokens, packed):
    tile = torch.zeros(32, 128, device="cuda", dtype=torch.bfloat16)
    if packed and (why := refusal(tile, "cutlass")):
        pytest.skip(why)
    torch.manual_seed(0)
    layer = ActSparse24MLP(64, 128, NOW).cuda().bfloat16().train()
    x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = []
    for backend in ("torch", "triton"):
        layer.backend = backend
        layer.takes_packed = packed
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, layer.up.weight])])
    for got, want in zip(*found, strict=True):
        assert (got.float() - want.float()).norm() <= 2e-2 * want.float().norm()
