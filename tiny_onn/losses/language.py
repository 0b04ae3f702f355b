"""Negative log-likelihood of the next token over the rows that carry a target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1
"""A target that counts for nothing (the tokens' own constant; losses import no data)."""


def output_nll(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Summed NLL in nats and the number of rows whose argmax is the target.

    Args:
        logits_MV: (M, V) float; targets_M: (M,) int64 in [0, V), or IGNORE: counts for nothing.
    """
    nll = F.cross_entropy(logits_MV, targets_M, reduction="sum", ignore_index=IGNORE)
    with torch.no_grad():
        correct = (logits_MV.argmax(dim=-1) == targets_M).sum()
    return nll, correct
