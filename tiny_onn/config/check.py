"""Checks that a type cannot express: ranges, and settings that must fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tiny_onn.config.schema import (
    BudgetConfig,
    Config,
    InspectConfig,
    ModelConfig,
    OptimConfig,
    SubmitConfig,
)
from tiny_onn.errors import UserError

VOCAB_SIZE = 14

EXCLUSIVE = {
    "budget": ("minutes", "epochs", "steps"),
    "predict": ("views", "minutes"),
}
"""Group -> keys of which a later layer's choice replaces an earlier layer's."""

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
    "optim.muon_lr": _ABOVE_0,
    "optim.adamw_lr": _ABOVE_0,
    "optim.table_lr": _ABOVE_0,
    "optim.muon_weight_decay": _AT_LEAST_0,
    "optim.adamw_weight_decay": _AT_LEAST_0,
    "optim.table_weight_decay": _AT_LEAST_0,
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


def _check_group(group: str, settings: BudgetConfig | ModelConfig | OptimConfig) -> None:
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
    check_budget(config.budget)
    check_schedule(config.optim)
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
