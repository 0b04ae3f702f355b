"""Soft-threshold sparsifier of S-STE (Hu et al., arXiv 2409.09099): continuous in the weights.

With theta the (n+1)-th largest magnitude of a group, S(w) = sign(w) max(|w| - theta, 0): at most n
nonzeros, no jump where two entries swap ranks, S(c w) = c S(w). It shrinks what it keeps; a factor
beta = <w, S> / <S, S>, computed once at the start and frozen, restores the scale of weights.

Shapes: x of any shape whose size along pattern.dim m divides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import TWO_FOUR, largest
from tiny_onn.sparse.pattern import NMPattern, refuse_nonfinite


def soft_threshold(x: Tensor, pattern: NMPattern = TWO_FOUR, check: bool = True) -> Tensor:
    """S(x), of x's shape and type; entries tied with theta become zero.

    Autograd gives its own derivative: with i a kept entry and t the entry at theta,
    dS_i / dx_i = 1 and dS_i / dx_t = -sign(x_i) sign(x_t), everything else 0. For weights use
    :func:`soft_threshold_ste`, whose backward is the identity.

    Args:
        check: refuse NaN and infinities; waits for the device.

    Raises:
        UserError: a size that m does not divide, integers, NaN, infinities.
    """
    pattern.check(x)
    if not x.is_floating_point() or x.element_size() == 1:
        raise UserError(
            f"got {x.dtype} to threshold; expected float16, bfloat16 or wider; convert the tensor"
        )
    if check:
        refuse_nonfinite(x, pattern, "the tensor to threshold")
    groups = pattern.group(x)
    size = groups.abs()
    rest = size.masked_fill(largest(size.detach(), pattern.n), 0)
    theta = rest.amax(dim=-1, keepdim=True)
    return pattern.ungroup(groups.sign() * (size - theta).relu())


@torch.no_grad()
def beta(x: Tensor, pattern: NMPattern = TWO_FOUR) -> float:
    """<x, S> / <S, S>: the factor that brings S(x) closest to x; 1.483 for Gaussian 2:4.

    Raises:
        UserError: S(x) is zero everywhere (every group tied), so no factor exists.
    """
    x = x.double()
    sparse = soft_threshold(x, pattern)
    energy = sparse.square().sum()
    if not energy > 0:
        raise UserError(
            f"soft-threshold {pattern} of a tensor of {tuple(x.shape)} is zero everywhere: it has "
            "no scale to restore; draw weights at random first"
        )
    return float((x * sparse).sum() / energy)


class _StraightThrough(torch.autograd.Function):
    """beta S(x) forward, the identity backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pattern: NMPattern, scale: float | Tensor, check: bool
    ) -> Tensor:
        return soft_threshold(x, pattern, check) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def soft_threshold_ste(
    x: Tensor, pattern: NMPattern = TWO_FOUR, scale: float | Tensor = 1.0, check: bool = True
) -> Tensor:
    """``scale`` * S(x); its gradient is handed to x unchanged, to masked entries too (S-STE).

    Args:
        scale: the frozen :func:`beta` of the initial weights; a tensor of no dimension gets no
            gradient.

    Raises:
        UserError: as :func:`soft_threshold`.
    """
    return _StraightThrough.apply(x, pattern, scale, check)
