"""SDL, the sparsity-diversity loss of the DynMoE gates: its only definition.

    SDL = sparsity_weight * mean_l S_l + diversity_weight * mean_l D_l

    S_l = (k_l / target - 1)^2
    D_l = sum over i != j of  u_i u_j cos(prototype_i, prototype_j)^2 / (n (n - 1)),   n = sum_i u_i

k_l: mean number of experts above their threshold a token, in layer l, before any fallback, over all
tokens of the step and all processes. u_i: 1 if expert i fired for any of these tokens. S_l is 0 at
the target and 1 where nothing fires. D_l is 0 exactly where the used prototypes are orthogonal and
1 where they are equal; for E > C its least value is (E - C) / (C (E - 1)) (Welch 1974).

Where this differs from DynMoE (arXiv 2405.14297, section 3.3) and why: D is squared, so that its
gradient vanishes with it (the norm's has length 1 at an orthonormal start, made of rounding
errors); the diagonal, which is 1 whatever happens, is left out; unused experts are left alone, and
so is the prototypes' length, on which no decision depends. There is no load-balancing loss: idle
experts are reborn (tiny_onn/training/expert_reset.py).

Shapes: L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SDLTerms(NamedTuple):
    """Scalars, both finite and at least 0."""

    sparsity: Tensor
    diversity: Tensor


def sparsity(mean_active_L: Tensor, target: float) -> Tensor:
    """Mean of S_l. mean_active_L: (L,), k_l, at least 0; target: above 0."""
    return (mean_active_L / target - 1).square().mean()


def diversity(gram_LEE: Tensor, used_LE: Tensor) -> Tensor:
    """Mean of D_l. gram_LEE: (L, E, E), cosines of prototypes; used_LE: bool, u. With fewer than
    two used experts a layer's D is 0."""
    pair_LEE = (used_LE.unsqueeze(2) & used_LE.unsqueeze(1)).to(gram_LEE.dtype)
    pair_LEE.diagonal(dim1=1, dim2=2).zero_()
    pairs_L = pair_LEE.sum(dim=(1, 2))
    return ((gram_LEE.square() * pair_LEE).sum(dim=(1, 2)) / pairs_L.clamp(min=1)).mean()


def sdl_terms(mean_active_L: Tensor, gram_LEE: Tensor, used_LE: Tensor, target: float) -> SDLTerms:
    """Both terms, not yet weighted."""
    return SDLTerms(sparsity(mean_active_L, target), diversity(gram_LEE, used_LE))
