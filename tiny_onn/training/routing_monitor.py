"""The routing of many steps, watched without waiting for the accelerator.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_onn.losses.sdl import SDLTerms
from tiny_onn.training.routing import StepRouting


class RoutingMonitor:
    """Sums since the last log line, and executed pairs since they were last taken."""

    def __init__(self) -> None:
        self._layers: tuple[int, ...] = ()
        self._steps = 0
        self._pairs: Tensor | int = 0
        self._sums: list[Tensor] = []
        self._sdl: Tensor | None = None
        self._thresholds_LE: Tensor | None = None

    def add(self, step: StepRouting, sdl: SDLTerms | None) -> None:
        """One more step; ``sdl`` is None where SDL is off."""
        if sdl is not None:
            terms = torch.stack(list(sdl))
            self._sdl = terms if self._sdl is None else self._sdl + terms
        new = [step.active_LE, step.tokens_L, step.none_L]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new
        self._pairs = self._pairs + step.pairs_L.sum()
        self._thresholds_LE, self._layers = step.thresholds_LE, step.layers
        self._steps += 1

    def take_pairs(self) -> int:
        """Executed pairs (token, expert) of all layers since the last call. Waits."""
        pairs, self._pairs = int(self._pairs), 0
        return pairs

    def take_metrics(self) -> dict[str, float]:
        """What the log says of the steps since the last call; {} without any. Waits.

        By layer: mean active experts, share of tokens with none, experts that fired for no token,
        thresholds, and every expert's share of the tokens (the load histogram). SDL's terms, unless
        it is off: then nobody has looked, and 0 would say that all is at its target.
        """
        if not self._steps:
            return {}
        active_LE, tokens_L, none_L = (t.double().cpu() for t in self._sums)
        load_LE = active_LE / tokens_L.clamp(min=1).unsqueeze(1)
        metrics: dict[str, float] = {}
        for row, layer in enumerate(self._layers):
            thresholds_E = self._thresholds_LE[row].double().cpu()
            metrics |= {
                f"moe/active_{layer}": float(load_LE[row].sum()),
                f"moe/none_{layer}": float(none_L[row] / tokens_L[row].clamp(min=1)),
                f"moe/dead_{layer}": float((active_LE[row] == 0).sum()),
                f"moe/threshold_mean_{layer}": float(thresholds_E.mean()),
                f"moe/threshold_min_{layer}": float(thresholds_E.min()),
                f"moe/threshold_max_{layer}": float(thresholds_E.max()),
            }
            for expert, share in enumerate(load_LE[row].tolist()):
                metrics[f"moe/load_{layer}_{expert}"] = share
        if self._sdl is not None:
            sparsity, diversity = (self._sdl / self._steps).tolist()
            metrics |= {"sdl/sparsity": sparsity, "sdl/diversity": diversity}
        self._sums, self._sdl, self._steps = [], None, 0
        return metrics
