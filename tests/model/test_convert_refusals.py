"""What cannot be packed, or is no packed network: one line, and nothing is changed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.model.checkpoint import PACKED, WEIGHTS, load_model
from tiny_onn.model.convert import convert, unpack
from tiny_onn.sparse.k24_layer import PatternMask


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "dense"}, "dense weights"),
        ({"weights": "dense", "ffn": "dynmoe"}, "dense weights"),
        ({"weights": "dense", "ffn": "relu2_act24"}, "activations are packed per forward"),
    ],
)
def test_weights_without_masks_are_named_with_the_reason_and_left(packable, changes, words):
    model = packable.build(**changes)
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
def test_what_cannot_be_packed_is_one_line_and_nothing_is_packed(packable, name, monkeypatch):
    spoil, given, words = BAD[name]
    model = packable.build("shared" if "shared" in name else "dense")
    if spoil is not None:
        spoil(model, monkeypatch)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=words) as caught:
        convert(model, **given)
    assert "\n" not in str(caught.value)
    assert model.packed is None and [type(m) for m in model.modules()] == kinds


def test_a_packed_network_is_neither_packed_again_nor_trained(packable):
    model = packable.build()
    with pytest.raises(UserError, match="not packed"):
        unpack(model)
    convert(model)
    with pytest.raises(UserError, match="got a packed network to pack"):
        convert(model)
    with pytest.raises(UserError, match="no masks to learn"):
        model.train()


def test_a_network_packed_for_cuda_is_refused_elsewhere(packable):
    model = packable.build()
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
def test_a_torn_packed_checkpoint_is_one_line(packable, name, tmp_path):
    kind = "shared" if name == "bits" else "dense"
    model = packable.build(kind)
    convert(model)
    packable.save(model, tmp_path / "x", kind)
    tear, words = TORN[name]
    tear(tmp_path / "x")
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_bfloat16_has_room_for_what_float16_has_not_and_rounds_kept_weights_only(
    packable, packed_batch
):
    model = packable.build("both")
    _huge(model, None)
    for pattern, weight in model.masked_weights:
        keep = pattern.likeliest(weight)
        pattern.likeliest = lambda weight, keep=keep: keep
    rounded = {n: w.bfloat16() for n, w in packable.masked(model).items()}
    convert(model, dtype=torch.bfloat16)
    found = unpack(model)
    assert all(torch.equal(found[n], rounded[n]) for n in rounded)
    assert packable.logits(model, packed_batch).isfinite().all()  # products are float32 as before


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_what_no_mask_keeps_may_be_too_large_for_the_type(packable, kind, packed_batch):
    """Of experts' own weights, and of one that they share."""
    model = packable.build(kind)
    pattern, weight = model.masked_weights[0]
    keep = pattern.likeliest(weight)
    pattern.likeliest = lambda weight: keep
    with torch.no_grad():
        weight[~keep.any(dim=0)] = 1e5
    before = packable.masked(model)
    convert(model, dtype=torch.float16)
    found = unpack(model)
    assert all(torch.equal(found[n], w.half()) for n, w in before.items())
