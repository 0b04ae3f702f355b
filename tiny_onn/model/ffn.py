"""SwiGLU feed-forward network (Shazeer, arXiv 2002.05202). N tokens, C width, F hidden width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.model.deep_embed import scale
from tiny_onn.model.k24_parts import K24Parts


class SwiGLU(nn.Module):
    """x_NC -> (silu(x W_gate) * (x W_up)) W_down; W_gate and W_up are one matrix.

    ``delta_NF`` (DeepEmbed, form 4x) scales the hidden layer by 1 + delta. With ``k24`` both
    matrices wear 2:4 masks.
    """

    def __init__(self, width: int, hidden: int, k24: K24Parts | None = None) -> None:
        super().__init__()
        self.masked = k24 is not None
        if k24 is None:
            self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
            self.down = nn.Linear(hidden, width, bias=False)
        else:
            self.gate_up = k24.linear(width, 2 * hidden)
            self.down = k24.linear(hidden, width)

    def forward(self, x_NC: Tensor, delta_NF: Tensor | None = None) -> Tensor:
        gate_NF, up_NF = self.gate_up(x_NC).chunk(2, dim=-1)
        hidden_NF = F.silu(gate_NF) * up_NF
        if delta_NF is not None:
            hidden_NF = scale(hidden_NF, delta_NF)
        return self.down(hidden_NF)
