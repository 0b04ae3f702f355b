"""A document's grids side by side, as token numbers: what is drawn over them is looked up there.

Shapes: T tokens of a document, H rows and W columns of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiny_onn.arc.task import NUM_COLORS
from tiny_onn.arc.tokens import START
from tiny_onn.inspect.kinds import INPUT_PLANE, OUTPUT_PLANE

GAP = 1
"""Empty columns between two grids."""


@dataclass(frozen=True)
class Canvas:
    """token_HW: int64, the document's token at each cell, -1 for none; boxes: (left, top, width,
    height) of every grid."""

    token_HW: np.ndarray
    boxes: tuple[tuple[int, int, int, int], ...]

    def place(self, token: int) -> tuple[int, int]:
        """(column, row) of a token that is a cell."""
        (row,), (column,) = np.nonzero(self.token_HW == token)
        return int(column), int(row)


def lay_out_grids(tokens_T: np.ndarray, positions_T3: np.ndarray) -> Canvas:
    """All grids of a document (demonstrations too), in their order, from left to right."""
    pair_T = np.cumsum(tokens_T == START)
    parts = []
    for pair in range(1, int(pair_T[-1]) + 1):
        for plane in (INPUT_PLANE, OUTPUT_PLANE):
            rows_T = (pair_T == pair) & (positions_T3[:, 2] == plane) & (tokens_T < NUM_COLORS)
            if rows_T.any():
                parts.append(np.flatnonzero(rows_T))
    sizes = [positions_T3[part, :2].max(axis=0) + 1 for part in parts]
    height = max(int(size[1]) for size in sizes)
    width = sum(int(size[0]) for size in sizes) + GAP * (len(sizes) - 1)
    token_HW = np.full((height, width), -1, dtype=np.int64)
    boxes, left = [], 0
    for part, size in zip(parts, sizes, strict=True):
        token_HW[positions_T3[part, 1], positions_T3[part, 0] + left] = part
        boxes.append((left, 0, int(size[0]), int(size[1])))
        left += int(size[0]) + GAP
    return Canvas(token_HW, tuple(boxes))


def choose_queries(tokens_T: np.ndarray, positions_T3: np.ndarray, count: int) -> list[int]:
    """``count`` cells of the document's last grid, evenly spread from its first to its last."""
    last_pair = np.flatnonzero(tokens_T == START)[-1]
    cells = np.flatnonzero((positions_T3[:, 2] == OUTPUT_PLANE) & (tokens_T < NUM_COLORS))
    cells = cells[cells > last_pair]
    places = np.linspace(0, len(cells) - 1, min(count, len(cells))).round().astype(int)
    return cells[np.unique(places)].tolist()
