"""The mask of the n largest magnitudes of every group, and its application.

Shapes: G groups, m entries a group; x of any shape whose size along pattern.dim m divides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_onn.errors import UserError
from tiny_onn.sparse.pattern import NMPattern, refuse_nan

TWO_FOUR = NMPattern()
MOST_COMPARED = 8
"""Up to this group size all pairs are compared; sorting is faster beyond."""


def magnitude(x: Tensor) -> Tensor:
    """|x| in a type that can order it: integers as int64 (|-128| has no int8), fp8 as float32.

    Raises:
        UserError: bool or complex.
    """
    if x.dtype == torch.bool or x.is_complex():
        raise UserError(f"got {x.dtype}; expected real numbers to rank by magnitude; convert them")
    if not x.is_floating_point():
        return x.long().abs()
    return x.float().abs() if x.element_size() == 1 else x.abs()


def largest(groups: Tensor, n: int) -> Tensor:
    """bool (..., m): the n largest of the last dimension, ties to the lower index.

    Exactly n per group whatever the values; NaN must have been replaced by the caller.
    """
    m = groups.shape[-1]
    if m > MOST_COMPARED:
        order = groups.sort(dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(groups, dtype=torch.bool)
        return chosen.scatter_(-1, order[..., :n], True)
    entries = groups.unbind(-1)
    losses = [torch.zeros_like(entries[0], dtype=torch.int8) for _ in entries]
    for j in range(m):
        for i in range(j):
            later = entries[j] > entries[i]  # a tie goes to i
            losses[i] += later
            losses[j] += ~later
    return torch.stack([loss < n for loss in losses], dim=-1)


@torch.no_grad()
def topk_mask(x: Tensor, pattern: NMPattern = TWO_FOUR, check: bool = True) -> Tensor:
    """bool, of x's shape: the n largest |x| of every group of m.

    Exactly n per group, zeros among them where fewer are nonzero; equal magnitudes go to the lower
    index, so that it is deterministic on every device. Infinities are largest.

    Args:
        x: real numbers of any type and shape.
        pattern: n, m and the dimension of the groups.
        check: refuse NaN, which waits for the device; unchecked, a NaN ranks below zero.

    Raises:
        UserError: a size that m does not divide, bool or complex numbers, NaN.
    """
    pattern.check(x)
    size = magnitude(x)
    if size.is_floating_point():
        if check:
            refuse_nan(size, pattern, "the tensor to mask")
        size = torch.where(size.isnan(), -1.0, size)
    return pattern.ungroup(largest(pattern.group(size), pattern.n))


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True, else an exact zero (also where x is NaN or infinite).

    The gradient passes where the mask is True. A mask of fewer dimensions is broadcast.

    Raises:
        UserError: the mask is not bool or does not broadcast to x's shape.
    """
    if mask.dtype != torch.bool:
        raise UserError(f"a mask is bool, got {mask.dtype}; compare it with zero")
    aligned = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(a not in (1, b) for a, b in aligned):
        raise UserError(
            f"got a mask of {tuple(mask.shape)} for a tensor of {tuple(x.shape)}; expected a shape "
            "that broadcasts to it; make them of one size"
        )
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
