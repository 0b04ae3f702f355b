"""Squared-ReLU FFNs in the model: widths, warm-up, what is saved, DeepEmbed, decoding."""

from copy import deepcopy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tiny_onn.arc.packing import pack
from tiny_onn.config.check_network import check_model, hidden_width
from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig
from tiny_onn.config.schema_24 import ActSparse24Config
from tiny_onn.errors import UserError
from tiny_onn.model.deep_embed import scale
from tiny_onn.model.ffn import ActSparse24MLP, SquaredReLU, act24_layers, count_optimizer_steps
from tiny_onn.model.tiny_onn import build_model

NOW = ActSparse24Config(activation_dense_warmup_steps=0)


def build(ffn="relu2_act24", act24=NOW, tasks=5, **model):
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "ffn_width": 48} | model
    config = ModelConfig(ffn=ffn, act24=act24, **sizes)
    network = build_model(config, tasks)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(
    ("ffn_width", "expected"),
    [(448, 640), (768, 1152), (3072, 4608), (1376, 2048), (5461, 8192), (344, 512), (8, 64)],
)
def test_squared_relu_is_one_and_a_half_times_as_wide_rounded_to_hardware(ffn_width, expected):
    assert hidden_width(ModelConfig(ffn="relu2", ffn_width=ffn_width)) == expected
    assert hidden_width(ModelConfig(ffn="dense", ffn_width=ffn_width)) == ffn_width
    assert expected % (128 if ffn_width >= 512 else 64) == 0


def test_a_width_that_groups_of_four_do_not_divide_is_refused_in_one_line():
    with pytest.raises(UserError, match="model.ffn_width=50 .* multiple of 4 .*; use 52") as caught:
        check_model(ModelConfig(ffn="relu2_act24", ffn_width=50))
    assert "\n" not in str(caught.value)
    check_model(ModelConfig(ffn="relu2", ffn_width=50))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split_ratio": 1.1}, "model.act24.split_ratio=1.1; expected a number from 0 to 1"),
        ({"activation_dense_warmup_steps": -1}, "activation_dense_warmup_steps=-1"),
        ({"permute_seed": -1}, "permute_seed=-1"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        check_model(ModelConfig(act24=ActSparse24Config(**given)))


def test_the_warm_up_is_the_dense_network_to_the_bit_and_then_it_is_not(documents):
    batch = pack(documents())
    later = ActSparse24Config(activation_dense_warmup_steps=1)
    dense, sparse = build("relu2").train(), build(act24=later).train()
    found = []
    for network in (dense, sparse):
        out = network(batch).logits_MV
        out.square().sum().backward()
        found.append((out, {n: p.grad for n, p in network.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
    assert torch.equal(dense.eval()(batch).logits_MV, sparse.eval()(batch).logits_MV)
    for layer in act24_layers(sparse):
        layer.advance_step()
    assert not torch.allclose(found[0][0], sparse.train()(batch).logits_MV)
    assert not torch.allclose(found[0][0], sparse.eval()(batch).logits_MV)


def test_only_optimizer_steps_count_not_accumulated_or_recomputed_forwards():
    ffn = ActSparse24MLP(6, 64, ActSparse24Config(activation_dense_warmup_steps=2)).train()
    optimizer = torch.optim.SGD(ffn.parameters(), lr=0.1)
    count_optimizer_steps(optimizer, ffn)
    was_sparse = []
    for _ in range(4):
        for _ in range(3):
            x = torch.randn(5, 6, requires_grad=True)
            checkpoint(ffn, x, use_reentrant=False).sum().backward()
            ffn.eval()(x)
            ffn.train()
            was_sparse.append(ffn.is_sparse)
        optimizer.step()
        optimizer.zero_grad()
    assert int(ffn.optimizer_steps) == 4
    assert was_sparse == [False] * 6 + [True] * 6


@pytest.mark.parametrize("method", ["naive", "mvue", "soft_threshold"])
def test_recomputation_gives_the_same_gradients(method):
    config = ActSparse24Config(method, 0, split_ratio=1.0, gradient_sparse_method="naive")
    ffn = ActSparse24MLP(6, 64, config).train()
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        x = torch.randn(10, 6, requires_grad=True)
        y = checkpoint(ffn, x, use_reentrant=False) if recompute else ffn(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *ffn.parameters()])))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_count_is_saved_with_the_weights_and_the_order_is_not():
    network = build(act24=ActSparse24Config(activation_dense_warmup_steps=3))
    state = network.state_dict()
    assert "blocks.0.ffn.optimizer_steps" in state
    assert not any("token_keys" in name for name in state)
    for _ in range(3):
        for layer in act24_layers(network):
            layer.advance_step()
    fresh = build(act24=ActSparse24Config(activation_dense_warmup_steps=3))
    assert not act24_layers(fresh)[0].is_sparse
    fresh.load_state_dict(network.state_dict())
    assert all(layer.is_sparse for layer in act24_layers(fresh))
    assert all(layer.is_sparse for layer in act24_layers(deepcopy(network)))
    keys = [layer.token_keys for layer in act24_layers(network) + act24_layers(fresh)]
    assert all(torch.equal(keys[0], other) for other in keys)
    assert act24_layers(build(act24=ActSparse24Config(permute_tokens=False)))[0].token_keys is None


@pytest.mark.parametrize("method", ["naive", "soft_threshold"])
@pytest.mark.parametrize("ffn", ["relu2", "relu2_act24"])
def test_decoding_is_the_parallel_forward(documents, assert_decoding_is_parallel, ffn, method):
    network = build(ffn, ActSparse24Config(method, 0)).double().eval()
    docs = documents()
    assert_decoding_is_parallel(network, docs, [doc.prefix_len for doc in docs])


@pytest.mark.parametrize("form", ["1x", "4x", "v7a"])
@pytest.mark.parametrize("ffn", ["relu2", "relu2_act24"])
def test_every_form_of_deep_embed_works_and_learns(documents, ffn, form):
    deep = DeepEmbedConfig(keys=["token", "task"], form=form, mix_rank=4, task_rank=2)
    network = build(ffn, deep_embed=deep).train()
    network(pack(documents())).logits_MV.square().sum().backward()
    gradients = {n: p.grad for n, p in network.deep_embed.named_parameters()}
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_a_scaled_hidden_layer_is_scaled_before_it_is_made_sparse():
    """Where no group has more than two nonzeros, it is the dense network, gradients included."""
    dense = SquaredReLU(6, 64).double()
    with torch.no_grad():
        dense.up.weight.unflatten(0, (-1, 4))[:, 2:] = 0
    sparse = ActSparse24MLP(
        6, 64, ActSparse24Config(activation_dense_warmup_steps=0, split_ratio=0)
    )
    sparse = sparse.double().train()
    sparse.load_state_dict(dense.state_dict() | {"optimizer_steps": torch.tensor(0)})
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    found = []
    for ffn in (dense, sparse):
        y = ffn(x, delta)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, delta, ffn.down.weight])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    hidden = scale(dense.activate(x, None), delta)
    torch.testing.assert_close(found[0][0], dense.down(hidden))


def test_autocast_gives_bfloat16_and_float32_gradients():
    ffn = ActSparse24MLP(16, 64, NOW).train()
    x = torch.randn(9, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x, torch.randn(9, 64))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in ffn.parameters()} == {torch.float32} == {x.grad.dtype}
    wanted = ffn.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert wanted(x).dtype == torch.bfloat16


def test_compiled_blocks_leave_its_ffn_alone(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f.__name__) or f)
    build().blocks[0].compile_parts()
    build("relu2").blocks[0].compile_parts()
    assert compiled == ["enter", "settle", "enter", "leave"]
