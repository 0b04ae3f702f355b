"""A layer of settings: what one file or the command line sets, under full names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tiny_onn.config.check import EXCLUSIVE
from tiny_onn.config.keys import Key, suggestion
from tiny_onn.errors import UserError


@dataclass(frozen=True)
class Layer:
    """Settings of one origin: flat {full key: value} and the words that name the origin."""

    values: dict[str, Any]
    origin: str


def flatten(
    values: Mapping[str, Any], keys: Mapping[str, Key], origin: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(full key, value) of a nested mapping; dotted names are allowed.

    Raises:
        UserError: a name that is no key, or a group given a value.
    """
    for part, value in values.items():
        name = f"{prefix}{part}"
        inside = [key for key in keys if key.startswith(f"{name}.")]
        if name in keys:
            yield name, value
        elif inside and isinstance(value, Mapping):
            yield from flatten(value, keys, origin, f"{name}.")
        elif inside:
            raise UserError(
                f"got {name}={value}{in_origin(origin)}; expected a key of the group {name}, "
                f"such as {inside[0]}=...; see --help"
            )
        else:
            raise UserError(
                f"unknown key '{name}'{in_origin(origin)}; "
                + suggestion(name, keys, "see --help for every key")
            )


def displaced(values: Mapping[str, Any]) -> dict[str, None]:
    """Null for the alternatives of what a layer chooses: its minutes replace earlier epochs."""
    nulls: dict[str, None] = {}
    for group, names in EXCLUSIVE.items():
        full = [f"{group}.{name}" for name in names]
        if any(values.get(name) is not None for name in full):
            nulls |= dict.fromkeys(full)
    return nulls


def in_origin(origin: str) -> str:
    """Words for an error text; empty for what was typed."""
    return f" in {origin}" if origin else ""
