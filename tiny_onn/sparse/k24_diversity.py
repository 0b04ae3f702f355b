"""How alike agents' distributions over the six patterns are, from 0 to 1: the diversity loss.

    dot        mean over groups and pairs i < j of  pi_i . pi_j: both draw the same pattern
    overlap    of  pi_i K pi_j  with K = M M^T / 2: share of the two entries that both keep

The dot product is indifferent among the five other patterns; the overlap drives two agents to
complementary masks. Identical one-hot distributions have 1; uniform ones 1/6 and 1/2. More than six
agents cannot all differ: the least mean of one-hot dots is 1/21 for seven, 1/14 for eight.

Shapes: K = 6 patterns, A agents, O rows, G groups, m = 4 entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tiny_onn.sparse.k24 import kept

Kernel = Literal["dot", "overlap"]


def pair_overlap(logits_KAOG: Tensor, kernel: Kernel) -> Tensor:
    """Scalar from 0 to 1, differentiable; 0 where there are no two agents.

    Raises:
        ValueError: another kernel.
    """
    if kernel not in ("dot", "overlap"):
        raise ValueError(f"got kernel '{kernel}'; expected dot or overlap; see k24.div_kernel")
    agents = logits_KAOG.shape[1]
    if agents < 2:
        return logits_KAOG.new_zeros(())
    share_KAOG = logits_KAOG.softmax(dim=0)
    if kernel == "overlap":  # pi K pi = (pi M) (pi M)^T / 2
        share_KAOG = kept(share_KAOG) * 0.5**0.5
    # The sum over i < j is (|sum_i p_i|^2 - sum_i |p_i|^2) / 2.
    both = share_KAOG.sum(dim=1).square().sum() - share_KAOG.square().sum()
    pairs = agents * (agents - 1)
    return both / (pairs * logits_KAOG[0, 0].numel())


@torch.no_grad()
def mask_overlap(mask_AOI: Tensor) -> Tensor:
    """Scalar: share of the kept entries that two agents' masks have in common, mean over pairs."""
    agents = len(mask_AOI)
    if agents < 2:
        return torch.zeros((), device=mask_AOI.device)
    count_OI = mask_AOI.float().sum(dim=0)
    both = (count_OI * (count_OI - 1)).sum()
    return both / ((agents - 1) * count_OI.sum())
