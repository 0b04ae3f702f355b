"""The experts of a DynMoE block: E small SwiGLU networks as two stacks of matrices.

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiny_onn.ops import run_experts


class Experts(nn.Module):
    """``gate_up`` (E, 2 F, C) and ``down`` (E, C, F): each expert's matrices are laid out as
    nn.Linear's are, so that Muon treats a stack as E of them.

    ``backend`` is a name that :func:`tiny_onn.ops.resolve_experts` gave; "loop" runs anywhere.
    """

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        nn.init.normal_(self.gate_up, std=width**-0.5)
        nn.init.normal_(self.down, std=hidden**-0.5)
        self.backend = "loop"

    def forward(self, x_NC: Tensor, runs_NE: Tensor, weight_NE: Tensor) -> Tensor:
        """The running experts' outputs, weighted and summed: (N, C) in x's dtype, or autocast's."""
        device = x_NC.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        x_NC, weight_NE, gate_up_EHC, down_ECF = (
            t.to(dtype or x_NC.dtype) for t in (x_NC, weight_NE, self.gate_up, self.down)
        )
        return run_experts(self.backend, x_NC, runs_NE, weight_NE, gate_up_EHC, down_ECF)
