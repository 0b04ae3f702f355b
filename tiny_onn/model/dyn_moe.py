"""DynMoE, the sparse feed-forward network (Guo et al., arXiv 2405.14297): gate, then experts.

    y_t = sum over the experts e that run for t of  weight_te * expert_e(x_t)

Which experts run and how they are weighted is the gate's business (gate.py); how many run is
between none and all of them, for each token by itself. A drop-in for SwiGLU.

Shapes: N tokens, E experts, C width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tiny_onn.config.schema import MoeConfig
from tiny_onn.model.experts import Experts
from tiny_onn.model.gate import CosineGate


@dataclass(frozen=True)
class Routing:
    """What one DynMoE layer did in one forward; tensors only, so that nothing waits for a device.

    layer: number of its block. num_rows: rows that are real tokens; the rest are filler.
    fires_NE: 0 or 1, experts above threshold, before any fallback; differentiable in the gate's
    parameters (float). runs_NE: bool, what was executed. gram_EE: cosines of the prototypes,
    differentiable. thresholds_E, inputs_NC: what the gate compared, without gradient.
    """

    layer: int
    num_rows: int
    fires_NE: Tensor
    runs_NE: Tensor
    gram_EE: Tensor
    thresholds_E: Tensor
    inputs_NC: Tensor


class RoutingLog:
    """Collects what the layers of one forward did, in the order in which they ran.

    No list by itself: FSDP hands a module copies of the lists among its arguments.
    """

    def __init__(self) -> None:
        self.entries: list[Routing] = []


class DynMoE(nn.Module):
    """``layer`` is the number of the block that it stands in."""

    def __init__(self, width: int, config: MoeConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.gate = CosineGate(
            width, config.experts, config.target_active, config.none_active, config.combine
        )
        self.experts = Experts(width, config.expert_width, config.experts)

    def forward(self, x_NC: Tensor, routing: RoutingLog | None = None) -> Tensor:
        """(N, C). What was routed where is added to ``routing``, with all rows as real ones."""
        decision = self.gate(x_NC)
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
                )
            )
        return self.experts(x_NC, decision.runs_NE, decision.weight_NE)
