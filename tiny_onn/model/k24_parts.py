"""What makes the weights of a model 2:4 sparse.

For weights=k24 that is what its masks have in common: settings, schedule, numbers.
"""

from __future__ import annotations

from dataclasses import replace

from tiny_onn.config.schema_24 import K24Config
from tiny_onn.sparse.k24_layer import K24Linear, PatternMask, PatternSettings
from tiny_onn.sparse.k24_schedule import K24Schedule, ScheduleState
from tiny_onn.sparse.masked_linear import MaskedLinear, RandomMaskLinear, SoftThresholdLinear

ALONE_STD, SHARED_STD = 0.1, 1.0
"""How far alphas are spread at the start. Masks of agents with one weight overlap by 0.97 at 0.1,
by 0.77 at 1 (0.5 at random); of a single agent the weights' sizes may speak."""


class K24Parts:
    """Makes the masks of a model, numbered in the order in which they are asked for.

    ``state`` is the schedule that all of them read.
    """

    def __init__(self, config: K24Config) -> None:
        self.settings = PatternSettings(
            logits=config.logits,
            alpha_rank=config.alpha_rank if config.logits == "additive" else 0,
            statistic=config.act_stat,
            momentum=config.momentum,
            weight_grad=config.weight_grad,
            kernel=config.div_kernel if config.div_coef else None,
        )
        self.state = ScheduleState(
            K24Schedule(
                (config.kappa_start, config.kappa_end),
                (config.tau_start, config.tau_middle, config.tau_end),
                config.phase_split,
            )
        )
        self._std = config.alpha_init_std
        self._made = 0

    def pattern(self, agents: int, rows: int, columns: int, shared: bool = False) -> PatternMask:
        """Masks of a matrix (``shared`` by several agents), or stack, whose rows have ``columns``
        entries."""
        self._made += 1
        std = self._std
        if std is None:
            std = SHARED_STD if shared else ALONE_STD
        kernel = self.settings.kernel if shared else None  # others need no other masks to differ
        settings = replace(self.settings, alpha_init_std=std, kernel=kernel)
        return PatternMask(settings, self.state, agents, rows, columns, self._made - 1)

    def linear(self, columns: int, rows: int) -> K24Linear:
        """nn.Linear(columns, rows, bias=False) under a mask."""
        return K24Linear(columns, rows, self.pattern(1, rows, columns))


class FixedParts:
    """What gives an FFN 2:4 weights without learnt masks: ``kind`` makes its layers."""

    def __init__(self, kind: type[MaskedLinear]) -> None:
        self.kind = kind

    def linear(self, columns: int, rows: int) -> MaskedLinear:
        """nn.Linear(columns, rows, bias=False) with sparse weights."""
        return self.kind(columns, rows)


SparseParts = K24Parts | FixedParts


def sparse_parts(weights: str, config: K24Config) -> SparseParts | None:
    """Of a model with ``model.weights=weights``; None: its weights are dense."""
    if weights == "k24":
        return K24Parts(config)
    if weights == "s_ste":
        return FixedParts(SoftThresholdLinear)
    if weights == "random24":
        return FixedParts(RandomMaskLinear)
    return None
