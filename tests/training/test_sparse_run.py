"""Whole runs of the assembled sparse network: NSA that chooses blocks, experts that are reborn and
DeepEmbed; learning, logs, hold-outs, resumption, two processes."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_onn.config.schema import DeepEmbedConfig, NsaConfig
from tiny_onn.model.checkpoint import load_model
from tiny_onn.training import run
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.run import run_training

MODEL = {
    "attention": "nsa",
    "ffn": "dynmoe",
    "deep_embed": DeepEmbedConfig(keys=["token", "task"], form="1x", task_rank=4),
    "layers": 2,
}
# Pairs have 15 to 43 tokens: n l' = 24 of them are read in full in some documents, not in others.
NSA = NsaConfig(block=4, stride=2, select_block=4, select_count=6, window=9)
SPARSE = {
    "model": MODEL | {"dropout": 0.1},
    "nsa": NSA,
    "moe": {"experts": 4, "expert_width": 16, "target_active": 1.5},
    "reset": {"window_steps": 3, "patience": 1, "warmup_steps": 4, "until_share": 1.0},
    "optim": {"ema_decay": 0.9},
}

DEAD_EXPERT = """
import torch
from tiny_onn.training import run

_build = run.build_model

def build_with_a_dead_expert(*given):
    model = _build(*given)
    with torch.no_grad():
        model.expert_layers[0].gate.thresholds[1] = 2.0
    return model
"""

WITNESS = (
    DEAD_EXPERT
    + """
from pathlib import Path
from tiny_onn.training.distributed import whole
from tiny_onn.training.expert_reset import ExpertReset

class Witness(ExpertReset):
    def on_train_end(self, trainer, module):
        found = {f"reset:{k}": v for k, v in self.snapshot().items()}
        found |= {f"{k}:ema": v for k, v in self._ema().state_dict()["shadow"].items()}
        for name, p in module.model.named_parameters():
            found[name] = whole(p.detach()).clone()
            for key, moment in trainer.optimizers[0].state[p].items():
                found[f"{name}:{key}"] = whole(moment).clone()
        torch.save(found, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")

run.build_model, run.ExpertReset = build_with_a_dead_expert, Witness
"""
)


@pytest.fixture
def dead_expert(monkeypatch):
    """Expert 1 of the first block starts with a threshold that no cosine reaches."""
    names = {}
    exec(DEAD_EXPERT, names)
    monkeypatch.setattr(run, "build_model", names["build_with_a_dead_expert"])


@pytest.fixture
def attention(monkeypatch):
    """What NSA does in the runs of a test: every batch's plan, every layer's chosen blocks."""
    plans, chosen, build = [], [], run.build_model

    def build_watched(*given):
        model = build(*given)
        plan_attention = model.plan_attention

        def plan(batch):
            plans.append(plan_attention(batch))
            return plans[-1]

        model.plan_attention = plan
        for block in model.blocks:
            block.attention.watch = lambda _, index_NKn: chosen.append(index_NKn)
        return model

    monkeypatch.setattr(run, "build_model", build_watched)
    return plans, chosen


def rows(config, version=0):
    with open(Path(config.out) / "logs" / f"version_{version}" / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def column(config, name, version=0):
    return [float(row[name]) for row in rows(config, version)]


def weights(config):
    path = Path(config.out) / "checkpoint" / "weights.safetensors"
    return {k: v.numpy().tobytes() for k, v in load_file(path).items()}


def test_a_run_learns_chooses_blocks_and_tells_what_experts_did(tiny, attention):
    config = tiny(**SPARSE | {"model": MODEL}, budget={"steps": 30})
    assert run_training(config) == 0
    losses = column(config, "loss")
    assert losses[-1] < losses[0] - 0.3
    plans, chosen = attention
    assert len(plans) == 30 and len(chosen) == 60
    # Every batch has documents of either kind, and two layers' queries choose other blocks.
    assert all(plan.selected.layout and plan.selected.full for plan in plans)
    for first, second in zip(chosen[::2], chosen[1::2], strict=True):
        assert first.max() >= NSA.select_count and not torch.equal(first, second)
    for layer in (0, 1):
        active, none = column(config, f"moe/active_{layer}"), column(config, f"moe/none_{layer}")
        loads = [column(config, f"moe/load_{layer}_{e}") for e in range(4)]
        for step in range(30):
            assert sum(load[step] for load in loads) == pytest.approx(active[step])
            assert 0 <= none[step] < 1
        assert column(config, f"moe/resets_{layer}")[0] == 0
    expected = sum((column(config, f"moe/active_{i}")[4] / 1.5 - 1) ** 2 for i in (0, 1)) / 2
    assert column(config, "sdl/sparsity")[4] == pytest.approx(expected, rel=1e-4)
    loaded = load_model(config.out)
    assert loaded.config.moe == config.moe and loaded.config.nsa == NSA
    assert all(table.any() for table in loaded.model.deep_embed.parameters())
    facts = json.loads((Path(config.out) / "metrics.json").read_text())
    layers = loaded.model.expert_layers
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    assert facts["expert_parameters"] == experts == 2 * 4 * 3 * 32 * 16
    assert 0 < facts["expert_pairs"] < 4 * 2 * facts["tokens"]


def test_sdl_drives_the_mean_number_of_active_experts_to_the_target(tiny, tmp_path, monkeypatch):
    original = run.build_model

    def build_with_low_thresholds(*given):
        model = original(*given)
        torch.nn.init.constant_(model.expert_layers[0].gate.thresholds, -0.3)
        return model

    monkeypatch.setattr(run, "build_model", build_with_low_thresholds)
    apart = {}
    for weight in (0.0, 3.0):
        config = tiny(
            model={"ffn": "dynmoe"},
            moe={"target_active": 1.0, "sparsity_weight": weight},
            reset={"window_steps": 0},
            optim={"adamw_lr": 0.02},
            budget={"steps": 60},
        )
        config = replace(config, out=str(tmp_path / str(weight)))
        run_training(config)
        active = column(config, "moe/active_0")
        assert active[0] > 3
        apart[weight] = abs(sum(active[-10:]) / 10 - 1.0)
    assert apart[3.0] < 0.2 < 1 < apart[0.0]


def test_the_loss_that_is_told_is_the_language_loss_alone(tiny, tmp_path, monkeypatch):
    returned, original = [], Pretrain.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        returned.append((float(loss.detach()), float(self.language_loss)))
        return loss

    monkeypatch.setattr(Pretrain, "training_step", training_step)
    for weight in (0.0, 1.0):
        moe = SPARSE["moe"] | {"sparsity_weight": weight, "diversity_weight": weight}
        config = tiny(**SPARSE | {"moe": moe}, budget={"steps": 3})
        config = replace(config, out=str(tmp_path / str(weight)))
        run_training(config)
        assert column(config, "loss") == pytest.approx([told for _, told in returned[-3:]])
    assert all(total == told for total, told in returned[:3])
    assert all(total > told for total, told in returned[3:])


def test_a_dead_expert_is_reborn_and_hold_outs_leave_no_trace(tiny, tmp_path, dead_expert):
    shared = SPARSE | {"data": {"holdout": "demos"}, "budget": {"steps": 8}}
    often = tiny(**shared, trainer={"holdout_share": 0.25, "holdout_decode": 2})
    once = tiny(**shared, trainer={"holdout_decode": 2})
    often, once = replace(often, out=str(tmp_path / "a")), replace(once, out=str(tmp_path / "b"))
    run_training(often)
    run_training(once)
    assert column(often, "moe/resets_0") == [0, 0, 1, 1, 1, 1, 1, 1]
    assert column(often, "moe/load_0_1")[:3] == [0, 0, 0]
    assert max(column(often, "moe/load_0_1")[3:]) > 0.1
    assert weights(often) == weights(once)
    for name in ("moe/active_0", "moe/load_1_2", "moe/resets_0"):
        assert column(often, name) == column(once, name)


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_cut_in_mid_window_goes_on_bit_for_bit(tiny, tmp_path, interrupt, dead_expert, step):
    """Before the first rebirth, and after it, while the newborn's learning rate still rises."""
    whole = replace(tiny(**SPARSE, budget={"steps": 9}), out=str(tmp_path / "whole"))
    cut = replace(whole, out=str(tmp_path / "cut"))
    run_training(whole)
    with interrupt(step, signal.SIGINT):
        assert run_training(cut) == 130
    assert run_training(cut) == 0
    assert weights(whole) == weights(cut)
    for name in ("loss", "moe/resets_0", "moe/load_0_1"):
        assert column(cut, name) + column(cut, name, version=1) == column(whole, name)
    facts = [json.loads((Path(c.out) / "metrics.json").read_text()) for c in (whole, cut)]
    assert facts[0]["expert_pairs"] == facts[1]["expert_pairs"]


@pytest.mark.slow
def test_two_processes_count_and_decide_alike_bit_for_bit(tiny, start, tmp_path, dead_expert):
    settings = SPARSE | {
        "model": MODEL,
        "reset": SPARSE["reset"] | {"window_steps": 6, "warmup_steps": 2},
        "budget": {"steps": 9},
    }
    one = replace(tiny(**settings), out=str(tmp_path / "one"))
    run_training(one)
    states = {}
    for strategy in ("ddp", "fsdp"):
        two = tiny(**settings, trainer={"devices": 2, "strategy": strategy})
        two = replace(two, out=str(tmp_path / strategy))
        process = start(two, prelude=WITNESS)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        # Up to the first rebirth, whose candidates differ, as one process.
        for name in ("loss", "sdl/sparsity", "sdl/diversity", "moe/active_1", "moe/none_1"):
            got, want = column(two, name)[:6], column(one, name)[:6]
            assert got == pytest.approx(want, rel=2e-3, abs=1e-6), name
        assert column(two, "moe/resets_0") == [0] * 5 + [1] * 4 == column(one, "moe/resets_0")
        ranks = [torch.load(tmp_path / strategy / f"rank{r}.pt") for r in (0, 1)]
        assert ranks[0].keys() == ranks[1].keys()
        for name, value in ranks[0].items():
            assert torch.equal(value, ranks[1][name]), name
        states[strategy] = ranks[0]
    for name, value in states["ddp"].items():  # Newton-Schulz in bfloat16 magnifies last bits
        other = states["fsdp"][name]
        assert (value - other).float().norm() <= 0.05 * value.float().norm() + 1e-6, name
