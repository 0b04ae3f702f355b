"""K-2:4: a 2:4 mask drawn from a distribution over the six patterns, group by group.

    S = |W| * activity * sigmoid(alpha), divided by its mean over the matrix (without gradient)
    logits = kappa * S M^T             M: the six patterns (6, 4), or six free numbers a group
    y = onehot(argmax(logits + Gumbel noise)),    mask = y M          (Jang, arXiv 1611.01144)
    d y / d logits := that of softmax((logits + noise) / tau)         (straight through)

So a pattern k is drawn with probability softmax(logits)_k whatever tau is: kappa is what makes the
mask settle, tau only shapes its gradient. The likeliest pattern is that of the two largest S.
All of it is computed in float32 (float64 for float64 weights), under autocast too: in half
precision Gumbel noise is NaN now and then. A group with a NaN among its logits keeps nothing and
its gradients are NaN; a masked NaN or infinite weight is NaN, so that it is seen.

The Triton kernels (kernels/pattern24) compute the same from the same noise.

Shapes: A agents, O rows, I columns, G = I / 4 groups, K = 6 patterns, m = 4 entries of a group.
Patterns, and entries of groups, are the *first* dimension where they stand alone (KAOG, mAOG):
along a last dimension of four or six numbers a CPU computes several times slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiny_onn.ops import pattern_noise
from tiny_onn.sparse.mask import topk_mask
from tiny_onn.sparse.pattern import NMPattern

TWO_FOUR = NMPattern()
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The entries that each pattern keeps, in the order of :func:`tiny_onn.sparse.pattern.patterns`."""


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def by_entry(x_AOI: Tensor) -> Tensor:
    """(m, A, O, G) of (A, O, I): the four entries of every group.

    Raises:
        UserError: I is not divisible by 4.
    """
    return TWO_FOUR.group(x_AOI).movedim(-1, 0)


def by_column(x_mAOG: Tensor) -> Tensor:
    """Inverse of :func:`by_entry`."""
    return TWO_FOUR.ungroup(x_mAOG.movedim(0, -1))


def score(
    weight: Tensor, activity_AI: Tensor, alpha_AOI: Tensor, weight_learns: bool = False
) -> Tensor:
    """(A, O, I): how much each agent values each weight; the mean of each agent's is 1.

    Args:
        weight: (O, I), shared by all agents, or (A, O, I).
        activity_AI: size of the inputs that each agent's rows meet, at least 0.
        alpha_AOI: each agent's own view.
        weight_learns: whether |W| gets the score's gradient.
    """
    size = wide(weight).abs()
    if not weight_learns:
        size = size.detach()
    score_AOI = size * wide(activity_AI).unsqueeze(1) * wide(alpha_AOI).sigmoid()
    mean_A11 = score_AOI.detach().mean(dim=(1, 2), keepdim=True)
    return score_AOI / mean_A11.clamp(min=torch.finfo(mean_A11.dtype).tiny)


def pattern_logits(score_AOI: Tensor, kappa: float) -> Tensor:
    """(K, A, O, G): kappa times what each pattern would keep of the scores."""
    return kappa * _scored(by_entry(score_AOI))


def noise_key(seed: int) -> int:
    """What of a seed of any size is the key of its noise: 63 bits."""
    return seed % (1 << 63)


def gumbel_noise(like_KX: Tensor, seed: int) -> Tensor:
    """Standard Gumbel numbers in ``like_KX``'s shape, type and device, a function of the seed and
    the place alone: the same on every device and in every back-end, and no stream moves. Always
    finite."""
    num_groups = like_KX[0].numel()
    noise_GK = pattern_noise(num_groups, noise_key(seed), like_KX.dtype, like_KX.device)
    return noise_GK.T.reshape(like_KX.shape)


def kept(pattern_KX: Tensor) -> Tensor:
    """(m, ...) of (K, ...): y M, how much of each entry patterns of these weights keep."""
    p01, p02, p03, p12, p13, p23 = pattern_KX.unbind(0)
    return torch.stack([p01 + p02 + p03, p01 + p12 + p13, p02 + p12 + p23, p03 + p13 + p23])


def _scored(entry_mX: Tensor) -> Tensor:
    """(K, ...) of (m, ...): the transposed of :func:`kept`."""
    entries = entry_mX.unbind(0)
    return torch.stack([entries[i] + entries[j] for i, j in PAIRS])


def _one_hot(value_KX: Tensor) -> Tensor:
    """bool (K, ...): the largest of each group, of equal ones the first; none beside a NaN."""
    best_X = value_KX.amax(dim=0)
    free_X = torch.ones_like(best_X, dtype=torch.bool)
    chosen: list[Tensor] = []
    for value_X in value_KX.unbind(0):  # argmax along a first dimension is slow on a CPU
        chosen.append((value_X == best_X) & free_X)
        free_X = free_X & ~chosen[-1]
    return torch.stack(chosen)


class _HardMask(torch.autograd.Function):
    """y M for the pattern of the largest noisy logit; the gradient is the softmax's."""

    @staticmethod
    def forward(ctx: Any, logits_KX: Tensor, noise_KX: Tensor, tau: float) -> Tensor:
        noisy_KX = logits_KX + noise_KX
        ctx.save_for_backward((noisy_KX / tau).softmax(dim=0))
        ctx.tau = tau
        return kept(_one_hot(noisy_KX).to(logits_KX.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mX: Tensor) -> tuple[Tensor, None, None]:
        (soft_KX,) = ctx.saved_tensors
        grad_KX = _scored(grad_mX)
        mean_X = (soft_KX * grad_KX).sum(dim=0)
        return soft_KX * (grad_KX - mean_X) / ctx.tau, None, None


def sample_mask(logits_KAOG: Tensor, noise_KAOG: Tensor, tau: float) -> Tensor:
    """(A, O, I) exactly 0 or 1, in the logits' type: two ones in every group.

    Args:
        logits_KAOG, noise_KAOG: the same shape and type; noise of :func:`gumbel_noise`.
        tau: above 0.

    Raises:
        ValueError: a tau that is not above 0.
    """
    if not tau > 0:
        raise ValueError(f"got tau={tau}; expected a number above 0; see k24.tau_end")
    return by_column(_HardMask.apply(logits_KAOG, noise_KAOG, tau))


@torch.no_grad()
def likeliest_mask(logits_KAOG: Tensor) -> Tensor:
    """bool (A, O, I): the likeliest pattern of each group, of equal ones the first."""
    return by_column(kept(_one_hot(logits_KAOG).to(torch.int8)) > 0)


@torch.no_grad()
def mask_of(pattern_AOG: Tensor) -> Tensor:
    """bool (A, O, I) of numbers of patterns, 0 to 5, in the order of PAIRS; 6: nothing is kept."""
    kept_74 = [[entry in pair for entry in range(4)] for pair in (*PAIRS, ())]
    table_74 = torch.tensor(kept_74, device=pattern_AOG.device)
    return table_74[pattern_AOG.long()].flatten(-2)


@torch.no_grad()
def best_mask(score_AOI: Tensor) -> Tensor:
    """bool (A, O, I): the two largest scores of each group. :func:`likeliest_mask` of their logits,
    without what sums of two numbers lose to rounding. A NaN ranks below zero."""
    return topk_mask(score_AOI, TWO_FOUR, check=False)


class _Straight(torch.autograd.Function):
    """weight * mask, with the whole gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask_AOI: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight * mask_AOI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AOI: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return grad_AOI.sum_to_size(weight.shape), grad_AOI * weight


def masked(weight: Tensor, mask_AOI: Tensor, straight: bool = False) -> Tensor:
    """(A, O, I) weight * mask, in the weight's type.

    ``straight``: weights that are masked out get the gradient of what they would have been, too
    (straight-through); else only those that are kept do.
    """
    mask_AOI = mask_AOI.to(weight.dtype)
    return _Straight.apply(weight, mask_AOI) if straight else weight * mask_AOI
