"""What a token is, for people: a colour of an input or an output, a newline, a structure token.

Shapes: N packed tokens.
"""

from __future__ import annotations

from torch import Tensor

from tiny_onn.arc.task import NUM_COLORS
from tiny_onn.arc.tokens import END, SEP, START

INPUT_PLANE, OUTPUT_PLANE = 1, 3
_COLORS = range(NUM_COLORS)
_PER_GRID = NUM_COLORS + 1

KIND_NAMES = (
    *(f"in {color}" for color in _COLORS),
    "in newline",
    *(f"out {color}" for color in _COLORS),
    "out newline",
    "START",
    "SEP",
    "END",
)
"""END is read in documents with demonstrations only: a pair ends where it would come."""

KIND_COLORS: tuple[int | None, ...] = (*_COLORS, None, *_COLORS, None, None, None, None)
"""The colour of every kind; None for newlines and structure tokens."""


def token_kinds(tokens_N: Tensor, positions_N3: Tensor) -> Tensor:
    """int64 (N,): index into KIND_NAMES."""
    in_output_N = positions_N3[:, 2] == OUTPUT_PLANE
    kind_N = tokens_N.clamp(max=NUM_COLORS) + _PER_GRID * in_output_N
    for number, token in enumerate((START, SEP, END)):
        kind_N = kind_N.where(tokens_N != token, 2 * _PER_GRID + number)
    return kind_N
