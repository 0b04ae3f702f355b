"""3D rotary position embedding: a head's channel pairs are shared out to x, y and plane.

Su et al., RoFormer (arXiv 2104.09864), equation 34, applied per axis. A pair's angle is
``coordinate * base ** (-i / pairs_of_axis)``, so attention scores depend on coordinate
*differences* only, and no position depends on a later token or on a document's length.

Shapes: N tokens, H heads, D head width, P = D / 2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def axis_pairs(head_width: int) -> tuple[int, int, int]:
    """How many of the D/2 channel pairs the axes (x, y, plane) get; plane gets a quarter."""
    pairs = head_width // 2
    plane = max(1, round(pairs * 0.25))
    x = (pairs - plane) // 2
    return x, pairs - plane - x, plane


class Rope3D(nn.Module):
    """Angles for integer positions; ``forward`` returns cos and sin, each (N, 1, D/2) float32."""

    def __init__(self, head_width: int, base: float) -> None:
        super().__init__()
        counts = axis_pairs(head_width)
        frequency = torch.cat([base ** (-torch.arange(n, dtype=torch.float64) / n) for n in counts])
        axis = torch.cat([torch.full((n,), a) for a, n in enumerate(counts)])
        self.register_buffer("frequency_P", frequency.float(), persistent=False)
        self.register_buffer("axis_P", axis, persistent=False)

    def forward(self, positions_N3: Tensor) -> tuple[Tensor, Tensor]:
        angle_NP = positions_N3.to(self.frequency_P.dtype)[:, self.axis_P] * self.frequency_P
        return angle_NP.cos().unsqueeze(1), angle_NP.sin().unsqueeze(1)


def rotate(x_NHD: Tensor, cos_N1P: Tensor, sin_N1P: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2); keeps the dtype of ``x_NHD``."""
    a, b = x_NHD.float().chunk(2, dim=-1) if x_NHD.dtype != torch.float64 else x_NHD.chunk(2, -1)
    return torch.cat([a * cos_N1P - b * sin_N1P, b * cos_N1P + a * sin_N1P], dim=-1).to(x_NHD.dtype)
