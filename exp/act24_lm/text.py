"""A text that every Python ships: pydoc's topics, the reference manual's chapters as plain text.

N characters.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

VALIDATION_EVERY = 10
"""Every tenth topic, by name, is kept for validation; topics that repeat a part of one of these are
left out of training."""

LONG = 60
"""Characters of a line that no two parts of the text have by chance."""

PLAIN = [chr(c) for c in (10, *range(32, 127))]
"""Newline and printable ASCII; any other character becomes the last symbol."""

VOCAB_SIZE = len(PLAIN) + 1


@dataclass(frozen=True)
class Text:
    """int64 (N,) symbols of both parts; sha256 of the whole text (it changes with Python)."""

    train_N: Tensor
    validation_N: Tensor
    sha256: str


def load_text() -> Text:
    """The same split for every run of one Python version."""
    names = sorted(topics)
    held = names[::VALIDATION_EVERY]
    seen = set().union(*(_long_lines(topics[n]) for n in held))
    others = [n for n in names if n not in held and not seen & _long_lines(topics[n])]
    parts = ["\n\n".join(topics[n] for n in kept) for kept in (others, held)]
    train_N, validation_N = (encode(part) for part in parts)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return Text(train_N, validation_N, digest)


def _long_lines(text: str) -> set[str]:
    """Chapters repeat parts of each other: a long line in common tells."""
    return {line for line in text.split("\n") if len(line) > LONG}


def encode(text: str) -> Tensor:
    """int64 (N,) below VOCAB_SIZE."""
    number = {c: i for i, c in enumerate(PLAIN)}
    return torch.tensor([number.get(c, len(PLAIN)) for c in text])


def windows(symbols_N: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and their next symbols, both (B, context), from each start on."""
    places = starts[:, None] + torch.arange(context)
    return symbols_N[places], symbols_N[places + 1]
