"""Whole runs with 2:4 activations: the switch, logs, resumption, both stages, prediction."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny_onn.config.schema_24 import ActSparse24Config
from tiny_onn.model.checkpoint import load_model
from tiny_onn.model.ffn import act24_layers
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.sparse.activation import DropTally
from tiny_onn.training.provenance import train_flops
from tiny_onn.training.run import run_training
from tiny_onn.training.totals import RunTotals

ACT24 = ActSparse24Config(activation_dense_warmup_steps=3)
MODEL = {"ffn": "relu2_act24", "layers": 2, "act24": ACT24}


def column(config, name, version=0):
    with open(Path(config.out) / "logs" / f"version_{version}" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row["loss"]]


def weights(config):
    path = Path(config.out) / "checkpoint" / "weights.safetensors"
    return {k: v.numpy().tobytes() for k, v in load_file(path).items()}


def test_a_run_switches_after_its_warm_up_tells_what_it_drops_and_learns(tiny):
    config = tiny(model=MODEL, budget={"steps": 24})
    assert run_training(config) == 0
    assert column(config, "act24/sparse") == [0.0] * 2 + [1.0] * 22  # as the next step will be
    for layer in (0, 1):
        dropped = column(config, f"act24/dropped_{layer}")
        assert all(0 < share < 0.5 for share in dropped)
        assert all(0 < share < 1 for share in column(config, f"act24/nonzero_{layer}"))
        lost = column(config, f"act24/feature_dropped_{layer}")
        assert lost[:3] == [0.0] * 3
    losses = column(config, "loss")
    assert losses[-1] < losses[0] - 0.3
    loaded = load_model(config.out)
    assert all(int(f.optimizer_steps) == 24 and f.is_sparse for f in act24_layers(loaded.model))
    assert loaded.provenance["ffn"] == "relu2_act24"


def test_drawn_activations_train_and_a_cut_run_goes_on_bit_for_bit(tiny, tmp_path, interrupt):
    act24 = replace(ACT24, activation_sparse_method="mvue", gradient_sparse_method="mvue")
    whole = tiny(model=MODEL | {"act24": act24, "ffn_width": 64}, budget={"steps": 7})
    whole = replace(whole, out=str(tmp_path / "whole"))
    cut = replace(whole, out=str(tmp_path / "cut"))
    run_training(whole)
    with interrupt(5, signal.SIGINT):
        assert run_training(cut) == 130
    assert run_training(cut) == 0
    assert weights(whole) == weights(cut)
    losses = column(cut, "loss") + column(cut, "loss", version=1)
    assert losses == column(whole, "loss")
    facts = [json.loads((Path(c.out) / "metrics.json").read_text()) for c in (whole, cut)]
    assert facts[0]["train_flops"] == facts[1]["train_flops"]


def test_stage_eavi_goes_on_sparse_where_pretraining_was(pretrained):
    first, second = pretrained(steps=5, model=MODEL)
    assert column(first, "act24/sparse")[-1] == 1.0
    assert run_training(second) == 0
    assert column(second, "act24/sparse") == [1.0] * 6
    assert column(second, "eavi/share")
    steps = [int(f.optimizer_steps) for f in act24_layers(load_model(second.out).model)]
    assert steps == [11, 11]


def test_its_checkpoint_predicts_and_only_steps_that_are_logged_are_counted(
    tiny, predict_two, monkeypatch
):
    counted, add = [], DropTally.add_tokens

    def counting(tally, before, after):
        counted.append(after is not None)
        add(tally, before, after)

    monkeypatch.setattr(DropTally, "add_tokens", counting)
    config = tiny(model=MODEL, budget={"steps": 4}, trainer={"log_every_steps": 2})
    assert run_training(config) == 0
    assert counted == [False, False, True, True]  # two layers, in steps 2 and 4 of 4
    assert all(0 < share < 0.5 for share in column(config, "act24/dropped_1"))
    assert predict_two(Path(config.out), "precision=fp32")["num_tasks"] == 2


def test_a_product_with_a_sparse_operand_counts_half(tiny):
    act24 = replace(ACT24, split_ratio=1.0)
    config = tiny(model=MODEL | {"act24": act24, "layers": 1, "width": 32, "ffn_width": 64})
    model, dense = build_model(config.model, 3), build_model(replace(config.model, ffn="relu2"), 3)
    dense_steps = RunTotals(tokens=300, targets=90, documents=6)
    same = train_flops(dense, config.model, dense_steps)
    assert train_flops(model, config.model, dense_steps) == same
    hidden = 64 if model.blocks[0].ffn.up.weight.shape[0] == 64 else 128
    sparse_steps = replace(dense_steps, sparse_tokens=200, sparse_targets=60)
    # forward of the second product, dX, dU, dD: 4 of 6 products of 2 each, at half; the last
    # block's FFN sees rows with a target only
    saved = 60 * 32 * hidden * 4
    assert train_flops(model, config.model, sparse_steps) == same - saved
    split = replace(config.model, act24=replace(act24, dx_direct_sparse=False))
    model = build_model(split, 3)
    assert train_flops(model, split, sparse_steps) == same - saved * 3 // 4


@pytest.mark.slow
def test_two_processes_train_as_one(tiny, start, tmp_path):
    """With exact weight gradients: otherwise groups of tokens are each process's own."""
    act24 = replace(ACT24, split_ratio=0.0)
    one = replace(tiny(model=MODEL | {"act24": act24}), out=str(tmp_path / "one"))
    two = tiny(model=one.model.__dict__, trainer={"devices": 2, "strategy": "fsdp"})
    two = replace(two, out=str(tmp_path / "two"))
    assert run_training(one) == 0
    process = start(two)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=2e-3)
    for name in ("act24/sparse", "act24/dropped_0", "act24/nonzero_1"):
        # Rows that fill up the packed batches, more of them in two, are counted too.
        assert column(two, name) == pytest.approx(column(one, name), rel=0.2), name
    assert [int(f.optimizer_steps) for f in act24_layers(load_model(two.out).model)] == [6, 6]
