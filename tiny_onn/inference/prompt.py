"""The document that asks for a test input's output, in the formulation the model was trained on."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tiny_onn.arc.task import Grid, Pair, Task
from tiny_onn.arc.tokens import (
    MAX_DOCUMENT,
    Document,
    encode_demos,
    encode_pair,
    encode_prompt,
    grid_length,
    longest_orientation,
)
from tiny_onn.arc.view import IDENTITY, View, apply, apply_pair
from tiny_onn.inference.size_rule import Size

Context = Literal["pair", "demos"]


def encode_query(
    task: Task,
    query: Pair | Grid,
    *,
    row: int,
    view: View = IDENTITY,
    context: Context = "pair",
    max_tokens: int = MAX_DOCUMENT,
    size: Size | None = None,
) -> Document:
    """``query`` under ``view``: a prompt for a grid, the complete document for a pair.

    Args:
        task: gives the demonstrations for context "demos".
        query: in the task's own orientation and colours.
        row: row of the task's vector, -1 for none.
        view: applied to the demonstrations and the query alike.
        context: "demos" shows the demonstrations first, in their order: as many as leave the
            document within ``max_tokens``, the query itself never among them.
        size: of the output, if known; a prompt without it is taken to answer in its own size.
    """
    pair = query if isinstance(query, Pair) else None
    grid = query if pair is None else pair.input
    shown = apply(view, grid) if pair is None else apply_pair(view, pair)
    if context == "pair":
        encode = encode_prompt if pair is None else encode_pair
        return encode(shown, row, view.dihedral)
    height, width = size or (grid.shape if pair is None else pair.output.shape)
    left = (
        max_tokens
        - 3
        - max(
            grid_length(*grid.shape) + grid_length(height, width),
            grid_length(*grid.T.shape) + grid_length(width, height),
        )
    )
    demos = []
    for demo in task.demos:
        same = pair is not None and _equal(demo, pair)
        length = longest_orientation(demo)
        if not same and length <= left:
            demos.append(apply_pair(view, demo))
            left -= length
    return encode_demos(demos, shown, row, view.dihedral)


def _equal(a: Pair, b: Pair) -> bool:
    return np.array_equal(a.input, b.input) and np.array_equal(a.output, b.output)
