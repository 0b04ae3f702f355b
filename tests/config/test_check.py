"""Checks of settings made in Python, which no loading has looked at."""

import pytest

from tiny_onn.config.check import check_budget, check_schedule
from tiny_onn.config.check_network import check_k24, check_moe, check_nsa, check_reset
from tiny_onn.config.load import load_config
from tiny_onn.config.schema import (
    BudgetConfig,
    ModelConfig,
    MoeConfig,
    NsaConfig,
    OptimConfig,
    ResetConfig,
)
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.errors import UserError


@pytest.mark.parametrize(
    "given",
    [{}, {"minutes": 0}, {"epochs": -1}, {"steps": 0}, {"minutes": 1, "steps": 2},
     {"minutes": float("nan")}, {"minutes": float("inf")}],
)  # fmt: skip
def test_anything_but_one_positive_budget_is_refused(given):
    with pytest.raises(UserError, match="budget"):
        check_budget(BudgetConfig(**given))


@pytest.mark.parametrize("given", [{"minutes": 0.5}, {"epochs": 0.25}, {"steps": 1}])
def test_one_positive_budget_is_accepted(given):
    check_budget(BudgetConfig(**given))


@pytest.mark.parametrize(
    "given",
    [
        {"warmup_share": 0.6, "decay_share": 0.6},
        {"decay_share": -0.1},
        {"warmup_share": 2},
    ],
)
def test_impossible_schedules_are_refused(given):
    with pytest.raises(UserError, match="optim"):
        check_schedule(OptimConfig(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": 0}, "moe.experts=0; expected a number at least 1"),
        ({"target_active": 0.0}, "moe.target_active=0.0; expected a number above 0"),
        ({"target_active": 8.5}, "target_active=8.5 with moe.experts=8; .*give moe.experts=9"),
        ({"sparsity_weight": -1.0}, "moe.sparsity_weight=-1.0"),
        ({"diversity_weight": float("nan")}, "moe.diversity_weight=nan"),
        ({"combine": "gated", "none_active": "top1"}, "none_active=top1 with moe.combine=gated"),
    ],
)
def test_impossible_experts_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        check_moe(MoeConfig(**given), ModelConfig(ffn="dynmoe"))
    assert "\n" not in str(caught.value)


def test_a_dense_model_does_not_mind_how_many_experts_would_come_how_often():
    check_moe(MoeConfig(every=9, experts=1), ModelConfig())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_share": 0.25}, "reset.min_share=0.25; expected less than .* = 0.25"),
        ({"patience": 0}, "reset.patience=0"),
        ({"window_steps": -1}, "reset.window_steps=-1"),
        ({"until_share": 1.5}, "reset.until_share=1.5"),
    ],
)
def test_impossible_resets_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        check_reset(
            ResetConfig(**given),
            MoeConfig(experts=8, target_active=2.0),
            ModelConfig(ffn="dynmoe"),
        )
    assert "\n" not in str(caught.value)


def test_resets_that_are_off_mind_no_share():
    check_reset(ResetConfig(window_steps=0, min_share=0.9), MoeConfig(), ModelConfig(ffn="dynmoe"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": 24}, "nsa.block=24 with nsa.stride=16; .*use nsa.block=32"),
        ({"select_block": 8}, "nsa.select_block=8 with nsa.stride=16"),
        ({"select_count": 2}, "nsa.select_count=2; expected at least 3"),
    ],
)
def test_impossible_blocks_are_refused_in_one_line_where_they_are_read(given, message):
    with pytest.raises(UserError, match=message) as caught:
        check_nsa(NsaConfig(**given), ModelConfig(attention="nsa"))
    assert "\n" not in str(caught.value)
    check_nsa(NsaConfig(**given), ModelConfig(attention="full"))


def test_a_dense_network_minds_ranges_alone_of_the_parts_that_it_does_not_have():
    unread = ["moe.experts=1", "moe.target_active=2", "moe.combine=gated", "moe.none_active=top1"]
    load_config(["network=dense", *unread, "nsa.stride=5", "reset.min_share=0.9"])
    for wrong in ("moe.experts=0", "nsa.stride=0", "reset.min_share=2"):
        with pytest.raises(UserError, match=wrong):
            load_config(["network=dense", wrong])
    with pytest.raises(UserError, match="moe.experts=1"):
        load_config(["network=sparse", "moe.experts=1", "moe.target_active=2"])


@pytest.mark.parametrize(
    ("given", "model", "moe", "message"),
    [
        ({}, {"width": 130}, {}, "model.width=130 .*expected a multiple of 4; use 132"),
        ({}, {"ffn_width": 50, "ffn": "dense"}, {}, "model.ffn_width=50 .*use 52"),
        ({}, {"ffn_width": 50}, {"every": 2}, "model.ffn_width=50 .*use 52"),
        ({}, {}, {"expert_width": 30}, "moe.expert_width=30 .*use 32"),
        ({}, {"weights": "dense"}, {"expert_weights": "shared_k24"}, "give model.weights=k24"),
        ({"alpha_init_std": 0.0}, {}, {"expert_weights": "shared_k24"}, "that start equal stay"),
        ({"alpha_rank": 500}, {}, {}, "alpha_rank=500; expected at most 128"),
        ({"revive_window": 5, "alpha_rank": 2}, {}, {}, "revive_window=5 with k24.alpha_rank=2"),
        ({"revive_window": 5, "logits": "free"}, {}, {}, "with k24.logits=free"),
        ({"alpha_rank": 2, "alpha_init_std": 0.0}, {}, {}, "two factors of zeros"),
        ({"logits": "free", "alpha_rank": 2}, {}, {}, "k24.alpha_rank=2 with k24.logits=free"),
        ({"logits": "free", "weight_grad": "score"}, {}, {}, "neither alphas nor a score"),
        ({"reset_ratio": 0.0}, {}, {}, "above 0 and at most 1"),
        ({"reset_kl": 0.1}, {}, {}, "reset_kl=0.1 without k24.reset_interval"),
        ({"kappa_start": 0.0}, {}, {}, "k24.kappa_start=0.0; expected a number above 0"),
        ({"tau_end": -1.0}, {}, {}, "k24.tau_end=-1.0; expected a number above 0"),
        ({"phase_split": 1.0}, {}, {}, "k24.phase_split=1.0; expected a number between 0 and 1"),
        ({"momentum": 1.0}, {}, {}, "k24.momentum=1.0; expected a number at least 0 and below 1"),
    ],
)
def test_impossible_masks_are_refused_in_one_line(given, model, moe, message):
    model = ModelConfig(**({"ffn": "dynmoe", "weights": "k24"} | model))
    with pytest.raises(UserError, match=message) as caught:
        check_k24(K24Config(**given), model, MoeConfig(**moe))
    assert "\n" not in str(caught.value)


def test_dense_weights_and_unread_widths_mind_no_groups_of_four():
    check_k24(K24Config(alpha_rank=999), ModelConfig(width=130), MoeConfig())
    masked = ModelConfig(ffn="dynmoe", weights="k24", ffn_width=50)
    check_k24(K24Config(), masked, MoeConfig())


def test_weights_and_ffn_may_be_typed_without_their_group():
    config = load_config(["network=dense", "weights=k24", "ffn=dynmoe"])
    assert (config.model.weights, config.model.ffn) == ("k24", "dynmoe")
    with pytest.raises(UserError, match="model.weights=k25; expected one of dense, k24"):
        load_config(["weights=k25"])


def test_stage_eavi_does_not_draw_settled_masks_wildly_again():
    k24 = load_config(["stage=eavi", "init_from=runs/x", "weights=k24"]).k24
    assert (k24.kappa_start, k24.tau_start) == (K24Config().kappa_end, K24Config().tau_end)
