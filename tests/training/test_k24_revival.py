"""Revival touches what no agent selected, its moments and its average, and nothing else."""

import pytest
import torch

from tiny_onn.config.schema import ModelConfig, MoeConfig, OptimConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.ema import WeightEma
from tiny_onn.training.k24_control import K24Control
from tiny_onn.training.k24_revival import revive
from tiny_onn.training.optim import build_optimizer

SIZES = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8, "ffn_width": 24}


class Scene:
    """A model under masks, its optimizer with moments and an average of its weights."""

    def __init__(self, expert_weights, matrices="muon", **k24):
        torch.manual_seed(0)
        moe = MoeConfig(experts=3, expert_width=8, expert_weights=expert_weights)
        config = ModelConfig(**SIZES, ffn="dynmoe", weights="k24")
        self.config = K24Config(**k24)
        self.model = build_model(config, 2, moe, k24=self.config)
        self.optimizer = build_optimizer(self.model, OptimConfig(matrices=matrices))
        self.ema = WeightEma(self.model, 0.9)
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        self.optimizer.step()
        self.ema.update()

    def state(self):
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = p.detach().clone()
            found[f"{name}:ema"] = self.ema._shadow[name].clone()
            for key, moment in self.optimizer.state[p].items():
                found[f"{name}:{key}"] = moment.clone()
        return found


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("expert_weights", ["separate", "shared_k24"])
def test_only_entries_that_no_agent_selected_begin_anew(expert_weights, matrices):
    scene = Scene(expert_weights, matrices)
    pattern, weight = scene.model.masked_weights[2]
    selected = torch.rand(pattern.alpha.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    dead = ~selected if expert_weights == "separate" else ~selected.any(dim=0)
    before = scene.state()
    with torch.no_grad():
        alive = weight[~dead].square().mean().sqrt()
    generator = torch.Generator().manual_seed(2)
    count = revive(pattern, weight, selected, 1.0, generator, scene.optimizer, scene.ema)
    assert count == int(dead.sum()) > 0
    after = scene.state()
    own = {"blocks.1.ffn.experts.gate_up", "blocks.1.ffn.experts.gate_up_pattern.alpha"}
    for name, value in after.items():
        parameter, _, moment = name.partition(":")
        if parameter not in own or moment == "step":
            assert torch.equal(value, before[name]), name
            continue
        where = dead.expand(value.shape)
        assert torch.equal(value[~where], before[name][~where]), name
        if moment == "ema":
            assert torch.equal(value[where], after[parameter][where])
        elif moment:
            assert value[where].abs().max() == 0
        else:
            assert (value[where] != before[name][where]).all()
    new = after["blocks.1.ffn.experts.gate_up"][dead]
    assert float(new.std()) == pytest.approx(float(alive), rel=0.3)


def test_a_share_of_them_is_revived_and_alike_for_the_same_seed():
    counts, results = [], []
    for _ in range(2):
        scene = Scene("separate")
        pattern, weight = scene.model.masked_weights[0]
        selected = torch.zeros_like(pattern.alpha, dtype=torch.bool)
        generator = torch.Generator().manual_seed(2)
        counts.append(revive(pattern, weight, selected, 0.25, generator, scene.optimizer))
        results.append(weight.detach().clone())
    assert counts[0] == counts[1] == pytest.approx(0.25 * weight.numel(), rel=0.3)
    assert torch.equal(*results)


def test_where_all_are_selected_or_late_in_the_run_nothing_is_touched():
    scene = Scene("shared_k24", revive_window=2, revive_share=1.0)
    share = [0.1]
    control = K24Control(scene.config, seed=1, share=lambda: share[0])
    control.attach(scene.model)
    before = scene.state()
    for late, selected in ((0.1, True), (0.9, False)):
        share[0] = late
        for step in range(2):
            for pattern, _ in scene.model.masked_weights:
                pattern.selected = torch.full(pattern.alpha.shape, selected)
            control.begin_step(step)
            control.end_step(scene.optimizer, step)
            assert (scene.model.masked_weights[0][0].selected is None) == (step == 1)
    assert control.revived == 0
    for name, value in scene.state().items():
        assert torch.equal(value, before[name]), name


def test_the_window_goes_on_from_a_snapshot():
    scene = Scene("shared_k24", revive_window=5)
    control = K24Control(scene.config, seed=1)
    control.attach(scene.model)
    pattern = scene.model.masked_weights[1][0]
    pattern.selected = torch.rand(pattern.alpha.shape) < 0.5
    kept = control.snapshot()
    other = Scene("shared_k24", revive_window=5)
    again = K24Control(other.config, seed=1, restored=kept)
    again.attach(other.model)
    assert torch.equal(other.model.masked_weights[1][0].selected, pattern.selected)
    assert other.model.masked_weights[0][0].selected is None
