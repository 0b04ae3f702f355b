"""Packed weights by each back-end: which one multiplies, and what it says of the others."""

import pytest
import torch

from tiny_onn.errors import BackendUnavailable
from tiny_onn.model import packed_weights as storage
from tiny_onn.model.convert import convert, packed_weights
from tiny_onn.model.packed_weights import NO_ROOM, settle_products
from tiny_onn.sparse.semi_structured import SPARSE_BACKENDS, Converted


def test_without_cuda_auto_takes_the_reference_and_says_why(packable):
    report = convert(packable.build("both"), dtype=torch.bfloat16)
    assert {w.backend for w in report.packed} == {"reference"}
    for weight in report.packed:
        assert set(weight.refused) == set(SPARSE_BACKENDS)
        why = "stacks of dense matrices" if ".experts." in weight.name else "needs a CUDA device"
        assert why in weight.refused["cusparselt"]
    for weight in convert(packable.build(), dtype=torch.float16).packed:
        assert weight.refused == dict.fromkeys(SPARSE_BACKENDS, NO_ROOM)
    assert all(w.refused == {} for w in convert(packable.build(), "reference").packed)


def test_a_sparse_product_is_computed_outside_autocast_and_never_of_what_is_wider(
    packable, monkeypatch
):
    """By a stand-in for torch's sparse tensor, which autocast cannot cast."""
    model = packable.build()
    convert(model, dtype=torch.bfloat16)
    layer = model.blocks[0].ffn.down
    double = 2 * layer.unpacked()
    layer._product = Converted(double, "cutlass", {})
    x = torch.randn(5, 48)
    with torch.no_grad():
        assert layer.backend == "auto" and torch.equal(layer(x), x @ layer.dense().T)
        layer.backend = "cutlass"  # asked for: in the type it is stored in
        want = torch.nn.functional.linear(x.bfloat16(), double)
        assert torch.equal(layer(x), want.float())
        products = []
        linear = torch.nn.functional.linear
        monkeypatch.setattr(
            storage.F,
            "linear",
            lambda *a: products.append(torch.is_autocast_enabled("cpu")) or linear(*a),
        )
        with torch.autocast("cpu", torch.bfloat16):
            for layer.backend in ("cutlass", "auto"):
                found = layer(x)
                assert found.dtype == torch.bfloat16 and torch.equal(found, want)
    assert products == [False, False]


def test_a_back_end_that_was_asked_for_is_missed_loudly_where_the_network_is_loaded(
    packable, monkeypatch, caplog
):
    """As on a GPU whose CUTLASS takes none, or but one, of the weights."""
    model = packable.build()
    convert(model, dtype=torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, storage.PackedLinear)]
    monkeypatch.setattr(storage, "refuse_device", lambda *_: None)
    monkeypatch.setattr(storage, "convert_weight", lambda w, backend: Converted(w, backend, {}))
    fitting: set = set()
    monkeypatch.setattr(
        storage, "refusal", lambda w, _: None if tuple(w.shape) in fitting else "no sm_90"
    )
    for fitting_shape in (None, (32, 48)):
        for layer in layers:
            layer.backend = "cutlass"
            layer._forget()
        fitting.add(fitting_shape)
        if fitting_shape is None:
            with pytest.raises(
                BackendUnavailable, match="backend=cutlass.*no sm_90.*=auto"
            ) as told:
                settle_products(model)
            assert "\n" not in str(told.value)
        else:
            with caplog.at_level("INFO", "tiny_onn"):
                settle_products(model)
    assert "2 packed weights multiplied by cutlass" in caplog.text
    assert "2 packed weights not by cutlass: no sm_90" in caplog.text
    settle_products(packable.build())  # nothing is packed


@pytest.mark.gpu
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_sparse_tensor_cores_predict_what_the_reference_does(
    packable, backend, autocast, packed_batch
):
    dtype = torch.bfloat16
    model = packable.build(width=128, ffn_width=64, heads=4, kv_heads=4, head_width=32).cuda()
    model.blocks[0].ffn.gate_up.weight.data *= 2
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        report = convert(model, backend, dtype)
    except BackendUnavailable as error:
        assert "torch cannot run it here" in str(error) or "no cuSPARSELt" in str(error)
        pytest.skip(str(error))
    assert {w.backend for w in report.packed} == {backend}
    other = packable.build(width=128, ffn_width=64, heads=4, kv_heads=4, head_width=32).cuda()
    other.load_state_dict(state)
    convert(other, "reference", dtype)
    for name, weight in packed_weights(other).items():
        assert torch.equal(weight.unpacked(), packed_weights(model)[name].unpacked())
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found, expected = (
            packable.logits(model, packed_batch.to("cuda")),
            packable.logits(other, packed_batch.to("cuda")),
        )
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_weights_in_float16_are_refused_by_sparse_tensor_cores_and_predict_under_autocast(
    packable, backend, packed_batch
):
    model = packable.build().cuda()
    with pytest.raises(BackendUnavailable, match="convert with dtype=bf16"):
        convert(model, backend, torch.float16)
    convert(model, "auto", torch.float16)
    with torch.autocast("cuda", torch.bfloat16):
        assert packable.logits(model, packed_batch.to("cuda")).isfinite().all()


@pytest.mark.gpu
def test_what_fills_no_tile_is_told_and_runs_by_the_reference(packable, packed_batch):
    model = packable.build(width=64, ffn_width=24).cuda()
    try:
        report = convert(model, "cutlass", torch.bfloat16)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    told = {w.name.split(".")[-2]: w for w in report.packed}
    assert "multiples of 32 x 64, got (64, 24)" in told["down"].refused["cutlass"]
    assert told["down"].backend == "reference"
    assert packable.logits(model, packed_batch.to("cuda")).isfinite().all()
