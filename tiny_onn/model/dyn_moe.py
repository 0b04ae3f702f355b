"""DynMoE, the sparse feed-forward network (Guo et al., arXiv 2405.14297): gate, then experts.

    y_t = sum over the experts e that run for t of  weight_te * expert_e(x_t)

Which experts run and how they are weighted is the gate's business (gate.py); how many run is
between none and all of them, for each token by itself. A drop-in for SwiGLU.

Shapes: N tokens, E experts, C width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiny_onn.config.schema import MoeConfig
from tiny_onn.model.experts import Experts
from tiny_onn.model.gate import CosineGate
from tiny_onn.model.k24_parts import K24Parts


@dataclass(frozen=True)
class Routing:
    """What one DynMoE layer did in one forward; tensors only, so that nothing waits for a device.

    layer: number of its block. num_rows: rows that are real tokens; the rest are filler.
    fires_NE: 0 or 1, experts above threshold, before any fallback; differentiable in the gate's
    parameters (float). runs_NE: bool, what was executed. gram_EE: cosines of the prototypes,
    differentiable. thresholds_E, inputs_NC: what the gate compared, without gradient.
    mask_overlap: mean over its matrices of how alike the masks of experts that share a weight are,
    from 0 to 1, differentiable; None where nothing is learnt or its loss is off.
    """

    layer: int
    num_rows: int
    fires_NE: Tensor
    runs_NE: Tensor
    gram_EE: Tensor
    thresholds_E: Tensor
    inputs_NC: Tensor
    mask_overlap: Tensor | None = None


class RoutingLog:
    """Collects what the layers of one forward did, in the order in which they ran.

    No list by itself: FSDP hands a module copies of the lists among its arguments.
    """

    def __init__(self) -> None:
        self.entries: list[Routing] = []


class DynMoE(nn.Module):
    """``layer`` is the number of the block that it stands in; ``k24`` gives the experts masks."""

    def __init__(
        self, width: int, config: MoeConfig, layer: int, k24: K24Parts | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.gate = CosineGate(
            width, config.experts, config.target_active, config.none_active, config.combine
        )
        shared = config.expert_weights == "shared_k24"
        self.experts = Experts(width, config.expert_width, config.experts, k24, shared)

    def expert_parameters(self) -> list[nn.Parameter]:
        """Those whose rows (first dimension) are experts: all but weights that experts share."""
        shared = {id(p) for p in (self.experts.gate_up, self.experts.down) if self.experts.shared}
        return [p for p in self.parameters() if id(p) not in shared]

    def forward(self, x_NC: Tensor, routing: RoutingLog | None = None) -> Tensor:
        """(N, C). What was routed where is added to ``routing``, with all rows as real ones."""
        decision = self.gate(x_NC)
        overlaps: list[Tensor] = []
        y_NC = self.experts(x_NC, decision.runs_NE, decision.weight_NE, overlaps)
        if routing is not None:
            routing.entries.append(
                Routing(
                    layer=self.layer,
                    num_rows=len(x_NC),
                    fires_NE=self.gate.fires_for_gates(x_NC),
                    runs_NE=decision.runs_NE,
                    gram_EE=self.gate.gram(),
                    # Sharded parameters are whole only during the forward.
                    thresholds_E=self.gate.thresholds.detach().clone(),
                    inputs_NC=x_NC.detach(),
                    mask_overlap=torch.stack(overlaps).mean() if overlaps else None,
                )
            )
        return y_NC
