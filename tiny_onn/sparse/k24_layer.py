"""The 2:4 masks of one matrix for one or several agents, and a Linear layer that wears them.

In training a mask is drawn anew for every optimizer step (all forwards of a step draw the same); in
evaluation it is the likeliest one. Only a forward that learns (training mode, with gradient) counts
for the activity, so excursions leave no trace.

A training forward is drawn and applied in PyTorch or by the Triton kernels, with the same noise:
the same masks and gradients, but for groups whose two best patterns are equal to rounding.

Shapes: N rows, A agents, O rows of the matrix, I columns, G = I / 4 groups, K = 6 patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.errors import UserError
from tiny_onn.ops import pattern24_kernels
from tiny_onn.sparse import k24
from tiny_onn.sparse.k24_activity import Activity, Statistic
from tiny_onn.sparse.k24_diversity import Kernel, pair_overlap
from tiny_onn.sparse.k24_schedule import ScheduleState


@dataclass(frozen=True)
class PatternSettings:
    """logits: "additive", kappa S M^T, or "free", six learned numbers a group, times kappa.
    alpha_init_std: of alpha (or the free logits) at the start. alpha_rank: of alpha; 0: full.
    statistic, momentum: of the activity. weight_grad: "masked", kept weights only; "straight", all
    of them; "score", kept ones, and all through their score. kernel: of the diversity loss between
    agents; None: not computed."""

    logits: Literal["additive", "free"] = "additive"
    alpha_init_std: float = 0.1
    alpha_rank: int = 0
    statistic: Statistic = "l1"
    momentum: float = 0.99
    weight_grad: Literal["masked", "straight", "score"] = "masked"
    kernel: Kernel | None = None


class PatternMask(nn.Module):
    """Masks of a matrix (O, I) that A agents share, or of a stack (A, O, I), one matrix an agent.

    Args:
        state: the schedule's place, one object for all masks of a model.
        place: number of the mask in its model; its noise is a stream of its own.

    ``backend`` is a name that :func:`tiny_onn.ops.resolve_pattern24` gave; "torch" runs anywhere.

    Raises:
        UserError: columns that 4 does not divide.
    """

    def __init__(
        self,
        settings: PatternSettings,
        state: ScheduleState,
        agents: int,
        rows: int,
        columns: int,
        place: int = 0,
    ) -> None:
        super().__init__()
        if columns % 4:
            raise UserError(
                f"got a matrix of {columns} columns for 2:4 masks; expected a multiple of 4; "
                f"use {columns + -columns % 4}"
            )
        self.settings, self.state, self.place = settings, state, place
        self.agents, self.rows, self.columns = agents, rows, columns
        rank = settings.alpha_rank
        if settings.logits == "free":
            self.free = nn.Parameter(torch.zeros(agents, rows, columns // 4, 6))
        elif rank:
            self.alpha_left = nn.Parameter(torch.zeros(agents, rows, rank))
            self.alpha_right = nn.Parameter(torch.zeros(agents, rank, columns))
        else:
            self.alpha = nn.Parameter(torch.zeros(agents, rows, columns))
        self.activity = Activity(agents, columns, settings.momentum, settings.statistic)
        self.backend = "torch"
        self.track = False
        self.selected: Tensor | None = None
        self.agreement: Tensor | None = None
        self._cached: tuple[tuple, Tensor] | None = None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Agents start apart: alpha (or the free logits) normal, of the settings' spread."""
        for parameter, std in zip(self.parameters(), self._spreads(), strict=True):
            parameter.normal_(0.0, std, generator=generator)

    def _spreads(self) -> list[float]:
        std, rank = self.settings.alpha_init_std, self.settings.alpha_rank
        if rank and self.settings.logits == "additive":  # of a product's sum of ``rank`` terms
            return [(std / rank**0.5) ** 0.5] * 2
        return [std]

    def fresh_agents(self, count: int, generator: torch.Generator) -> dict[Tensor, Tensor]:
        """New values for ``count`` rows (agents) of every parameter, on the CPU."""
        return {
            p: torch.randn(count, *p.shape[1:], generator=generator) * std
            for p, std in zip(self.parameters(), self._spreads(), strict=True)
        }

    def score(self, weight: Tensor) -> Tensor:
        """(A, O, I): see :func:`tiny_onn.sparse.k24.score`."""
        if self.settings.alpha_rank:
            alpha_AOI = k24.wide(self.alpha_left) @ k24.wide(self.alpha_right)
        else:
            alpha_AOI = self.alpha
        learns = self.settings.weight_grad == "score"
        return k24.score(weight, self.activity.value(), alpha_AOI, learns)

    def logits(self, weight: Tensor) -> Tensor:
        """(K, A, O, G) at the schedule's kappa."""
        return self._logits(self._source(weight))

    def _source(self, weight: Tensor) -> Tensor:
        """What logits are made of: free ones (A, O, G, K), or scores (A, O, I)."""
        return k24.wide(self.free) if self.settings.logits == "free" else self.score(weight)

    def _logits(self, source: Tensor) -> Tensor:
        if self.settings.logits == "free":
            return self.state.kappa * source.movedim(-1, 0)
        return k24.pattern_logits(source, self.state.kappa)

    @torch.no_grad()
    def likeliest(self, weight: Tensor) -> Tensor:
        """bool (A, O, I), what evaluation uses."""
        with torch.autocast(weight.device.type, enabled=False):
            if self.settings.logits == "free":
                return k24.likeliest_mask(self.logits(weight))
            return k24.best_mask(self.score(weight))

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The masked weight of every agent (A, O, I), and how much agents' distributions overlap:
        None unless it is a learning forward that is asked for it (``settings.kernel``).

        Args:
            weight: (O, I) or (A, O, I), float.
        """
        if not self.training:
            return self._evaluated(weight), None
        with torch.autocast(weight.device.type, enabled=False):
            seed = self.state.seed * 1009 + self.place
            learns = torch.is_grad_enabled()
            compares = learns and self.settings.kernel is not None and self.agents > 1
            if self.backend == "triton":
                return self._by_kernels(weight, seed, learns, compares)
            logits = self.logits(weight)
            noise = k24.gumbel_noise(logits, seed)
            mask = k24.sample_mask(logits, noise, self.state.tau)
            overlap = pair_overlap(logits, self.settings.kernel) if compares else None
            if learns:
                self._note(mask.detach(), logits.detach())
        return k24.masked(weight, mask, self.settings.weight_grad == "straight"), overlap

    def _by_kernels(
        self, weight: Tensor, seed: int, learns: bool, compares: bool
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`forward` in training; logits are not kept unless someone looks at them."""
        source = self._source(weight)
        kernels, state = pattern24_kernels(), self.state
        draw = kernels.pattern24_free if self.settings.logits == "free" else kernels.pattern24
        straight = self.settings.weight_grad == "straight"
        numbers = (state.kappa, state.tau, k24.noise_key(seed))
        weight_AOI, pattern_AOG = draw(weight, source, *numbers, dense_grad=straight)
        overlap = pair_overlap(self._logits(source), self.settings.kernel) if compares else None
        if learns:
            watched = self._logits(source.detach()) if state.watch else None
            looked_at = self.track or state.watch
            self._note(k24.mask_of(pattern_AOG) if looked_at else None, watched)
        return weight_AOI, overlap

    def _evaluated(self, weight: Tensor) -> Tensor:
        """With the likeliest mask; kept until weights or mode change where nothing is learnt."""
        if torch.is_grad_enabled():
            return k24.masked(weight, self.likeliest(weight))
        tensors = (weight, *self.parameters(), *self.buffers())
        about = tuple((id(t), t._version, t.device, t.dtype) for t in tensors)
        if self._cached is None or self._cached[0] != about:
            self._cached = about, k24.masked(weight, self.likeliest(weight))
        return self._cached[1]

    def train(self, mode: bool = True) -> PatternMask:
        self._cached = None  # sharded weights change without a new version
        return super().train(mode)

    @torch.no_grad()
    def _note(self, mask_AOI: Tensor | None, logits_KAOG: Tensor | None) -> None:
        """What a drawn mask selected, if tracked, and how it agrees, if watched."""
        self._cached = None
        if self.track:
            assert mask_AOI is not None
            selected = mask_AOI > 0
            self.selected = selected if self.selected is None else self.selected | selected
        if self.state.watch:
            assert mask_AOI is not None and logits_KAOG is not None
            best_AOI = k24.likeliest_mask(logits_KAOG)
            same_AOG = (best_AOI == (mask_AOI > 0)).unflatten(-1, (-1, 4)).all(dim=-1)
            self.agreement = same_AOG.float().mean()


class K24Linear(nn.Linear):
    """nn.Linear without bias whose weight wears a 2:4 mask; several agents may share the weight.

    ``pattern`` is a :class:`PatternMask` of (out_features, in_features).
    """

    def __init__(self, in_features: int, out_features: int, pattern: PatternMask) -> None:
        expected = (out_features, in_features)
        if (pattern.rows, pattern.columns) != expected:
            raise ValueError(
                f"got a mask of {(pattern.rows, pattern.columns)} for a weight of {expected}; "
                "expected the same; make them of one size"
            )
        super().__init__(in_features, out_features, bias=False)
        self.pattern = pattern

    def forward(self, x_NI: Tensor, agent_N: Tensor | None = None) -> Tensor:
        """(N, O). ``agent_N``: int64, the agent that each row belongs to; needed where there are
        several.

        Raises:
            ValueError: several agents, and no agent_N.
        """
        agents = self.pattern.agents
        runs_NA = None
        if agents > 1:
            if agent_N is None:
                raise ValueError(
                    f"got no agent_N with {agents} agents; expected each row's agent; give agent_N"
                )
            runs_NA = F.one_hot(agent_N, agents).bool()
        if self.training and torch.is_grad_enabled():
            self.pattern.activity.observe(x_NI.detach(), runs_NA, self.pattern.state.num_rows)
        weight_AOI, _ = self.pattern(self.weight)
        if runs_NA is None:
            return F.linear(x_NI, weight_AOI[0])
        order_N = agent_N.argsort(stable=True)
        sizes = runs_NA.sum(dim=0).tolist()
        parts = zip(x_NI[order_N].split(sizes), weight_AOI.unbind(0), strict=True)
        y_NO = torch.cat([F.linear(rows_RI, weight_OI) for rows_RI, weight_OI in parts])
        return y_NO[order_N.argsort()]
