"""Idle experts are reborn: when, from what, and that nothing else changes."""

from dataclasses import replace

import pytest
import torch

from tiny_onn.config.schema import ModelConfig, MoeConfig, OptimConfig, ResetConfig
from tiny_onn.model.gate import unit
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.ema import WeightEma
from tiny_onn.training.expert_reset import ExpertReset, choose_prototypes, threshold_for
from tiny_onn.training.optim import build_optimizer

E, WIDTH = 4, 16
RESET = ResetConfig(
    window_steps=3, min_share=0.05, patience=2, max_experts=2, warmup_steps=4, until_share=0.7
)


class Scene:
    """A model with two layers of experts, its optimizer with moments, an average, a reset."""

    def __init__(self, config=RESET, share=0.0, restored=None, matrices="muon", k24=None):
        torch.manual_seed(0)
        sizes = {"layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8, "ffn_width": 16}
        moe = MoeConfig(experts=E, expert_width=8, target_active=1.0)
        if k24 is not None:
            sizes["weights"] = "k24"
            moe = replace(moe, expert_weights=k24)
        self.model = build_model(ModelConfig(width=WIDTH, ffn="dynmoe", **sizes), 2, moe)
        self.optimizer = build_optimizer(self.model, OptimConfig(matrices=matrices))
        self.ema = WeightEma(self.model, 0.9)
        self.share = share
        self.reset = ExpertReset(
            config, 1.0 / E, seed=5, ema=lambda: self.ema, share=lambda: self.share,
            restored=restored,
        )  # fmt: skip
        self.reset.attach(self.model.expert_layers)
        self.optimize()

    def optimize(self):
        torch.manual_seed(1)
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        self.optimizer.step()
        self.ema.update()

    def state(self):
        """Everything a rebirth may touch, cloned, by name."""
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = p.detach().clone()
            found[f"{name}:ema"] = self.ema._shadow[name].clone()
            for key, moment in self.optimizer.state[p].items():
                found[f"{name}:{key}"] = moment.clone()
        return found

    def step(self, number, active_LE, tokens=100):
        sample_LSC = torch.randn(2, 64, WIDTH, generator=torch.Generator().manual_seed(number))
        self.reset.begin_step(self.optimizer)
        self.reset.end_step(
            self.optimizer, number, torch.tensor(active_LE), torch.tensor([tokens] * 2), sample_LSC
        )


HEALTHY = [30, 30, 30, 30]
IDLE = [[30, 2, 30, 30], HEALTHY]
"""Expert 1 of layer 0 fires for 2 of 100 tokens."""


def test_an_expert_is_reborn_after_its_idle_windows_in_a_row_and_not_before():
    scene = Scene()
    for number in range(6):
        assert scene.reset.resets_LE.sum() == 0
        scene.step(number, IDLE)
    assert scene.reset.resets_LE.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    for number in range(6, 11):
        scene.step(number, IDLE)
    assert scene.reset.resets_LE.sum() == 1  # counted from nothing again
    scene.step(11, IDLE)
    assert scene.reset.resets_LE.sum() == 2


def test_one_busy_window_between_starts_the_count_again():
    scene = Scene()
    for number in range(12):
        scene.step(number, [HEALTHY, HEALTHY] if 3 <= number < 6 else IDLE)
    assert scene.reset.resets_LE.sum() == 1


def test_the_share_is_that_of_the_whole_window():
    scene = Scene(replace(RESET, patience=1))
    for number in range(3):  # 15 of 300 tokens are exactly the least share
        scene.step(number, [[30, 15 if number == 1 else 0, 30, 30], HEALTHY])
    assert scene.reset.resets_LE.sum() == 0
    for number in range(3, 6):
        scene.step(number, [[30, 14 if number == 4 else 0, 30, 30], HEALTHY])
    assert scene.reset.resets_LE.sum() == 1


def test_no_more_than_the_most_are_reborn_at_once_and_none_late_in_the_run():
    scene = Scene(replace(RESET, patience=1))
    for number in range(3):
        scene.step(number, [[0] * E, HEALTHY])
    assert scene.reset.resets_LE.tolist() == [[1, 1, 0, 0], [0] * E]
    scene.share = 0.71
    for number in range(3, 12):
        scene.step(number, [[0] * E, HEALTHY])
    assert scene.reset.resets_LE.sum() == 2


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_rebirth_changes_the_experts_own_slices_and_moments_and_nothing_else(matrices):
    scene = Scene(matrices=matrices)
    before = scene.state()
    for number in range(6):
        scene.step(number, IDLE)
    after = scene.state()
    own = "blocks.0.ffn."
    for name, value in after.items():
        old, count = before[name], value.shape[0] if value.dim() else 0
        rows = [r for r in range(count) if (value[r] != old[r]).any()]
        if name.startswith(own) and not name.endswith(":step"):
            assert rows == [1], name
        else:
            assert torch.equal(value, before[name]), name
        if name.startswith(own) and any(k in name for k in (":exp_avg", ":momentum_buffer")):
            assert value[1].abs().max() == 0
        if name.endswith(":ema") and name.startswith(own):
            assert torch.equal(value[1], after[name.removesuffix(":ema")][1])
    assert after[f"{own}experts.down"][1].abs().max() == 0
    gate_up = after[f"{own}experts.gate_up"][1]
    assert float(gate_up.std()) == pytest.approx(WIDTH**-0.5, rel=0.2)


def test_a_reborn_expert_fires_for_its_share_of_the_sampled_tokens():
    scene = Scene()
    for number in range(6):
        scene.step(number, IDLE)
    sample_SC = torch.randn(2, 64, WIDTH, generator=torch.Generator().manual_seed(5))[0]
    runs_SE = scene.model.expert_layers[0].gate(sample_SC).runs_NE
    assert int(runs_SE[:, 1].sum()) == 64 // E
    prototype_C = scene.model.expert_layers[0].gate.prototypes[1]
    cos_S = unit(sample_SC) @ unit(prototype_C.detach().unsqueeze(0))[0]
    assert float(cos_S.max()) == pytest.approx(1, abs=1e-5)  # it is one of the tokens
    assert float(prototype_C.detach().square().mean()) == pytest.approx(1, rel=1e-4)


def test_young_experts_learn_more_slowly_until_they_are_grown():
    scene = Scene()
    for number in range(6):
        scene.step(number, IDLE)
    layer = scene.model.expert_layers[0]
    scales = []
    for number in range(6, 12):
        scene.reset.begin_step(scene.optimizer)
        found = scene.optimizer.row_scale
        assert set(found) in (set(), set(layer.parameters()))
        scales.append(float(found[layer.experts.down][1]) if found else 1.0)
        assert all(float(s[0]) == 1.0 for s in found.values())
        scene.step(number, [HEALTHY, HEALTHY])
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_what_was_saved_goes_on_bit_for_bit_in_the_middle_of_a_window():
    whole, cut = Scene(), Scene()
    for number in range(4):
        whole.step(number, IDLE)
        cut.step(number, IDLE)
    saved = cut.reset.snapshot()
    gone_on = Scene(restored=saved)
    for number in range(4, 6):
        for name, value in whole.reset.snapshot().items():
            assert torch.equal(value, gone_on.reset.snapshot()[name]), name
        assert whole.reset.snapshot()["_active_LE"].sum() > 0  # in the middle of a window
        whole.step(number, IDLE)
        gone_on.step(number, IDLE)
    assert whole.reset.resets_LE.sum() == 1
    for a, b in zip(whole.state().values(), gone_on.state().values(), strict=True):
        assert torch.equal(a, b)
    for name, value in whole.reset.snapshot().items():
        assert torch.equal(value, gone_on.reset.snapshot()[name])


def test_the_metrics_name_the_layers():
    scene = Scene(replace(RESET, patience=1))
    for number in range(3):
        scene.step(number, IDLE)
    assert scene.reset.metrics() == {"moe/resets_0": 1.0, "moe/resets_1": 0.0}


# Prototypes and thresholds.


def test_prototypes_come_from_badly_served_tokens_the_farthest_first():
    """Against a search over all tokens, one choice at a time."""
    generator = torch.Generator().manual_seed(2)
    unit_SC = unit(torch.randn(80, 6, generator=generator))
    prototypes_EC = unit(torch.randn(5, 6, generator=generator))
    thresholds_E = torch.full((5,), 0.1)
    found_RC = choose_prototypes(unit_SC, prototypes_EC, thresholds_E, [1, 4])
    living = [0, 2, 3]
    cos = unit_SC @ prototypes_EC[living].T
    served = [int((c > 0.1).sum()) for c in cos]
    pool = [s for s in range(80) if served[s] <= sorted(served)[19]]
    assert 20 <= len(pool) < 80
    taken = list(prototypes_EC[living])
    for got in found_RC:
        nearest = {s: max(float(unit_SC[s] @ p) for p in taken) for s in pool}
        best = min(nearest, key=nearest.__getitem__)
        assert torch.equal(got, unit_SC[best])
        taken.append(got)


def test_no_token_apart_from_the_prototypes_means_no_rebirth():
    prototypes_EC = torch.eye(3, 4)
    thresholds_E = torch.full((3,), 0.5)
    same_SC = torch.eye(3, 4)[[0, 1, 0, 1, 1, 0, 0, 1]]
    assert len(choose_prototypes(same_SC, prototypes_EC, thresholds_E, [2])) == 0
    one_SC = torch.cat([same_SC, torch.eye(4)[3:]])
    assert choose_prototypes(one_SC, prototypes_EC, thresholds_E, [1, 2]).shape == (2, 4)
    assert choose_prototypes(one_SC[-1:], prototypes_EC, thresholds_E, [1, 2]).shape == (1, 4)
    assert choose_prototypes(one_SC[:0], prototypes_EC, thresholds_E, [2]).shape == (0, 4)
    everyone = choose_prototypes(one_SC, prototypes_EC, thresholds_E, [0, 1, 2])
    assert len(everyone) == 3


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_a_threshold_lets_at_least_its_share_pass(share):
    cos_S = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    passed = int((cos_S > threshold_for(cos_S, share)).sum())
    assert passed == max(1, round(40 * share))


def test_a_threshold_among_equal_cosines_lets_all_of_them_pass():
    cos_S = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    threshold = threshold_for(cos_S, 0.4)
    assert (cos_S > threshold).tolist() == [True, True, True, True, False]
    assert (torch.full((5,), 0.7) > threshold_for(torch.full((5,), 0.7), 0.2)).all()


@pytest.mark.parametrize("k24", ["separate", "shared_k24"])
def test_a_reborn_expert_gets_a_new_mask_and_a_shared_weight_stays(k24):
    scene = Scene(k24=k24)
    experts = scene.model.expert_layers[0].experts
    for pattern in experts.patterns():
        pattern.activity.weight_A.fill_(1.0)
    before = scene.state()
    for number in range(6):
        scene.step(number, IDLE)
    after = scene.state()
    assert scene.reset.resets_LE.tolist() == [[0, 1, 0, 0], [0] * E]
    for name in ("gate_up", "down"):
        weight, mask = f"blocks.0.ffn.experts.{name}", f"blocks.0.ffn.experts.{name}_pattern.alpha"
        changed = [r for r in range(E) if (after[mask][r] != before[mask][r]).any()]
        assert changed == [1] and after[f"{mask}:exp_avg"][1].abs().max() == 0
        assert torch.equal(after[f"{mask}:ema"][1], after[mask][1])
        assert torch.equal(after[weight], before[weight]) == (k24 == "shared_k24")
    for pattern in experts.patterns():
        assert pattern.activity.weight_A.tolist() == [1, 0, 1, 1]
    scene.reset.begin_step(scene.optimizer)
    scaled = {id(p) for p in scene.optimizer.row_scale}
    assert (id(experts.gate_up) in scaled) == (k24 == "separate")
    assert id(experts.gate_up_pattern.alpha) in scaled
