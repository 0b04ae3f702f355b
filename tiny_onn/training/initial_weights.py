"""Weights to begin with, out of another run's checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from tiny_onn.config.schema import Config
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import WEIGHTS, checkpoint_folder, load_model
from tiny_onn.model.tiny_onn import TinyONN
from tiny_onn.training.run_folder import flatten

TASK_TABLES = ("embedding.task.weight", "deep_embed.tables.task.rows.weight")
"""A row a task, of the tasks of the run."""

K24_ARCHITECTURE = ("logits", "alpha_rank", "act_stat")
"""Settings of 2:4 masks that their parameters' meaning depends on."""
ACT24 = "model.act24."

TRAINING_ONLY = frozenset(
    {
        "model.dropout",
        "model.deep_embed.dtype",
        "moe.target_active",
        "moe.sparsity_weight",
        "moe.diversity_weight",
        *(f"k24.{f.name}" for f in fields(K24Config) if f.name not in K24_ARCHITECTURE),
    }
)
"""Settings that the weights' meaning does not depend on."""


def begin_with(model: TinyONN, config: Config, task_ids: Sequence[str]) -> dict[str, Any]:
    """Load the weights of ``config.init_from`` into ``model``; returns that run's provenance.

    Rows of tasks go by task id; a task that the checkpoint does not know keeps its fresh row.

    Raises:
        UserError: no checkpoint, one never trained, of another vocabulary or architecture, one
            that learnt what is held out here, or that knows none of the tasks.
    """
    assert config.init_from is not None
    loaded = load_model(config.init_from)
    if loaded.model.packed is not None:
        raise UserError(
            f"got init_from={config.init_from}, a packed checkpoint, which has no masks to learn; "
            "expected a trained one; give the run that it was packed from, or unpack it "
            "(python -m tiny_onn.convert unpack=true)"
        )
    if not loaded.provenance.get("trained") or not loaded.provenance.get("steps"):
        raise UserError(
            f"got init_from={config.init_from}, whose checkpoint was never trained; expected a "
            "trained one; run python train.py stage=pretrain first"
        )
    if loaded.config.model.deep_embed.store == "memmap":
        raise UserError(
            f"got init_from={config.init_from}, trained with model.deep_embed.store=memmap; "
            "expected tables in memory, for those on disk are not taken over; choose a run "
            "trained with model.deep_embed.store=dense"
        )
    _require_same_network(config, loaded.config)
    _require_settled_masks(config, loaded.config)
    _require_same_data(config, loaded.config)
    known = {task_id: row for row, task_id in enumerate(loaded.task_ids)}
    rows = [known.get(task_id, -1) for task_id in task_ids]
    if max(rows) < 0:
        raise UserError(
            f"got init_from={config.init_from}, which knows none of this run's {len(task_ids)} "
            "tasks; expected one trained on them; give the same data.* settings"
        )
    state, own = loaded.model.state_dict(), model.state_dict()
    for name in TASK_TABLES:
        if name in own:
            state[name] = _rows_by_task(own[name], state[name], rows)
    model.load_state_dict(state)
    return loaded.provenance | {
        "new_tasks": rows.count(-1),
        "weights_sha256": weights_sha256(config.init_from),
    }


def weights_sha256(run: str) -> str:
    """Of the weights in the checkpoint of ``run``.

    Raises:
        UserError: it has none.
    """
    digest = hashlib.sha256()
    with open(checkpoint_folder(run) / WEIGHTS, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def require_same_beginning(config: Config, began_with: str) -> None:
    """A run is gone on with, or kept, only if it began with what ``config.init_from`` holds now.

    Nothing is asked of an init_from that holds no trained model any more: its weights are not
    needed again.

    Args:
        began_with: :func:`weights_sha256` at the run's beginning.

    Raises:
        UserError: ``init_from`` was trained anew since.
    """
    assert config.init_from is not None
    try:
        now = weights_sha256(config.init_from)
    except UserError:
        return
    if now != began_with:
        raise UserError(
            f"run folder '{config.out}' began with other weights of init_from={config.init_from} "
            f"(sha256 {began_with[:12]}, now {now[:12]}); expected the same; choose another out, "
            "or resume=false to start over"
        )


def _rows_by_task(own: Tensor, theirs: Tensor, rows: Sequence[int]) -> Tensor:
    row_T = torch.tensor(rows)
    table = own.clone()
    table[: len(rows)][row_T >= 0] = theirs[row_T[row_T >= 0]]
    return table


def _require_settled_masks(config: Config, theirs: Config) -> None:
    """Raises UserError where stage eavi would draw masks more wildly than they ended."""
    ended = theirs.k24.kappa_end
    if config.stage == "eavi" and config.model.weights == "k24" and config.k24.kappa_start < ended:
        raise UserError(
            f"got k24.kappa_start={config.k24.kappa_start} with init_from={config.init_from}, "
            f"whose masks settled at k24.kappa_end={ended}; expected at least that, or they are "
            f"drawn wildly again; give k24.kappa_start={ended} k24.kappa_end={ended}"
        )


def _require_same_network(config: Config, theirs: Config) -> None:
    """Raises UserError at the first setting of the network that differs."""
    here, there = _network(config), _network(theirs)
    differing = [key for key in here if key not in TRAINING_ONLY and here[key] != there.get(key)]
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
        remedy = f"give {name}={_written(there.get(name))}"
        if theirs.network != config.network:
            remedy = f"give network={theirs.network}"
        elif theirs.preset != config.preset:
            remedy = f"give preset={theirs.preset}"
        raise UserError(
            f"got init_from={config.init_from}, of another network: {name}="
            f"{_written(there.get(name))}; expected {_written(here[name])}{more}; "
            f"{remedy}, or choose another run"
        )


def _require_same_data(config: Config, theirs: Config) -> None:
    """Raises UserError where a hold-out would measure what was learnt, or documents differ."""
    here, there = config.data, theirs.data
    if here.holdout not in ("none", there.holdout):
        raise UserError(
            f"got data.holdout={here.holdout} with init_from={config.init_from}, which was trained "
            f"with data.holdout={there.holdout} and has learnt those pairs; expected a run that "
            f"held them out too; train it with data.holdout={here.holdout}, or give "
            f"data.holdout={there.holdout}"
        )
    if here.context != there.context:
        raise UserError(
            f"got data.context={here.context} with init_from={config.init_from}, which was trained "
            f"with data.context={there.context}; expected the same documents; give "
            f"data.context={there.context}"
        )


def _network(config: Config) -> dict[str, Any]:
    """Flat settings of the network, those of its parts only where they are read."""
    flat = flatten({"model": asdict(config.model)})
    # How activations are made sparse changes what weights mean no more than a dropout does, but
    # for the method, which evaluation follows.
    read = f"{ACT24}activation_sparse_method" if config.model.ffn == "relu2_act24" else None
    flat = {k: v for k, v in flat.items() if not k.startswith(ACT24) or k == read}
    deep_embed = config.model.deep_embed
    if not deep_embed.keys:
        flat = {k: v for k, v in flat.items() if not k.startswith("model.deep_embed.")}
        flat["model.deep_embed.keys"] = []
    for name, read in (
        ("task_rank", "task" in deep_embed.keys),
        ("ngram", "ngram" in deep_embed.keys),
        ("patch", "patch" in deep_embed.keys),
        ("mix_rank", deep_embed.form == "v7a"),
    ):
        if not read:
            flat.pop(f"model.deep_embed.{name}", None)
    if config.model.attention == "nsa":
        flat |= flatten({"nsa": asdict(config.nsa)})
    if config.model.ffn == "dynmoe":
        flat |= flatten({"moe": asdict(config.moe)})
    if config.model.weights == "k24":
        flat |= flatten({"k24": asdict(config.k24)})
    return flat


def _written(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
