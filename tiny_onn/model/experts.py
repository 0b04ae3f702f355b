"""The experts of a DynMoE block: E small SwiGLU networks as two stacks of matrices.

With ``k24`` every expert's matrices wear 2:4 masks of its own; with ``shared`` too, all experts
have one pair of matrices in common and differ by their masks alone.

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F, S sampled tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.model.k24_parts import K24Parts
from tiny_onn.ops import run_experts
from tiny_onn.sparse.k24_layer import PatternMask

SAMPLES = 256
"""Tokens, evenly spaced, from which a forward measures the activity in front of ``down``: kernels
keep hidden layers to themselves, and all tokens would cost a third forward product. So this
average, unlike others, depends on the number of forwards and processes that share a step."""


class Experts(nn.Module):
    """``gate_up`` (E, 2 F, C) and ``down`` (E, C, F): each expert's matrices are laid out as
    nn.Linear's are, so that Muon treats a stack as E of them. Shared ones are (2 F, C) and (C, F).

    ``backend`` is a name that :func:`tiny_onn.ops.resolve_experts` gave; "loop" runs anywhere.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        k24: K24Parts | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        assert k24 is not None or not shared, "experts that share a weight differ by masks"
        stack = () if shared else (experts,)
        self.shared = shared
        self.gate_up = nn.Parameter(torch.empty(*stack, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(*stack, width, hidden))
        nn.init.normal_(self.gate_up, std=width**-0.5)
        nn.init.normal_(self.down, std=hidden**-0.5)
        self.gate_up_pattern = self.down_pattern = None
        if k24 is not None:
            self.gate_up_pattern = k24.pattern(experts, 2 * hidden, width, shared)
            self.down_pattern = k24.pattern(experts, width, hidden, shared)
        self.backend = "loop"

    def forward(
        self,
        x_NC: Tensor,
        runs_NE: Tensor,
        weight_NE: Tensor,
        overlaps: list[Tensor] | None = None,
    ) -> Tensor:
        """The running experts' outputs, weighted and summed: (N, C) in x's dtype, or autocast's.

        How far masks of experts with a shared weight overlap is added to ``overlaps``, once a
        matrix, in forwards that learn and where the diversity loss is on.
        """
        gate_up_EHC, down_ECF = self.matrices(overlaps)
        if self.gate_up_pattern is not None and self.training and torch.is_grad_enabled():
            self._observe(x_NC.detach(), runs_NE, gate_up_EHC.detach())
        device = x_NC.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        x_NC, weight_NE, gate_up_EHC, down_ECF = (
            t.to(dtype or x_NC.dtype) for t in (x_NC, weight_NE, gate_up_EHC, down_ECF)
        )
        return run_experts(self.backend, x_NC, runs_NE, weight_NE, gate_up_EHC, down_ECF)

    def matrices(self, overlaps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(E, 2 F, C) and (E, C, F) as they are multiplied with, under their masks if any."""
        if self.gate_up_pattern is None or self.down_pattern is None:
            return self.gate_up, self.down
        gate_up_EHC, first = self.gate_up_pattern(self.gate_up)
        down_ECF, second = self.down_pattern(self.down)
        # Experts with weights of their own need no other mask to differ.
        if self.shared and overlaps is not None:
            overlaps += [found for found in (first, second) if found is not None]
        return gate_up_EHC, down_ECF

    def patterns(self) -> list[PatternMask]:
        """The masks of both matrices; none without ``k24``."""
        return [p for p in (self.gate_up_pattern, self.down_pattern) if p is not None]

    @torch.no_grad()
    def _observe(self, x_NC: Tensor, runs_NE: Tensor, gate_up_EHC: Tensor) -> None:
        """How large the matrices' inputs are, of each expert's own tokens."""
        assert self.gate_up_pattern is not None and self.down_pattern is not None
        num_rows = self.gate_up_pattern.state.num_rows
        self.gate_up_pattern.activity.observe(x_NC, runs_NE, num_rows)
        num_rows = len(x_NC) if num_rows is None else num_rows
        samples = min(SAMPLES, num_rows)
        row_S = torch.arange(samples, device=x_NC.device) * num_rows // max(1, samples)
        with torch.autocast(x_NC.device.type, enabled=False):
            x_SC = x_NC[row_S].to(gate_up_EHC.dtype)
            gate_ESF, up_ESF = torch.matmul(x_SC, gate_up_EHC.mT).chunk(2, dim=-1)
        self.down_pattern.activity.observe_each(F.silu(gate_ESF) * up_ESF, runs_NE[row_S])
