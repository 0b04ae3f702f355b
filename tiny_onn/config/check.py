"""Checks that a type cannot express: ranges, and settings that must fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tiny_onn.config.schema import (
    BudgetConfig,
    Config,
    DeepEmbedConfig,
    InspectConfig,
    ModelConfig,
    MoeConfig,
    NsaConfig,
    OptimConfig,
    ResetConfig,
    SubmitConfig,
)
from tiny_onn.errors import UserError

VOCAB_SIZE = 14

NUM_FORCED_BLOCKS = 3
"""Blocks that NSA always reads: the document's first, the token's own, the one before it."""

EXCLUSIVE = {
    "budget": ("minutes", "epochs", "steps"),
    "predict": ("views", "minutes"),
}
"""Group -> keys of which a later layer's choice replaces an earlier layer's."""

DEEP_EMBED_KEYS = ("token", "ngram", "patch", "task")
"""What may stand in model.deep_embed.keys; all but task can live in files."""

_AT_LEAST_1, _AT_LEAST_0 = (1, math.inf, "at least 1"), (0, math.inf, "at least 0")
_ABOVE_0 = (math.ulp(0.0), math.inf, "above 0")
_SHARE = (0, 1, "from 0 to 1")
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
    "model.deep_embed.ngram": (2, 4, "from 2 to 4 (for 1, give keys=[token])"),
    "model.deep_embed.rank": _AT_LEAST_0,
    "model.deep_embed.task_rank": _AT_LEAST_1,
    "model.deep_embed.mix_rank": _AT_LEAST_1,
    "nsa.block": _AT_LEAST_1,
    "nsa.stride": _AT_LEAST_1,
    "nsa.select_block": _AT_LEAST_1,
    "nsa.select_count": _AT_LEAST_1,
    "nsa.window": _AT_LEAST_1,
    "optim.muon_lr": _ABOVE_0,
    "optim.adamw_lr": _ABOVE_0,
    "optim.table_lr": _ABOVE_0,
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
    "seed": (0, 2**32 - 1, "from 0 to 4294967295"),
    "threads": _AT_LEAST_0,
    "examples": _AT_LEAST_1,
    "predict.views": _AT_LEAST_1,
    "predict.minutes": _ABOVE_0,
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


def _check_group(
    group: str,
    settings: BudgetConfig
    | DeepEmbedConfig
    | ModelConfig
    | MoeConfig
    | NsaConfig
    | OptimConfig
    | ResetConfig,
) -> None:
    check_ranges({f"{group}.{name}": value for name, value in asdict(settings).items()})


def check_model(model: ModelConfig) -> None:
    """Numbers in their ranges; widths and heads that fit together.

    Raises:
        UserError: a number out of range, heads that cannot be shared out, an odd head, another
            vocabulary.
    """
    _check_group("model", model)
    if model.heads % model.kv_heads:
        raise UserError(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; expected "
            "heads to be a multiple of kv_heads; change one of them"
        )
    if model.head_width % 2:
        raise UserError(
            f"got model.head_width={model.head_width}; expected an even number, at least 8; "
            f"use {model.head_width + 1}"
        )
    if model.vocab_size != VOCAB_SIZE:
        raise UserError(
            f"got model.vocab_size={model.vocab_size}; expected {VOCAB_SIZE} (ten colours, start, "
            "newline, separator, end); leave it out"
        )
    check_deep_embed(model)


def check_deep_embed(model: ModelConfig) -> None:
    """Keys that exist, and a store, form and ranks that fit them.

    Raises:
        UserError: an unknown or repeated key, files with nothing to hold, a patch that would see
            later cells, a rank that is none.
    """
    config = model.deep_embed
    _check_group("model.deep_embed", config)
    written = f"[{','.join(map(str, config.keys))}]"
    for name in config.keys:
        if name not in DEEP_EMBED_KEYS or config.keys.count(name) > 1:
            raise UserError(
                f"got model.deep_embed.keys={written}; expected different ones of "
                f"{', '.join(DEEP_EMBED_KEYS)}; mend {name}"
            )
    filed = [name for name in config.keys if name != "task"]
    if config.store == "memmap" and not filed:
        raise UserError(
            f"got model.deep_embed.store=memmap with keys={written}; expected token, ngram or "
            "patch among them (task rows stay in memory); use store=dense"
        )
    if "patch" in config.keys and config.patch == "prefix" and model.mask != "prefix":
        raise UserError(
            f"got model.deep_embed.patch=prefix with model.mask={model.mask}, under which a cell "
            "may not look at later ones; expected patch=causal; give that, or model.mask=prefix"
        )
    width = deep_embed_width(model)
    for name, rank in (("rank", config.rank), ("task_rank", config.task_rank)):
        used = bool(filed) if name == "rank" else "task" in config.keys
        if used and rank > width:
            raise UserError(
                f"got model.deep_embed.{name}={rank}; expected at most {width}, the width of a "
                f"row in form {config.form}; lower it"
            )


def deep_embed_width(model: ModelConfig) -> int:
    """Numbers that a row of a DeepEmbed table stands for, in every layer."""
    if model.deep_embed.form == "v7a":
        return model.deep_embed.mix_rank**2
    return model.width if model.deep_embed.form == "1x" else model.ffn_width


def _check_row_files(config: Config) -> None:
    """What training refuses with DeepEmbed tables on disk."""
    if config.model.deep_embed.store != "memmap":
        return
    processes = config.trainer.devices * config.trainer.nodes
    if processes > 1:
        raise UserError(
            f"got model.deep_embed.store=memmap with trainer.devices={config.trainer.devices} and "
            f"trainer.nodes={config.trainer.nodes}; expected one process, which alone writes the "
            "files; use store=dense or one device"
        )
    if config.optim.ema_decay > 0:
        raise UserError(
            f"got model.deep_embed.store=memmap with optim.ema_decay={config.optim.ema_decay}; "
            "expected 0, for rows on disk are not averaged; give optim.ema_decay=0 or store=dense"
        )


def check_moe(moe: MoeConfig, model: ModelConfig) -> None:
    """Numbers in their ranges, and experts that fit each other and the model.

    Raises:
        UserError: a number out of range, more active experts than there are, no block with
            experts, a fallback that could do nothing.
    """
    _check_group("moe", moe)
    if moe.target_active > moe.experts:
        raise UserError(
            f"got moe.target_active={moe.target_active} with moe.experts={moe.experts}; expected "
            f"at most the number of experts; lower it, or give moe.experts="
            f"{math.ceil(moe.target_active)}"
        )
    if model.ffn == "dynmoe" and moe.every > model.layers:
        raise UserError(
            f"got moe.every={moe.every} with model.layers={model.layers}; expected at most the "
            "number of layers; use moe.every=1 for experts in all of them"
        )
    deep = model.deep_embed
    if model.ffn == "dynmoe" and deep.keys and deep.form != "1x":
        raise UserError(
            f"got model.deep_embed.form={deep.form} with model.ffn=dynmoe, whose experts have no "
            "hidden layer in common; expected model.deep_embed.form=1x; use it, or model.ffn=dense"
        )
    if moe.combine == "gated" and moe.none_active == "top1":
        raise UserError(
            "got moe.none_active=top1 with moe.combine=gated, which weights an expert below its "
            "threshold with 0; expected moe.none_active=skip; use it, or moe.combine=mean"
        )


def check_reset(reset: ResetConfig, moe: MoeConfig) -> None:
    """Numbers in their ranges, and an idle share that a healthy expert is well above.

    Raises:
        UserError: a number out of range, or experts at their target share that count as idle.
    """
    _check_group("reset", reset)
    fair = moe.target_active / moe.experts
    if reset.window_steps and reset.min_share >= fair:
        raise UserError(
            f"got reset.min_share={reset.min_share}; expected less than moe.target_active / "
            f"moe.experts = {fair:.3g}, or healthy experts are reborn; use {fair / 20:.2g}"
        )


def check_nsa(nsa: NsaConfig) -> None:
    """Numbers in their ranges; blocks that fit the stride, and room for the forced ones.

    Raises:
        UserError: a number out of range, a stride that does not divide a block, too few blocks.
    """
    _check_group("nsa", nsa)
    for name in ("block", "select_block"):
        length = getattr(nsa, name)
        if length % nsa.stride:
            fitting = -(-length // nsa.stride) * nsa.stride
            raise UserError(
                f"got nsa.{name}={length} with nsa.stride={nsa.stride}; expected a multiple of the "
                f"stride; use nsa.{name}={fitting}, or another stride"
            )
    if nsa.select_count < NUM_FORCED_BLOCKS:
        raise UserError(
            f"got nsa.select_count={nsa.select_count}; expected at least {NUM_FORCED_BLOCKS} (the "
            "document's first block, the token's own and the one before it are always read); use "
            f"nsa.select_count={NUM_FORCED_BLOCKS} or more"
        )


def check_budget(budget: BudgetConfig) -> None:
    """Exactly one budget, in its range.

    Raises:
        UserError: none, several, zero, negative or infinite.
    """
    names = EXCLUSIVE["budget"]
    given = {n: getattr(budget, n) for n in names if getattr(budget, n) is not None}
    if len(given) != 1:
        got = " and ".join(f"budget.{n}={v}" for n, v in given.items()) or "no budget"
        raise UserError(
            f"got {got}; expected exactly one of budget.minutes, budget.epochs, budget.steps; "
            "give one, such as budget.minutes=30"
        )
    _check_group("budget", budget)


def check_schedule(optim: OptimConfig) -> None:
    """Numbers in their ranges; warm-up and decay shares that fit into one run.

    Raises:
        UserError: a number out of range, or shares that overlap.
    """
    _check_group("optim", optim)
    if optim.warmup_share + optim.decay_share > 1:
        raise UserError(
            f"got optim.warmup_share={optim.warmup_share} and optim.decay_share="
            f"{optim.decay_share}; expected at most 1 together; lower one of them"
        )


def check_train(config: Config) -> None:
    """What training needs of a configuration, loaded or made in Python.

    Ranges of the other groups are held on loading.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_model(config.model)
    check_moe(config.moe, config.model)
    check_reset(config.reset, config.moe)
    check_nsa(config.nsa)
    check_budget(config.budget)
    check_schedule(config.optim)
    _check_row_files(config)
    if not config.data.sources and not config.data.extra_dirs:
        raise UserError(
            "got data.sources=[] and data.extra_dirs=[]; expected at least one of them to name "
            "tasks; give one, such as data.sources=[arc1]"
        )
    if config.data.loss_on_inputs and config.model.mask != "causal":
        raise UserError(
            f"got data.loss_on_inputs=true and model.mask={config.model.mask}, under which an "
            "input token sees its own target; expected a causal mask; give model.mask=causal"
        )
    check_text("out", config.out, "a folder, such as out=runs/x")


def check_submit(config: SubmitConfig) -> None:
    """Everything ``submit.py`` needs beyond types and ranges.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_text("checkpoint", config.checkpoint, "a run folder, such as checkpoint=runs/x")
    check_text("challenges", config.challenges, "a file, or arc1:evaluation")
    check_text("out", config.out, "a folder, such as out=runs/x/submission")
    if config.predict.views is None and config.predict.minutes is None:
        raise UserError(
            "got predict.views=null and predict.minutes=null; expected one of them; "
            "give one, such as predict.views=16"
        )


def check_inspect(config: InspectConfig) -> None:
    """What ``python -m tiny_onn.inspect`` needs beyond types and ranges.

    Raises:
        UserError: no checkpoint or folder.
    """
    check_text("checkpoint", config.checkpoint, "a run folder, such as checkpoint=runs/x")
    check_text("out", config.out, "a folder, such as out=runs/x/figures")


def check_text(name: str, value: str, expected: str) -> None:
    """Raises UserError if ``value`` is blank."""
    if not value.strip():
        raise UserError(f"got {name}= (empty); expected {expected}; name it")
