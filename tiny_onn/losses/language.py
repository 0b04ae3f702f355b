"""Negative log-likelihood of the next token over the rows that carry a target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def output_nll(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Summed NLL in nats and the number of rows whose argmax is the target.

    Args:
        logits_MV: (M, V) float; targets_M: (M,) int64, all in [0, V).
    """
    nll = F.cross_entropy(logits_MV, targets_M, reduction="sum")
    with torch.no_grad():
        correct = (logits_MV.argmax(dim=-1) == targets_M).sum()
    return nll, correct
