"""Packing a trained network: the same predictions, the computed bytes, the way back, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_onn.arc.packing import pack
from tiny_onn.config.schema import Config, ModelConfig, MoeConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.inspect.experts import expert_stats
from tiny_onn.model import packed_weights as storage
from tiny_onn.model.checkpoint import PACKED, WEIGHTS, load_model, save_checkpoint
from tiny_onn.model.convert import convert, dense_state, packed_weights, unpack
from tiny_onn.model.packed_weights import NO_ROOM, best_form, settle_products
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.sparse.k24_layer import PatternMask
from tiny_onn.sparse.masked_linear import MaskedLinear
from tiny_onn.sparse.packed import packed_bytes
from tiny_onn.sparse.semi_structured import SPARSE_BACKENDS, Converted

MODEL = ModelConfig(
    width=32, layers=2, heads=2, kv_heads=2, head_width=16, ffn_width=48, weights="k24"
)
MOE = MoeConfig(experts=3, expert_width=8, target_active=1.5)
EXPERTS = replace(MODEL, ffn="dynmoe")
SHARED = replace(MOE, expert_weights="shared_k24")
KINDS = {
    "dense": (MODEL, MOE, K24Config()),
    "odd": (replace(MODEL, width=36, ffn_width=12), MOE, K24Config()),
    "relu2": (replace(MODEL, ffn="relu2"), MOE, K24Config(alpha_rank=2)),
    "free": (MODEL, MOE, K24Config(logits="free", alpha_init_std=1.0)),
    "s_ste": (replace(MODEL, weights="s_ste"), MOE, K24Config()),
    "random24": (replace(MODEL, weights="random24", ffn="relu2"), MOE, K24Config()),
    "separate": (EXPERTS, MOE, K24Config()),
    "shared": (EXPERTS, SHARED, K24Config()),
    "both": (EXPERTS, replace(SHARED, every=2), K24Config()),
}


def build(kind="dense", seed=0, **changes):
    """A network as if it were trained: masks that the inputs' sizes have a say in."""
    config, moe, k24 = KINDS[kind]
    torch.manual_seed(seed)
    model = build_model(replace(config, **changes), 3, moe, k24=k24)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    for pattern, _ in model.masked_weights:
        pattern.activity.total_AI.uniform_()
        pattern.activity.weight_A.fill_(1)
    return model.eval()


@pytest.fixture(scope="module")
def batch(documents):
    return pack(documents()[:3])


@torch.no_grad()
def logits(model, batch):
    return model(batch).logits_MV


def save(model, folder, kind="dense"):
    config, moe, k24 = KINDS[kind]
    whole = Config(out="runs/x", model=config, moe=moe, k24=k24)
    save_checkpoint(folder, model, whole, ("a", "b", "c"), {})


def masked(model):
    """The masked weights, by the names that they have in a dense network."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers = [m for m in model.modules() if isinstance(m, MaskedLinear)]
    with torch.no_grad():
        found = {names[id(w)]: (w, p(w)[0]) for p, w in model.masked_weights}
        found |= {names[id(m.weight)]: (m.weight, m.sparse_weight()[None]) for m in layers}
    return {n: m[0] if n.endswith(".weight") else m for n, (_, m) in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_network_predicts_the_same_bits_before_and_after_the_disk(kind, batch, tmp_path):
    model = build(kind)
    before = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model, batch)
    report = convert(model)
    assert len(report.packed) == 4 and report.refused == ()
    save(model, tmp_path / "x", kind)
    for packed in (model, load_model(tmp_path / "x").model):
        assert torch.equal(logits(packed, batch), before)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(packed, batch), half)
    assert not any("pattern" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_gives_the_masked_weights_and_a_dense_network_of_them(kind, batch):
    model = build(kind)
    weights, before = masked(model), logits(model, batch)
    convert(model)
    found = unpack(model)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight) and found[name].dtype == weight.dtype, name
    config, moe, _ = KINDS[kind]
    dense = build_model(
        replace(config, weights="dense"), 3, replace(moe, expert_weights="separate")
    )
    dense.load_state_dict(dense_state(model))
    assert torch.equal(logits(dense.eval(), batch), before)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, None) for kind in KINDS), ("odd", torch.bfloat16), ("shared", torch.bfloat16)],
)
def test_the_file_is_smaller_by_the_computed_bytes(kind, dtype, tmp_path):
    model = build(kind)
    save(model, tmp_path / "masked", kind)
    report = convert(model, dtype=dtype)
    save(model, tmp_path / "packed", kind)
    sizes = []
    for name, total in (("masked", report.bytes_before), ("packed", report.bytes_after)):
        data = (tmp_path / name / WEIGHTS).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        assert len(data) - header == total
        sizes.append(len(data))
    assert sizes[1] < sizes[0]
    kept = dtype or torch.float32
    for weight in report.packed:
        *stack, rows, columns = weight.shape
        columns += -columns % 8
        expected = packed_bytes((*stack, rows, columns), kept)
        if weight.form == "bits":
            expected = rows * columns * kept.itemsize + 3 * rows * columns // 8
        assert weight.packed_bytes == expected


def test_the_statistics_of_experts_are_those_of_the_masked_network(documents):
    model = build("shared")
    before = expert_stats(model, documents()[:3])
    convert(model)
    after = expert_stats(model, documents()[:3])
    assert before.fired_LQE.sum() > 0 and (after.fired_LQE == before.fired_LQE).all()


def test_experts_that_share_a_weight_keep_it_once_where_that_is_no_larger():
    assert best_form((1, 32, 32), torch.float32, True) == "rows"
    for experts in (2, 8):
        assert best_form((experts, 32, 32), torch.float32, True) == "bits"
        bits = 32 * 32 * 4 + experts * 32 * 4
        assert bits <= packed_bytes((experts, 32, 32), torch.float32)
    assert best_form((8, 32, 32), torch.bfloat16, False) == "hardware"
    assert best_form((8, 32, 48), torch.bfloat16, False) == "rows"
    assert best_form((32, 32), torch.float32, False) == "rows"


def test_without_cuda_auto_takes_the_reference_and_says_why():
    report = convert(build("both"), dtype=torch.bfloat16)
    assert {w.backend for w in report.packed} == {"reference"}
    for weight in report.packed:
        assert set(weight.refused) == set(SPARSE_BACKENDS)
        why = "stacks of dense matrices" if ".experts." in weight.name else "needs a CUDA device"
        assert why in weight.refused["cusparselt"]
    for weight in convert(build(), dtype=torch.float16).packed:
        assert weight.refused == dict.fromkeys(SPARSE_BACKENDS, NO_ROOM)
    assert all(w.refused == {} for w in convert(build(), "reference").packed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "dense"}, "dense weights"),
        ({"weights": "dense", "ffn": "dynmoe"}, "dense weights"),
        ({"weights": "dense", "ffn": "relu2_act24"}, "activations are packed per forward"),
    ],
)
def test_weights_without_masks_are_named_with_the_reason_and_left(changes, words):
    model = build(**changes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = convert(model)
    assert report.packed == () and len(report.refused) == 4
    assert all(words in w.reason and w.name in before for w in report.refused)
    assert report.bytes_before == report.bytes_after == sum(v.nbytes for v in before.values())
    assert model.packed is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _nan(model, patch):
    model.blocks[1].ffn.down.weight.data[3, 9] = float("nan")


def _huge(model, patch):
    model.blocks[0].ffn.gate_up.weight.data[5, 6] = 1e5


def _three(model, patch):
    likeliest = PatternMask.likeliest
    mask = lambda self, weight: likeliest(self, weight).index_fill(2, torch.arange(3), True)  # noqa: E731
    patch.setattr(PatternMask, "likeliest", mask)


BAD = {
    "nan": (_nan, {}, r"blocks.1.ffn.down.weight: it holds 1 NaN, the first at index \(3, 9\)"),
    "fp16": (
        _huge,
        {"dtype": torch.float16},
        r"blocks.0.ffn.gate_up.weight: as float16 it holds 1 infinities.*float16 ends at 65504",
    ),
    "three": (_three, {}, "gate_up.weight: 96 groups break 2:4, the first in row 0, group 0"),
    "three, shared": (_three, {}, r"experts.gate_up: 48 groups break .*row \(0, 0\), group 0"),
    "backend": (None, {"backend": "fast"}, "unknown sparse back-end 'fast'; expected one of auto"),
    "dtype": (None, {"dtype": torch.int8}, "got dtype torch.int8; expected one of float32"),
    "cutlass": (None, {"backend": "cutlass"}, "cutlass, which needs a CUDA device, on cpu"),
    "cusparselt": (None, {"backend": "cusparselt"}, "needs a CUDA device, on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_packed_is_one_line_and_nothing_is_packed(name, monkeypatch):
    spoil, given, words = BAD[name]
    model = build("shared" if "shared" in name else "dense")
    if spoil is not None:
        spoil(model, monkeypatch)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=words) as caught:
        convert(model, **given)
    assert "\n" not in str(caught.value)
    assert model.packed is None and [type(m) for m in model.modules()] == kinds


def test_bfloat16_has_room_for_what_float16_has_not_and_rounds_kept_weights_only(batch):
    model = build("both")
    _huge(model, None)
    for pattern, weight in model.masked_weights:
        keep = pattern.likeliest(weight)
        pattern.likeliest = lambda weight, keep=keep: keep
    rounded = {n: w.bfloat16() for n, w in masked(model).items()}
    convert(model, dtype=torch.bfloat16)
    found = unpack(model)
    assert all(torch.equal(found[n], rounded[n]) for n in rounded)
    assert logits(model, batch).isfinite().all()  # products are float32 as before


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_what_no_mask_keeps_may_be_too_large_for_the_type(kind, batch):
    """Of experts' own weights, and of one that they share."""
    model = build(kind)
    pattern, weight = model.masked_weights[0]
    keep = pattern.likeliest(weight)
    pattern.likeliest = lambda weight: keep
    with torch.no_grad():
        weight[~keep.any(dim=0)] = 1e5
    before = masked(model)
    convert(model, dtype=torch.float16)
    found = unpack(model)
    assert all(torch.equal(found[n], w.half()) for n, w in before.items())


def test_a_sparse_product_is_computed_outside_autocast_and_never_of_what_is_wider(monkeypatch):
    """By a stand-in for torch's sparse tensor, which autocast cannot cast."""
    model = build()
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
    monkeypatch, caplog
):
    """As on a GPU whose CUTLASS takes none, or but one, of the weights."""
    model = build()
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
    settle_products(build())  # nothing is packed


def test_a_packed_network_is_neither_packed_again_nor_trained():
    model = build()
    with pytest.raises(UserError, match="not packed"):
        unpack(model)
    convert(model)
    with pytest.raises(UserError, match="got a packed network to pack"):
        convert(model)
    with pytest.raises(UserError, match="no masks to learn"):
        model.train()


def test_a_network_packed_for_cuda_is_refused_elsewhere():
    model = build()
    convert(model)
    model.packed["backend"] = "cusparselt"
    with pytest.raises(BackendUnavailable, match="needs a CUDA device.*backend=auto"):
        model.use_backend("auto", "cpu", "fp32")


def _edit(change):
    def tear(folder):
        record = json.loads((folder / PACKED).read_text())
        change(record)
        (folder / PACKED).write_text(json.dumps(record))

    return tear


def _damage(change):
    def tear(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return tear


META, VALUES = "blocks.0.ffn.down.meta", "blocks.0.ffn.down.values"
BITS = "blocks.0.ffn.experts.down.bits"
TORN = {
    "no json": (lambda f: (f / PACKED).write_text("{"), "packed.json' is torn"),
    "a list": (lambda f: (f / PACKED).write_text("[]"), "record of packed weights is torn"),
    "format": (_edit(lambda r: r.update(format=2)), "format 2"),
    "a weight less": (_edit(lambda r: r["weights"].popitem()), "of another network"),
    "form": (_edit(lambda r: r["weights"]["blocks.0.ffn.down.weight"].update(form="bits")), "form"),
    "type": (
        _edit(lambda r: r["weights"]["blocks.0.ffn.down.weight"].update(dtype="float16")),
        VALUES,
    ),
    "codes": (_damage(lambda t: t[META].zero_()), "down.weight: packed meta holds codes other"),
    "bits": (_damage(lambda t: t[BITS].fill_(255)), "experts.down: .* groups break 2:4"),
    "no meta": (_damage(lambda t: t.pop(META)), META),
    "record gone": (lambda f: (f / PACKED).unlink(), "of another model"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_torn_packed_checkpoint_is_one_line(name, tmp_path):
    kind = "shared" if name == "bits" else "dense"
    model = build(kind)
    convert(model)
    save(model, tmp_path / "x", kind)
    tear, words = TORN[name]
    tear(tmp_path / "x")
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_sparse_tensor_cores_predict_what_the_reference_does(backend, autocast, batch):
    dtype = torch.bfloat16
    model = build(width=128, ffn_width=64, heads=4, kv_heads=4, head_width=32).cuda()
    model.blocks[0].ffn.gate_up.weight.data *= 2
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        report = convert(model, backend, dtype)
    except BackendUnavailable as error:
        assert "torch cannot run it here" in str(error) or "no cuSPARSELt" in str(error)
        pytest.skip(str(error))
    assert {w.backend for w in report.packed} == {backend}
    other = build(width=128, ffn_width=64, heads=4, kv_heads=4, head_width=32).cuda()
    other.load_state_dict(state)
    convert(other, "reference", dtype)
    for name, weight in packed_weights(other).items():
        assert torch.equal(weight.unpacked(), packed_weights(model)[name].unpacked())
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found, expected = logits(model, batch.to("cuda")), logits(other, batch.to("cuda"))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_weights_in_float16_are_refused_by_sparse_tensor_cores_and_predict_under_autocast(
    backend, batch
):
    model = build().cuda()
    with pytest.raises(BackendUnavailable, match="convert with dtype=bf16"):
        convert(model, backend, torch.float16)
    convert(model, "auto", torch.float16)
    with torch.autocast("cuda", torch.bfloat16):
        assert logits(model, batch.to("cuda")).isfinite().all()


@pytest.mark.gpu
def test_what_fills_no_tile_is_told_and_runs_by_the_reference(batch):
    model = build(width=64, ffn_width=24).cuda()
    try:
        report = convert(model, "cutlass", torch.bfloat16)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    told = {w.name.split(".")[-2]: w for w in report.packed}
    assert "multiples of 32 x 64, got (64, 24)" in told["down"].refused["cutlass"]
    assert told["down"].backend == "reference"
    assert logits(model, batch.to("cuda")).isfinite().all()
