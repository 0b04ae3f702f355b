"""Masks that are 2:4 along rows and along columns: the best of the 90 of each 4x4 tile.

A weight so masked is 2:4 in the forward product and, transposed, in the backward one.

The hardware would also take 96 masks of seven entries, whose eighth would fall on one taken
already; one of these is better in 3.4% of Gaussian tiles and all of them together gain 0.05% of L1
norm, which is not worth masks of two densities.

Shapes: R rows, C columns, both multiples of 4; T = R C / 16 tiles; P = 90 masks.
"""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import magnitude
from tiny_onn.sparse.pattern import NMPattern, refuse_nonfinite

TILE = 4
TILES_AT_ONCE = 1 << 15
"""Their scores take 23 MB in float64."""


_ROWS = [[int(i in kept) for i in range(TILE)] for kept in combinations(range(TILE), 2)]
_MASKS = [
    rows
    for rows in product(_ROWS, repeat=TILE)
    if all(sum(column) == 2 for column in zip(*rows, strict=True))
]


def transposable_masks(device: torch.device | str | None = None) -> Tensor:
    """bool (90, 4, 4): every mask with two ones in each row and column, in lexicographic order of
    the rows' patterns."""
    return torch.tensor(_MASKS, dtype=torch.bool, device=device)


@torch.no_grad()
def transposable_mask(weight: Tensor, check: bool = True) -> Tensor:
    """bool (..., R, C): of each 4x4 tile, the mask that keeps the largest sum of |weight|.

    Sums are in float64; equal ones go to the first mask in order. Where no two masks tie, the mask
    of the transposed weight is the transposed mask.

    Args:
        weight: (..., R, C) real numbers.
        check: refuse NaN and infinities; waits for the device.

    Raises:
        UserError: fewer than two dimensions, a size that 4 does not divide, NaN, infinities.
    """
    if weight.dim() < 2:
        raise UserError(
            f"got shape {tuple(weight.shape)}; expected a matrix, or a stack of them; give two "
            "dimensions or more"
        )
    along_rows, along_columns = NMPattern(2, TILE, -1), NMPattern(2, TILE, -2)
    along_rows.check(weight)
    along_columns.check(weight)
    if check and weight.is_floating_point():
        refuse_nonfinite(weight, along_rows, "the weight to mask")
    size = magnitude(weight).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    tiles = size.transpose(-2, -3)  # (..., R / 4, C / 4, 4, 4)
    masks = transposable_masks(weight.device)
    scores_of = masks.flatten(1).double().T  # (16, P)
    best = torch.cat(
        [
            (some.double() @ scores_of).argmax(-1)
            for some in tiles.reshape(-1, 16).split(TILES_AT_ONCE)
        ]
    )
    chosen = masks[best].view(tiles.shape)
    return chosen.transpose(-2, -3).flatten(-4, -3).flatten(-2)
