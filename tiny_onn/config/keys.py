"""The schema as a flat table of dotted keys: types in words, defaults, meanings, nearest names."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One setting. ``hint`` is its type without ``None``; ``optional`` says if null is allowed."""

    name: str
    hint: Any
    optional: bool
    default: Any
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a choice, else ()."""
        return typing.get_args(self.hint) if typing.get_origin(self.hint) is Literal else ()

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is list

    @property
    def expected(self) -> str:
        """What may be written, in words: "one of all, nano", "a number or null"."""
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        elif self.is_list:
            words = "a list such as [a,b]"
        else:
            words = _WORDS[self.hint]
        return f"{words} or null" if self.optional else words


def keys_of(schema: type, prefix: str = "") -> dict[str, Key]:
    """Every key of a nested dataclass by its full dotted name, in the order of declaration."""
    hints = typing.get_type_hints(schema)
    table: dict[str, Key] = {}
    for field in fields(schema):
        hint, name = hints[field.name], prefix + field.name
        if is_dataclass(hint):
            table |= keys_of(hint, f"{name}.")
            continue
        optional = False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
            optional = True
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        table[name] = Key(name, hint, optional, default, field.metadata["help"])
    return table


def nearest(name: str, names: Iterable[str], least: float = 0.5) -> str | None:
    """The name most like ``name`` (full, or by its last part alone); None if nothing is."""

    def likeness(other: str) -> float:
        whole = SequenceMatcher(None, name, other).ratio()
        part = SequenceMatcher(None, name.split(".")[-1], other.split(".")[-1]).ratio()
        return max(whole, 0.9 * part)

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best) >= least else None


def suggestion(name: str, names: Iterable[str], otherwise: str) -> str:
    """ "did you mean X?", or the remedy ``otherwise``."""
    found = nearest(name, names)
    return f"did you mean {found}?" if found else otherwise
