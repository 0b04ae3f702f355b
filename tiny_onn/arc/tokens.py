"""Grids as token sequences with 3D positions, and the strict way back.

A document is START, the input's rows (each followed by NEWLINE), SEP, the output's rows (each
followed by NEWLINE), END. Positions are (x, y, plane) and never depend on later tokens: START
(0, 0, 0), input (col, row, 1), SEP (0, 0, 2), output (col, row, 3), END (0, 0, 4); a NEWLINE
stands in the column after its row. With demonstrations in the document every pair repeats the
five planes; which pair a token belongs to follows from the order alone.

Shapes: T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tiny_onn.arc.task import MAX_SIDE, NUM_COLORS, Grid, Pair
from tiny_onn.errors import UserError

START, NEWLINE, SEP, END = 10, 11, 12, 13
VOCAB = 14
END_POSITION = (0, 0, 4)
IGNORE = -1
"""A target without loss."""

MAX_DOCUMENT = 3 + 2 * MAX_SIDE * (MAX_SIDE + 1)
"""Tokens of the longest pair: 1863."""


class GridDecodeError(UserError):
    """Tokens that are no grid; the message says which one is wrong and how."""


@dataclass(frozen=True, slots=True)
class Document:
    """One encoded document.

    tokens: int64 (T,); positions: int64 (T, 3) as (x, y, plane); prefix_len: tokens up to and
    including the query's SEP (T for a prompt); task: row of its task vector, -1 for none; view:
    dihedral index 0 to 7.
    """

    tokens: np.ndarray
    positions: np.ndarray
    prefix_len: int
    task: int = -1
    view: int = 0


def grid_length(height: int, width: int) -> int:
    """Tokens of a grid, newlines included."""
    return height * (width + 1)


def document_length(in_height: int, in_width: int, out_height: int, out_width: int) -> int:
    """Tokens of a pair: 3 + H(W+1) of both grids."""
    return 3 + grid_length(in_height, in_width) + grid_length(out_height, out_width)


def longest_orientation(pair: Pair) -> int:
    """Tokens of ``pair`` in the longer of its two orientations."""
    (in_height, in_width), (out_height, out_width) = pair.input.shape, pair.output.shape
    return max(
        document_length(in_height, in_width, out_height, out_width),
        document_length(in_width, in_height, out_width, out_height),
    )


def pair_tokens(pair: Pair) -> np.ndarray:
    """uint8 (T,) tokens of a whole document."""
    middle = 1 + grid_length(*pair.input.shape)
    end = middle + 1 + grid_length(*pair.output.shape)
    tokens = np.full(end + 1, NEWLINE, dtype=np.uint8)
    tokens[0], tokens[middle], tokens[end] = START, SEP, END
    for first, grid in ((1, pair.input), (middle + 1, pair.output)):
        height, width = grid.shape
        rows = tokens[first : first + height * (width + 1)].reshape(height, width + 1)
        rows[:, :width] = grid
    return tokens


def prompt_tokens(grid: Grid) -> np.ndarray:
    """uint8 (T,) tokens of START, the grid and SEP."""
    height, width = grid.shape
    tokens = np.full(2 + grid_length(height, width), NEWLINE, dtype=np.uint8)
    tokens[0], tokens[-1] = START, SEP
    tokens[1:-1].reshape(height, width + 1)[:, :width] = grid
    return tokens


@lru_cache(maxsize=4096)
def _grid_positions(height: int, width: int, plane: int) -> np.ndarray:
    positions = np.empty((height, width + 1, 3), dtype=np.int64)
    positions[..., 0] = np.arange(width + 1)
    positions[..., 1] = np.arange(height)[:, None]
    positions[..., 2] = plane
    return positions.reshape(-1, 3)


@lru_cache(maxsize=8192)
def prompt_positions(height: int, width: int) -> np.ndarray:
    """Read-only int64 (T, 3): START, an input grid of this size, SEP."""
    positions = np.concatenate([[(0, 0, 0)], _grid_positions(height, width, 1), [(0, 0, 2)]])
    positions.flags.writeable = False
    return positions


@lru_cache(maxsize=8192)
def pair_positions(in_height: int, in_width: int, out_height: int, out_width: int) -> np.ndarray:
    """Read-only int64 (T, 3) of a pair of these sizes."""
    positions = np.concatenate(
        [
            prompt_positions(in_height, in_width),
            _grid_positions(out_height, out_width, 3),
            [END_POSITION],
        ]
    )
    positions.flags.writeable = False
    return positions


def encode_pair(pair: Pair, task: int = -1, view: int = 0) -> Document:
    """The document of one pair (already in its view; ``view`` is the dihedral to announce)."""
    return Document(
        pair_tokens(pair).astype(np.int64),
        pair_positions(*pair.input.shape, *pair.output.shape),
        2 + grid_length(*pair.input.shape),
        task,
        view,
    )


def encode_prompt(grid: Grid, task: int = -1, view: int = 0) -> Document:
    """START, the test input, SEP: what generation goes on from."""
    tokens = prompt_tokens(grid).astype(np.int64)
    return Document(tokens, prompt_positions(*grid.shape), len(tokens), task, view)


def encode_demos(
    demos: Sequence[Pair], query: Pair | Grid, task: int = -1, view: int = 0
) -> Document:
    """Demonstration pairs one after the other, then the query pair (or the query's prompt).

    ``prefix_len`` counts everything up to and including the query's SEP.
    """
    encode = encode_pair if isinstance(query, Pair) else encode_prompt
    parts = [encode_pair(demo) for demo in demos] + [encode(query)]
    shown = sum(len(part.tokens) for part in parts[:-1])
    return Document(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.positions for part in parts]),
        shown + parts[-1].prefix_len,
        task,
        view,
    )


def decode_grid(tokens: Sequence[int] | np.ndarray) -> Grid:
    """The grid that an output's tokens spell: rows, each followed by NEWLINE, then END.

    Raises:
        GridDecodeError: no END, something after END, no rows, an unfinished, empty or ragged
            row, a structure token inside a row, or more than 30 a side.
    """
    tokens = np.asarray(tokens).tolist()
    if END not in tokens:
        raise GridDecodeError(f"got {len(tokens)} tokens without END, expected END after the rows")
    end = tokens.index(END)
    if end != len(tokens) - 1:
        raise GridDecodeError(f"got {len(tokens) - 1 - end} tokens after END, expected none")
    rows: list[list[int]] = [[]]
    for place, token in enumerate(tokens[:end]):
        if token == NEWLINE:
            rows.append([])
        elif 0 <= token < NUM_COLORS:
            rows[-1].append(token)
        else:
            raise GridDecodeError(f"got token {token} at {place}, expected a colour or NEWLINE")
    if rows.pop():
        raise GridDecodeError(f"got END inside row {len(rows)}, expected NEWLINE first")
    if not 1 <= len(rows) <= MAX_SIDE:
        raise GridDecodeError(f"got {len(rows)} rows, expected 1 to {MAX_SIDE}")
    width = len(rows[0])
    if not 1 <= width <= MAX_SIDE:
        raise GridDecodeError(f"got {width} cells in row 0, expected 1 to {MAX_SIDE}")
    for number, row in enumerate(rows):
        if len(row) != width:
            raise GridDecodeError(f"got {len(row)} cells in row {number}, expected {width}")
    return np.array(rows, dtype=np.uint8)
