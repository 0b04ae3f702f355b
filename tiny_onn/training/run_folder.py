"""Whose run a folder holds, and whether it is finished."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiny_onn.config.load import load_saved_config
from tiny_onn.config.schema import Config
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import PACKED

CHECKPOINT = "checkpoint"
METRICS = "metrics.json"

FREE_TO_CHANGE = frozenset(
    {
        "out",
        "resume",
        "data.workers",
        "trainer.progress",
        "trainer.tensorboard",
        "trainer.log_every_steps",
        "trainer.checkpoint_minutes",
        "trainer.checkpoint_steps",
    }
)
"""Keys that may differ when a run is gone on with: they do not change its result."""


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differing_keys(saved: dict[str, Any], config: Config) -> list[str]:
    """ "key (saved -> now)" for every setting that differs and matters."""
    before, now = flatten(saved), flatten(asdict(config))
    return [
        f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if key not in FREE_TO_CHANGE and before.get(key) != now.get(key)
    ]


def _require_same_config(folder: Path, saved: dict[str, Any], config: Config) -> None:
    if differing := differing_keys(saved, config):
        raise UserError(
            f"run folder '{folder}' belongs to another configuration: {', '.join(differing)}; "
            "expected the same settings; choose another out, or resume=false to start over"
        )


def require_same_run(folder: Path, state: dict[str, Any], config: Config, data_hash: str) -> None:
    """The resume file's entries must be of this configuration and these data.

    Raises:
        UserError: naming the differing keys.
    """
    _require_same_config(folder, state["config"], config)
    if state["data"] != data_hash:
        raise UserError(
            f"the training data of run folder '{folder}' have changed since it began (sha256 "
            f"{state['data'][:12]} -> {data_hash[:12]}); restore them, choose another out, or "
            "resume=false to start over"
        )


def refuse_packed(folder: Path) -> None:
    """Raises:
    UserError: ``folder`` holds a packed checkpoint, with which no run goes on.
    """
    if (folder / CHECKPOINT / PACKED).is_file():
        raise UserError(
            f"run folder '{folder}' holds a packed checkpoint, which has no masks to learn; "
            "expected a run to go on with or a free folder; choose another out, delete "
            f"{folder / CHECKPOINT} to go on with a run here, or resume=false to start over"
        )


def finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """Metrics of the finished run of ``config`` that ``folder`` holds; None if there is none.

    Raises:
        UserError: a finished run of another configuration.
    """
    try:
        metrics = json.loads((folder / METRICS).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not metrics.get("finished", False) or not (folder / CHECKPOINT).is_dir():
        return None
    saved = load_saved_config(folder / CHECKPOINT / "config.yaml")
    _require_same_config(folder, asdict(saved), config)
    return metrics
