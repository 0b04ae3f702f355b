"""weights=s_ste and weights=random24: 2:4 FFNs without learnt masks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tiny_onn.config.check_network import check_k24
from tiny_onn.config.schema import ModelConfig, MoeConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.sparse.mask import topk_mask
from tiny_onn.sparse.masked_linear import MaskedLinear, RandomMaskLinear, SoftThresholdLinear
from tiny_onn.sparse.soft_threshold import beta, soft_threshold

MODEL = ModelConfig(width=32, layers=2, heads=4, kv_heads=4, head_width=8, ffn_width=48)
KINDS = ("s_ste", "random24")


def made(kind):
    torch.manual_seed(0)
    layer = kind(16, 12)
    torch.nn.init.normal_(layer.weight)
    layer.prepare()
    return layer


def test_s_ste_multiplies_with_the_scaled_soft_threshold_and_learns_all_weights():
    layer, x_NI = made(SoftThresholdLinear).double(), torch.randn(5, 16, dtype=torch.float64)
    scale = beta(layer.weight)
    assert float(layer.scale) == pytest.approx(scale)
    y_NO = layer(x_NI)
    sparse = soft_threshold(layer.weight.detach()) * layer.scale
    assert torch.equal(y_NO, F.linear(x_NI, sparse))
    assert torch.equal(layer.mask(), topk_mask(layer.weight))
    grad_NO = torch.randn_like(y_NO)
    y_NO.backward(grad_NO)
    assert torch.allclose(layer.weight.grad, grad_NO.T @ x_NI)


def test_the_scale_of_s_ste_is_frozen():
    layer = made(SoftThresholdLinear)
    before = float(layer.scale)
    with torch.no_grad():
        layer.weight.mul_(3)
    layer(torch.randn(2, 16)).sum().backward()
    assert float(layer.scale) == before and not layer.scale.requires_grad


def test_a_random_mask_keeps_two_of_four_and_its_weights_alone_learn():
    layer = made(RandomMaskLinear)
    assert (layer.mask().unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()
    layer(torch.randn(3, 16)).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.mask())


def test_all_six_patterns_are_drawn_about_equally_often():
    torch.manual_seed(0)
    layer = RandomMaskLinear(400, 60)
    layer.prepare()
    code = layer.mask().unflatten(-1, (-1, 4)).float() @ torch.tensor([8.0, 4.0, 2.0, 1.0])
    counts = torch.stack([(code == k).sum() for k in (12, 10, 9, 6, 5, 3)])
    assert counts.sum() == 6000 and (counts - 1000).abs().max() < 150


@pytest.mark.parametrize("kind", [SoftThresholdLinear, RandomMaskLinear])
def test_what_evaluation_keeps_follows_changed_weights(kind):
    layer, x_NI = made(kind).eval(), torch.randn(3, 16)
    with torch.no_grad():
        first = layer(x_NI)
        assert torch.equal(layer(x_NI), first)
        layer.weight.mul_(2)
        assert torch.allclose(layer(x_NI), 2 * first)


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("ffn", ["dense", "relu2"])
def test_all_weights_start_as_they_do_in_a_dense_network(weights, ffn):
    torch.manual_seed(5)
    plain = build_model(replace(MODEL, ffn=ffn), 3).state_dict()
    torch.manual_seed(5)
    sparse = build_model(replace(MODEL, ffn=ffn, weights=weights), 3)
    state = sparse.state_dict()
    for name, value in plain.items():
        assert torch.equal(state.pop(name), value), name
    assert len(state) == 4 and all(n.endswith((".scale", ".kept")) for n in state)
    for module in sparse.modules():
        if isinstance(module, SoftThresholdLinear):
            assert float(module.scale) == pytest.approx(beta(module.weight))


@pytest.mark.parametrize("weights", KINDS)
def test_a_checkpoint_brings_back_what_it_saved(weights, small_checkpoint, tmp_path):
    small_checkpoint(tmp_path / "a", weights=weights)
    loaded = load_model(tmp_path / "a")
    layers = [m for m in loaded.model.modules() if isinstance(m, MaskedLinear)]
    assert len(layers) == 4
    for layer in layers:
        layer.prepare()  # a mask anew
        for number in (b for name, b in layer.named_buffers() if name == "scale"):
            number.mul_(2)  # not what a fresh network would have
    save_checkpoint(tmp_path / "b", loaded.model, loaded.config, loaded.task_ids, loaded.provenance)
    again = [m for m in load_model(tmp_path / "b").model.modules() if isinstance(m, MaskedLinear)]
    for one, other in zip(layers, again, strict=True):
        assert torch.equal(one.mask(), other.mask())
        assert torch.equal(one.sparse_weight(), other.sparse_weight())


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({"ffn": "dynmoe"}, "an FFN without experts"),
        ({"ffn": "relu2_act24"}, "one 2:4 operand"),
        ({"ffn_width": 50}, "use 52"),
        ({"width": 30}, "use 32"),
    ],
)
def test_what_they_do_not_fit_is_refused_in_one_line(weights, model, part):
    config = replace(MODEL, weights=weights, **model)
    with pytest.raises(UserError, match=part) as error:
        check_k24(K24Config(), config, MoeConfig())
    assert "\n" not in str(error.value) and f"model.weights={weights}" in str(error.value)


@pytest.mark.parametrize("kind", [SoftThresholdLinear, RandomMaskLinear])
def test_columns_come_in_groups_of_four(kind):
    with pytest.raises(UserError, match="use 16"):
        kind(14, 8)
