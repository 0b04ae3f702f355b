"""The experts from their definition, pair by pair, for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_expert_ffn(
    x_NC: Tensor,
    mask_NE: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
) -> Tensor:
    """(N, C): a loop over tokens and experts."""
    rows = []
    for t in range(len(x_NC)):
        y_C = torch.zeros_like(x_NC[t])
        for e in range(mask_NE.shape[1]):
            if mask_NE[t, e]:
                a_F, b_F = (gate_up_EHC[e] @ x_NC[t]).chunk(2)
                y_C = y_C + weight_NE[t, e] * (down_ECF[e] @ (a_F * torch.sigmoid(a_F) * b_F))
        rows.append(y_C)
    return torch.stack(rows) if rows else x_NC.clone()
