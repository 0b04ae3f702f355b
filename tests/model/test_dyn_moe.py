"""DynMoE as a layer and inside the network."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiny_onn.arc.packing import fill, pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_pair
from tiny_onn.config.schema import Config, ModelConfig, MoeConfig
from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.dyn_moe import DynMoE, RoutingLog
from tiny_onn.model.ffn import SwiGLU
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.ops import resolve_experts

MOE = MoeConfig(experts=5, expert_width=8, target_active=2.0)
MODEL = ModelConfig(
    width=32, layers=2, heads=4, kv_heads=4, head_width=8, ffn_width=48, ffn="dynmoe"
)
MODES = [
    {"combine": "mean", "none_active": "skip"},
    {"combine": "mean", "none_active": "top1"},
    {"combine": "gated", "none_active": "skip"},
]


def layer(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    return DynMoE(16, replace(MOE, **changes), layer=0).to(dtype)


def tokens(count=60, width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def batch_of(count=3):
    rng = np.random.default_rng(0)
    shapes = [((3, 2), (2, 5)), ((4, 4), (4, 4)), ((2, 7), (6, 1))][:count]
    pairs = [Pair(*(rng.integers(0, 10, s).astype(np.uint8) for s in both)) for both in shapes]
    return pack([encode_pair(pair, task=i, view=i) for i, pair in enumerate(pairs)])


def oracle(moe, x_NC, combine, none_active):
    """One token, one expert, one formula at a time."""
    gate, experts = moe.gate, moe.experts
    rows, counts = [], []
    for x_C in x_NC:
        cos_E = torch.stack([F.cosine_similarity(x_C, p_C, dim=0) for p_C in gate.prototypes])
        above_E = cos_E - gate.thresholds
        running = [e for e in range(len(cos_E)) if above_E[e] > 0]
        counts.append(len(running))
        if not running and none_active == "top1":
            running = [int(above_E.argmax())]
        y_C = torch.zeros_like(x_C)
        for e in running:
            a_F, b_F = (experts.gate_up[e] @ x_C).chunk(2)
            weight = 16**0.5 * above_E[e] if combine == "gated" else 1 / len(running)
            y_C = y_C + weight * (experts.down[e] @ (F.silu(a_F) * b_F))
        rows.append(y_C)
    return torch.stack(rows), counts


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_layer_equals_a_loop_over_tokens_and_experts(mode):
    moe, x_NC = layer(**mode), tokens(250)
    with torch.no_grad():  # so that every number of experts occurs
        moe.gate.thresholds.copy_(torch.tensor([-0.05, -0.02, 0.0, 0.02, 0.05]))
        expected_NC, counts = oracle(moe, x_NC, **mode)
        got_NC = moe(x_NC)
    assert set(counts) == set(range(6))
    torch.testing.assert_close(got_NC, expected_NC, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_grouped_product_and_loop_agree_in_all_gradients(mode):
    found = []
    for backend in ("loop", resolve_experts("auto", "cpu", torch.float32, 16, 8)):
        moe, x_NC = layer(torch.float32, **mode), tokens(dtype=torch.float32).requires_grad_()
        moe.experts.backend = backend
        moe(x_NC).square().sum().backward()
        found.append([x_NC.grad, *(p.grad for p in moe.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_parameter_has_a_finite_gradient_even_if_nothing_fires_or_all_do(mode):
    for threshold in (-1.5, 1.5):
        moe = layer(torch.float32, **mode)
        torch.nn.init.constant_(moe.gate.thresholds, threshold)
        moe(tokens(dtype=torch.float32)).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in moe.parameters())


def test_no_tokens_give_no_output():
    moe = layer(torch.float32)
    x_NC = tokens(0, dtype=torch.float32).requires_grad_()
    y_NC = moe(x_NC)
    y_NC.sum().backward()
    assert y_NC.shape == (0, 16) and all(p.grad.abs().max() == 0 for p in moe.parameters())


def test_bfloat16_autocast_computes_experts_in_it_and_the_gate_in_float32():
    moe, x_NC = layer(torch.float32), tokens(dtype=torch.float32)
    log, cast_log = RoutingLog(), RoutingLog()
    plain_NC = moe(x_NC, log)
    with torch.autocast("cpu", torch.bfloat16):
        cast_NC = moe(x_NC, cast_log)
    assert cast_NC.dtype == torch.bfloat16
    assert torch.equal(log.entries[0].runs_NE, cast_log.entries[0].runs_NE)
    assert (cast_NC.float() - plain_NC).norm() < 0.02 * plain_NC.norm()


def build(moe=MOE, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = build_model(replace(MODEL, **changes), num_tasks=3, moe=moe).to(dtype)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def test_the_output_tells_each_layers_routing_and_which_rows_are_real():
    model, batch = build(loops=2), fill(batch_of(), 64)
    rows_M = torch.tensor([3, 9, 20, 0, 0])
    routing = model(batch, rows_M, num_rows=3).routing
    assert [entry.layer for entry in routing] == [0, 1, 0, 1]
    num_tokens = sum(batch.layout.lengths)
    assert num_tokens < len(batch.tokens_N)
    assert [entry.num_rows for entry in routing] == [num_tokens] * 3 + [3]
    assert [len(entry.runs_NE) for entry in routing] == [len(batch.tokens_N)] * 3 + [5]
    for entry in routing:
        assert torch.equal(entry.runs_NE, entry.fires_NE > 0)
        assert entry.gram_EE.shape == (5, 5) and entry.thresholds_E.shape == (5,)
        assert not entry.inputs_NC.requires_grad and not entry.thresholds_E.requires_grad


@pytest.mark.parametrize(("every", "sparse"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [2])])
def test_every_nth_block_has_experts_the_last_one_among_them(every, sparse):
    model = build(moe=replace(MOE, every=every), layers=3)
    assert [layer.layer for layer in model.expert_layers] == sparse
    assert sum(isinstance(block.ffn, SwiGLU) for block in model.blocks) == 3 - len(sparse)
    assert [entry.layer for entry in model(batch_of()).routing] == sparse


def test_a_dense_model_has_no_routing():
    model = build(ffn="dense")
    assert model(batch_of()).routing == () and model.expert_layers == []


def test_the_parts_around_the_experts_compile_whole_and_change_nothing(monkeypatch):
    model, batch = build(dtype=torch.float32), batch_of()
    plain = model(batch).logits_MV
    trace = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", trace)
    compiled = model.compile_blocks()(batch).logits_MV
    torch.testing.assert_close(compiled, plain)
    shorter = model(batch_of(2)).logits_MV
    assert torch.isfinite(shorter).all()


def test_a_checkpoint_brings_back_the_experts(tmp_path):
    model = build(dtype=torch.float32)
    config = Config(out="runs/x", model=MODEL, moe=MOE)
    save_checkpoint(tmp_path / "x", model, config, ("a", "b", "c"), {})
    loaded = load_model(tmp_path / "x")
    assert loaded.config.moe == MOE
    batch = batch_of()
    assert torch.equal(loaded.model(batch).logits_MV, model.eval()(batch).logits_MV)
    others = Config(out="runs/x", model=MODEL, moe=replace(MOE, experts=6))
    save_checkpoint(tmp_path / "y", model, others, ("a", "b", "c"), {})
    with pytest.raises(UserError, match="of another model: 'blocks.0.ffn.experts.down'"):
        load_model(tmp_path / "y")


def test_the_way_experts_run_is_decided_once_for_what_they_compute_in():
    model = build(dtype=torch.float32)
    names = {
        precision: model.use_backend("sdpa", "cpu", precision).expert_layers[1].experts.backend
        for precision in ("fp32", "bf16")
    }
    expected = resolve_experts("auto", "cpu", torch.float32, 32, 8)
    assert names == {"fp32": expected, "bf16": expected}
    assert build().use_backend("sdpa", "cpu").expert_layers[0].experts.backend == "loop"
    odd = build(moe=replace(MOE, expert_width=7), dtype=torch.float32)
    assert odd.use_backend("sdpa", "cpu").expert_layers[0].experts.backend == "loop"
    with pytest.raises(BackendUnavailable, match="ops.experts=grouped_mm needs .*loop"):
        odd.use_backend("sdpa", "cpu", experts="grouped_mm")
    with pytest.raises(BackendUnavailable, match="unknown ops.experts 'magic'"):
        odd.use_backend("sdpa", "cpu", experts="magic")
