"""The range of every number among the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tiny_onn.config.schema import (
    BudgetConfig,
    DeepEmbedConfig,
    EaviConfig,
    ModelConfig,
    MoeConfig,
    NsaConfig,
    OptimConfig,
    ResetConfig,
)
from tiny_onn.config.schema_24 import ActSparse24Config, K24Config
from tiny_onn.errors import UserError

_AT_LEAST_1, _AT_LEAST_0 = (1, math.inf, "at least 1"), (0, math.inf, "at least 0")
_ABOVE_0 = (math.ulp(0.0), math.inf, "above 0")
_SHARE = (0, 1, "from 0 to 1")
_SEED = (0, 2**32 - 1, "from 0 to 4294967295")
_BELOW_1 = (0, math.nextafter(1.0, 0.0), "at least 0 and below 1")

RANGES: dict[str, tuple[float, float, str]] = {
    "data.views_per_example": _AT_LEAST_1,
    "data.batch_tokens": _AT_LEAST_1,
    "data.max_tokens": (6, math.inf, "at least 6 (two grids of one cell)"),
    "data.workers": _AT_LEAST_0,
    "model.width": _AT_LEAST_1,
    "model.layers": _AT_LEAST_1,
    "model.loops": _AT_LEAST_1,
    "model.heads": _AT_LEAST_1,
    "model.kv_heads": _AT_LEAST_1,
    "model.head_width": (8, math.inf, "at least 8, even"),
    "model.ffn_width": _AT_LEAST_1,
    "model.rope_base": (1, math.inf, "at least 1"),
    "model.dropout": _BELOW_1,
    "moe.experts": _AT_LEAST_1,
    "moe.expert_width": _AT_LEAST_1,
    "moe.every": _AT_LEAST_1,
    "moe.target_active": _ABOVE_0,
    "moe.sparsity_weight": _AT_LEAST_0,
    "moe.diversity_weight": _AT_LEAST_0,
    "reset.window_steps": _AT_LEAST_0,
    "reset.min_share": _SHARE,
    "reset.patience": _AT_LEAST_1,
    "reset.max_experts": _AT_LEAST_1,
    "reset.warmup_steps": _AT_LEAST_0,
    "reset.until_share": _SHARE,
    "k24.kappa_start": _ABOVE_0,
    "k24.kappa_end": _ABOVE_0,
    "k24.tau_start": _ABOVE_0,
    "k24.tau_middle": _ABOVE_0,
    "k24.tau_end": _ABOVE_0,
    "k24.phase_split": (math.ulp(0.0), math.nextafter(1.0, 0.0), "between 0 and 1"),
    "k24.schedule_steps": _AT_LEAST_0,
    "k24.momentum": _BELOW_1,
    "k24.alpha_init_std": _AT_LEAST_0,
    "k24.alpha_rank": _AT_LEAST_0,
    "k24.div_coef": _AT_LEAST_0,
    "k24.reset_interval": _AT_LEAST_0,
    "k24.reset_ratio": (math.ulp(0.0), 1.0, "above 0 and at most 1"),
    "k24.reset_kl": _AT_LEAST_0,
    "k24.revive_window": _AT_LEAST_0,
    "k24.revive_share": _SHARE,
    "k24.until_share": _SHARE,
    "model.deep_embed.ngram": (2, 4, "from 2 to 4 (for 1, give keys=[token])"),
    "model.deep_embed.rank": _AT_LEAST_0,
    "model.deep_embed.task_rank": _AT_LEAST_1,
    "model.deep_embed.mix_rank": _AT_LEAST_1,
    "model.act24.activation_dense_warmup_steps": _AT_LEAST_0,
    "model.act24.split_ratio": _SHARE,
    "model.act24.permute_seed": _SEED,
    "nsa.block": _AT_LEAST_1,
    "nsa.stride": _AT_LEAST_1,
    "nsa.select_block": _AT_LEAST_1,
    "nsa.select_count": _AT_LEAST_1,
    "nsa.window": _AT_LEAST_1,
    "nsa.every": _AT_LEAST_1,
    "optim.muon_lr": _ABOVE_0,
    "optim.adamw_lr": _ABOVE_0,
    "optim.table_lr": _ABOVE_0,
    "optim.pattern_lr": _ABOVE_0,
    "optim.muon_weight_decay": _AT_LEAST_0,
    "optim.adamw_weight_decay": _AT_LEAST_0,
    "optim.table_weight_decay": _AT_LEAST_0,
    "optim.deep_embed_lr": _ABOVE_0,
    "optim.deep_embed_weight_decay": _AT_LEAST_0,
    "optim.warmup_share": _SHARE,
    "optim.decay_share": _SHARE,
    "optim.final_lr_share": _SHARE,
    "optim.clip_norm": _AT_LEAST_0,
    "optim.ema_decay": _BELOW_1,
    "eavi.single_share": _SHARE,
    "eavi.temperature": _AT_LEAST_0,
    "eavi.excursions_per_document": _AT_LEAST_1,
    "eavi.share_start": _SHARE,
    "eavi.share_end": _SHARE,
    "eavi.excursion_weight": _AT_LEAST_0,
    "eavi.truth_weight": _AT_LEAST_0,
    "eavi.divergence_weight": _AT_LEAST_0,
    "budget.minutes": _ABOVE_0,
    "budget.epochs": _ABOVE_0,
    "budget.steps": _AT_LEAST_1,
    "trainer.devices": _AT_LEAST_1,
    "trainer.nodes": _AT_LEAST_1,
    "trainer.threads": _AT_LEAST_0,
    "trainer.log_every_steps": _AT_LEAST_1,
    "trainer.checkpoint_minutes": _ABOVE_0,
    "trainer.checkpoint_steps": _AT_LEAST_0,
    "trainer.holdout_share": _SHARE,
    "trainer.holdout_decode": _AT_LEAST_0,
    "seed": _SEED,
    "threads": _AT_LEAST_0,
    "examples": _AT_LEAST_1,
    "predict.views": _AT_LEAST_1,
    "predict.minutes": _ABOVE_0,
    "predict.score_views": _AT_LEAST_1,
    "predict.batch_tokens": _AT_LEAST_1,
}


def check_ranges(values: Mapping[str, Any]) -> None:
    """Every number of a flat {key: value} in its range; null is left to the other checks.

    Raises:
        UserError: a number out of range, infinite or not a number.
    """
    for name, (low, high, words) in RANGES.items():
        value = values.get(name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"got {name}={value}; expected a number {words}; change it")


def check_group(
    group: str,
    settings: ActSparse24Config
    | BudgetConfig
    | DeepEmbedConfig
    | EaviConfig
    | K24Config
    | ModelConfig
    | MoeConfig
    | NsaConfig
    | OptimConfig
    | ResetConfig,
) -> None:
    """:func:`check_ranges` of one group's settings, such as ``moe``."""
    check_ranges({f"{group}.{name}": value for name, value in asdict(settings).items()})
