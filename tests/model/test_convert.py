"""Packing a trained network: the same predictions, the computed bytes, the way back."""

from dataclasses import replace

import pytest
import torch

from tiny_onn.inspect.experts import expert_stats
from tiny_onn.model.checkpoint import WEIGHTS, load_model
from tiny_onn.model.convert import convert, dense_state, unpack
from tiny_onn.model.packed_weights import best_form
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.sparse.packed import packed_bytes

KINDS = (
    "dense", "odd", "relu2", "free", "s_ste", "random24", "separate", "shared", "both",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_network_predicts_the_same_bits_before_and_after_the_disk(
    packable, kind, packed_batch, tmp_path
):
    model = packable.build(kind)
    before = packable.logits(model, packed_batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = packable.logits(model, packed_batch)
    report = convert(model)
    assert len(report.packed) == 4 and report.refused == ()
    packable.save(model, tmp_path / "x", kind)
    for packed in (model, load_model(tmp_path / "x").model):
        assert torch.equal(packable.logits(packed, packed_batch), before)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packable.logits(packed, packed_batch), half)
    assert not any("pattern" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_gives_the_masked_weights_and_a_dense_network_of_them(
    packable, kind, packed_batch
):
    model = packable.build(kind)
    weights, before = packable.masked(model), packable.logits(model, packed_batch)
    convert(model)
    found = unpack(model)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight) and found[name].dtype == weight.dtype, name
    config, moe, _ = packable.KINDS[kind]
    dense = build_model(
        replace(config, weights="dense"), 3, replace(moe, expert_weights="separate")
    )
    dense.load_state_dict(dense_state(model))
    assert torch.equal(packable.logits(dense.eval(), packed_batch), before)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, None) for kind in KINDS), ("odd", torch.bfloat16), ("shared", torch.bfloat16)],
)
def test_the_file_is_smaller_by_the_computed_bytes(packable, kind, dtype, tmp_path):
    model = packable.build(kind)
    packable.save(model, tmp_path / "masked", kind)
    report = convert(model, dtype=dtype)
    packable.save(model, tmp_path / "packed", kind)
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


def test_the_statistics_of_experts_are_those_of_the_masked_network(packable, documents):
    model = packable.build("shared")
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
