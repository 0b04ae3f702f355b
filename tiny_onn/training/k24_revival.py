"""Revival of weights that no agent's 2:4 mask has selected for a while.

Of every group two weights are always kept, so a single agent's unselected ones are pruned, not
dead; over several agents they are the ones that nobody uses. Such a position gets a new weight as
large as the selected ones are (root mean square), a new alpha for every agent, and no momentum:
alpha alone could not bring back a weight that has shrunk to nothing (Kaleidoscope, arXiv
2410.08540, begins weights and thresholds anew; here the optimizer's moments follow).

Shapes: A agents, O rows, I columns; a weight is (O, I), or (A, O, I) where agents have their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_onn.sparse.k24_layer import PatternMask
from tiny_onn.training.distributed import set_where, whole
from tiny_onn.training.ema import WeightEma
from tiny_onn.training.optim import MuonAdamW


@torch.no_grad()
def revive(
    pattern: PatternMask,
    weight: Tensor,
    selected_AOI: Tensor,
    share: float,
    generator: torch.Generator,
    optimizer: MuonAdamW,
    ema: WeightEma | None = None,
) -> int:
    """Begin ``share`` of the never selected positions anew, in place; returns how many weights.

    Args:
        selected_AOI: bool, what each agent's masks selected in the window.
        generator: on the CPU; decides alike in every process.
    """
    selected = selected_AOI.cpu()
    if weight.dim() == 2:
        selected = selected.any(dim=0)
    lucky = torch.rand(selected.shape, generator=generator) < share
    chosen = ~selected & lucky
    if not chosen.any():
        return 0
    alive = whole(weight.detach()).cpu()[selected]
    size = float(alive.square().mean().sqrt()) if alive.numel() else weight.shape[-1] ** -0.5
    (alpha,) = pattern.parameters()
    fresh = {
        weight: torch.randn(weight.shape, generator=generator) * size,
        alpha: pattern.fresh_agents(len(alpha), generator)[alpha],
    }
    for parameter, values in fresh.items():
        where = chosen.expand(parameter.shape)
        set_where(parameter, where, values)
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                set_where(moment, where, torch.zeros_like(values))
        if ema is not None:
            ema.adopt_where(parameter, where)
    return int(chosen.sum())
