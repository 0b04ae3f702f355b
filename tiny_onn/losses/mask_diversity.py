"""The diversity loss of experts that share one weight: how alike their 2:4 masks are drawn.

L_div = mean over layers (and rounds) of the overlap from 0 to 1 that each found in its forward
(tiny_onn/sparse/k24_diversity.py has the two kernels)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_onn.model.tiny_onn import ModelOutput


def mask_diversity(output: ModelOutput) -> Tensor | None:
    """Scalar from 0 to 1, not yet weighted; None where no layer's experts share a weight."""
    found = [entry.mask_overlap for entry in output.routing if entry.mask_overlap is not None]
    return torch.stack(found).mean() if found else None
