"""A setting: a dataclass field with its meaning."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(default: Any, help: str) -> Any:
    """A config field with its one-line meaning."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
