"""2:4 masks inside the network: what FFNs and experts compute, start as, keep and leave alone."""

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
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.inference.excursion import excursion
from tiny_onn.losses.mask_diversity import mask_diversity
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.sparse.bits import pack_bits

MODEL = ModelConfig(
    width=32, layers=2, heads=4, kv_heads=4, head_width=8, ffn_width=48, weights="k24"
)
MOE = MoeConfig(experts=3, expert_width=8, target_active=1.5)
KINDS = {
    "dense": (MODEL, MOE),
    "separate": (replace(MODEL, ffn="dynmoe"), MOE),
    "shared": (replace(MODEL, ffn="dynmoe"), replace(MOE, expert_weights="shared_k24")),
}


def batch_of(count=3):
    rng = np.random.default_rng(0)
    shapes = [((3, 2), (2, 5)), ((4, 4), (4, 4)), ((2, 7), (6, 1))][:count]
    pairs = [Pair(*(rng.integers(0, 10, s).astype(np.uint8) for s in both)) for both in shapes]
    return pack([encode_pair(pair, task=i, view=i) for i, pair in enumerate(pairs)])


def build(kind, seed=0, **k24):
    torch.manual_seed(seed)
    model = build_model(*KINDS[kind][:1], 3, KINDS[kind][1], k24=K24Config(**k24))
    with torch.no_grad():
        torch.nn.init.normal_(
            model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1)
        )
    return model


def commit(model):
    for pattern, _ in model.masked_weights:
        pattern.activity.commit(pattern.activity.take())


@pytest.mark.parametrize("kind", ["dense", "separate"])
def test_all_other_weights_start_as_they_do_without_masks(kind):
    config, moe = KINDS[kind]
    torch.manual_seed(5)
    masked = build_model(config, 3, moe)
    torch.manual_seed(5)
    plain = build_model(replace(config, weights="dense"), 3, moe)
    state = masked.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state.pop(name), value), name
    assert all("pattern." in name for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_network_is_the_dense_one_with_masked_weights(kind):
    """In evaluation, where the masks are the likeliest, and in training, where they are drawn."""
    config, moe = KINDS[kind]
    model, batch = build(kind).double(), batch_of()
    plain = build_model(
        replace(config, weights="dense"), 3, replace(moe, expert_weights="separate")
    )
    plain = plain.double()
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        state = {k: v for k, v in model.state_dict().items() if "pattern." not in k}
        for (pattern, weight), name in zip(
            model.masked_weights,
            [n for n in plain.state_dict() if n.endswith((".gate_up.weight", ".down.weight"))]
            + [n for n in plain.state_dict() if n.endswith(("experts.gate_up", "experts.down"))],
            strict=True,
        ):
            with torch.no_grad():
                found = pattern(weight)[0]
            assert ((found != 0).unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()
            state[name] = found[0] if kind == "dense" else found
        plain.load_state_dict(state)
        torch.testing.assert_close(model(batch).logits_MV, plain(batch).logits_MV)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_weights_and_what_chooses_masks(kind):
    model = build(kind, weight_grad="straight")
    output = model(batch_of())
    overlap = mask_diversity(output)
    assert (overlap is not None) == (kind == "shared")
    loss = output.logits_MV.square().sum() + (0 if overlap is None else overlap)
    loss.backward()
    for pattern, weight in model.masked_weights:
        assert weight.grad.abs().max() > 0 and pattern.alpha.grad.abs().max() > 0


def test_activity_is_of_each_experts_own_tokens_and_filler_does_not_count():
    found = []
    for multiple in (1, 64):
        model, batch = build("shared"), fill(batch_of(), multiple)
        rows_M = torch.arange(20)
        rows_M = F.pad(rows_M, (0, 0 if multiple == 1 else 44))
        output = model(batch, rows_M, 20)
        first = model.masked_weights[0][0].activity
        commit(model)
        routing = output.routing[0]
        inputs_NC = routing.inputs_NC[: routing.num_rows]
        runs_NE = routing.runs_NE[: routing.num_rows]
        for expert in range(3):
            own = inputs_NC[runs_NE[:, expert]]
            if len(own):
                assert torch.allclose(first.value()[expert], own.abs().mean(dim=0), rtol=1e-5)
        found.append([p.activity.value() for p, _ in model.masked_weights])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4)


def test_the_inputs_of_down_are_measured_as_they_are():
    model = build("dense")
    seen = []
    down = model.blocks[0].ffn.down
    down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(batch_of())
    commit(model)
    assert torch.allclose(down.pattern.activity.value()[0], seen[0].abs().mean(dim=0), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_excursion_leaves_no_trace_and_is_deterministic(kind):
    model, batch = build(kind).train(), batch_of()
    model(batch)
    commit(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    with excursion(model):
        first, second = model(batch).logits_MV, model(batch).logits_MV
    assert torch.equal(first, second) and torch.equal(rng, torch.get_rng_state())
    model.k24.state.seed += 1
    with excursion(model):
        assert torch.equal(model(batch).logits_MV, first)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.activity.take().abs().max() == 0 for p, _ in model.masked_weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_back_the_masks(kind, tmp_path):
    model, batch = build(kind), batch_of()
    model(batch)
    commit(model)
    config = Config(out="runs/x", model=KINDS[kind][0], moe=KINDS[kind][1])
    save_checkpoint(tmp_path / "x", model, config, ("a", "b", "c"), {})
    loaded = load_model(tmp_path / "x")
    with torch.no_grad():
        assert torch.equal(loaded.model(batch).logits_MV, model.eval()(batch).logits_MV)
    for (own, weight), (theirs, other) in zip(
        model.masked_weights, loaded.model.masked_weights, strict=True
    ):
        assert torch.equal(own.likeliest(weight), theirs.likeliest(other))


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_around_masked_weights_compile_whole_and_change_nothing(kind, monkeypatch):
    model, batch = build(kind), batch_of()
    plain = model(batch).logits_MV
    trace = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", trace)
    torch.testing.assert_close(model.compile_blocks()(batch).logits_MV, plain)


def test_experts_that_share_take_the_bytes_of_one_and_a_bit_a_weight_and_expert():
    shared, separate = build("shared"), build("separate")
    weights = [w.numel() for _, w in shared.masked_weights]
    assert [w.numel() for _, w in separate.masked_weights] == [3 * n for n in weights]
    masks = [p.likeliest(w) for p, w in shared.masked_weights]
    assert sum(pack_bits(m).numel() for m in masks) == sum(3 * n // 8 for n in weights)
    for mask in masks:
        assert not torch.equal(mask[0], mask[1])  # they start apart


def test_decoding_with_a_cache_says_what_the_whole_forward_says():
    model, batch = build("shared").eval(), batch_of(1)
    whole = model(batch).logits_MV
    logits_BV, _ = model.prefill(batch, 1)
    torch.testing.assert_close(logits_BV[0], whole[-1])
