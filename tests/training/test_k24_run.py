"""Whole runs with weights=k24: learning, exact resumption, excursions, hold-outs, revival."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny_onn.config.schema_24 import K24Config
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model
from tiny_onn.sparse.k24_diversity import mask_overlap
from tiny_onn.sparse.k24_schedule import K24Schedule
from tiny_onn.training.k24_control import K24Control
from tiny_onn.training.run import run_training

DENSE = {"model": {"weights": "k24", "dropout": 0.1, "layers": 2}}
SEPARATE = {
    "model": {"weights": "k24", "ffn": "dynmoe", "layers": 2},
    "moe": {"experts": 4, "expert_width": 16, "target_active": 1.5},
    "reset": {"window_steps": 0},
}
SHARED = SEPARATE | {"moe": SEPARATE["moe"] | {"expert_weights": "shared_k24"}}


def column(config, name, version=0):
    path = Path(config.out) / "logs" / f"version_{version}" / "metrics.csv"
    with open(path) as file:
        return [float(row[name]) for row in csv.DictReader(file) if row["loss"]]


def weights(config):
    path = Path(config.out) / "checkpoint" / "weights.safetensors"
    return {k: v.numpy().tobytes() for k, v in load_file(path).items()}


@pytest.mark.parametrize("settings", [DENSE, SEPARATE, SHARED], ids=["dense", "separate", "shared"])
def test_a_run_learns_and_tells_of_its_masks(tiny, settings):
    config = tiny(**settings, budget={"steps": 30})
    assert run_training(config) == 0
    losses = column(config, "loss")
    assert losses[-1] < losses[0] - 0.3
    kappa, tau = column(config, "k24/kappa"), column(config, "k24/tau")
    share = [(step + 0.5) / 30 for step in range(30)]  # of the budget, in mid-step
    schedule = K24Schedule()
    assert kappa == pytest.approx([schedule.kappa_at(s) for s in share])
    assert tau == pytest.approx([schedule.tau_at(s) for s in share])
    agreement = column(config, "k24/agreement")
    assert 0.2 < agreement[0] < 0.5 < 0.75 < agreement[-1]
    loaded = load_model(config.out)
    shared = settings is SHARED
    for pattern, weight in loaded.model.masked_weights:
        alpha = pattern.alpha.detach()
        assert float(alpha.std()) != pytest.approx(1.0 if shared else 0.1, rel=1e-3)
        assert pattern.activity.weight_A.min() > 0 and pattern.activity.value().min() >= 0
        assert weight.dim() == (2 if shared or settings is DENSE else 3)
    assert not shared or 0 < column(config, "k24/diversity")[0] < 0.3
    facts = json.loads((Path(config.out) / "metrics.json").read_text())
    assert facts["weights"] == "k24" and facts["pattern_parameters"] > 0


def test_the_diversity_loss_drives_the_masks_of_experts_apart(tiny, tmp_path):
    overlaps = {}
    for weight in (0.0, 30.0):
        config = tiny(
            **SHARED,
            budget={"steps": 30},
            optim={"pattern_lr": 0.1},
            k24=K24Config(div_coef=weight, div_kernel="overlap"),
        )
        config = replace(config, out=str(tmp_path / str(weight)))
        run_training(config)
        masked = load_model(config.out).model.masked_weights
        overlaps[weight] = [float(mask_overlap(p.likeliest(w))) for p, w in masked]
    assert all(a < b - 0.05 for a, b in zip(overlaps[30.0], overlaps[0.0], strict=True)), overlaps


@pytest.mark.parametrize(
    ("settings", "step"), [(DENSE, 4), (SHARED, 1)], ids=["dense-4", "shared-1"]
)
def test_a_run_cut_in_the_middle_goes_on_bit_for_bit(tiny, tmp_path, interrupt, settings, step):
    k24 = K24Config(revive_window=3, reset_interval=4, until_share=1.0)
    whole = tiny(**settings, optim={"ema_decay": 0.9}, budget={"steps": 9}, k24=k24)
    whole = replace(whole, out=str(tmp_path / "whole"))
    run_training(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    with interrupt(step, signal.SIGINT):
        assert run_training(cut) == 130
    assert run_training(cut) == 0
    assert weights(whole) == weights(cut)
    for name in ("loss", "k24/kappa", "k24/agreement", "k24/resets", "k24/revived"):
        assert column(cut, name) + column(cut, name, version=1) == column(whole, name)
    assert column(whole, "k24/resets") == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    revived = column(whole, "k24/revived")
    assert revived[1] == 0 < revived[2] < revived[8]


def test_hold_outs_leave_no_trace(tiny, tmp_path):
    shared = DENSE | {"data": {"holdout": "demos"}, "budget": {"steps": 8}}
    often = tiny(**shared, trainer={"holdout_share": 0.25, "holdout_decode": 2})
    once = tiny(**shared, trainer={"holdout_decode": 2})
    often, once = replace(often, out=str(tmp_path / "a")), replace(once, out=str(tmp_path / "b"))
    run_training(often)
    run_training(once)
    assert weights(often) == weights(once)


def test_stage_eavi_goes_on_with_a_masked_model_and_predicts(pretrained, predict_two):
    first, second = pretrained(**SHARED)
    assert run_training(second) == 0
    assert weights(first) != weights(second)
    scores = [predict_two(Path(second.out)) for _ in range(2)]
    assert scores[0] == scores[1]


def test_another_stage_may_change_what_masks_learn_by_but_not_what_they_are(pretrained):
    _, second = pretrained(**DENSE)
    settled = replace(second.k24, weight_grad="straight")
    for k24, why in (
        (replace(settled, logits="free"), "k24.logits=additive"),
        (replace(settled, act_stat="l2"), "k24.act_stat=l1"),
        (replace(settled, alpha_rank=2), "k24.alpha_rank=0"),
        (replace(settled, kappa_start=8.0), r"masks settled at k24.kappa_end=16.0"),
    ):
        with pytest.raises(UserError, match=why):
            run_training(replace(second, k24=k24))
    assert run_training(replace(second, k24=settled)) == 0


def test_predictions_that_move_by_less_than_the_threshold_reset_nothing(tiny, tmp_path):
    resets = {}
    for kl in (1e-9, 1e9):
        k24 = K24Config(reset_interval=2, reset_kl=kl, until_share=1.0)
        config = replace(tiny(**DENSE, budget={"steps": 6}, k24=k24), out=str(tmp_path / str(kl)))
        run_training(config)
        resets[kl] = column(config, "k24/resets")[-1]
    assert resets == {1e-9: 3, 1e9: 0}


def test_noise_is_the_same_in_all_processes_and_differs_by_step(tiny):
    from tiny_onn.model.tiny_onn import build_model

    config = tiny(**DENSE)
    model = build_model(config.model, 3, k24=config.k24)
    control = K24Control(config.k24, seed=3)
    control.attach(model)
    seeds = []
    for step in range(3):
        control.begin_step(step)
        seeds.append(model.k24.state.seed)
    assert len(set(seeds)) == 3
    again = K24Control(config.k24, seed=3)
    again.attach(model)
    again.begin_step(1)
    assert model.k24.state.seed == seeds[1]


@pytest.mark.slow
def test_two_processes_draw_the_same_masks_and_statistics(tiny, start, tmp_path):
    one = tiny(**SHARED, budget={"steps": 6})
    one = replace(one, out=str(tmp_path / "one"))
    run_training(one)
    two = tiny(**SHARED, budget={"steps": 6}, trainer={"devices": 2, "strategy": "fsdp"})
    two = replace(two, out=str(tmp_path / "two"))
    process = start(two)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for name in ("loss", "k24/agreement", "k24/diversity"):
        assert column(two, name) == pytest.approx(column(one, name), rel=2e-2)
    states = [load_file(Path(c.out) / "checkpoint" / "weights.safetensors") for c in (one, two)]
    for name in states[0]:
        if "activity" in name:
            a, b = (state[name] for state in states)
            # In front of down it is of a sample of each process's rows.
            share = 0.03 if ".down_pattern." in name else 0.005
            assert (a - b).norm() <= share * a.norm(), name
