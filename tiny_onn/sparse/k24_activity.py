"""How large the inputs of a matrix are, column by column and agent by agent: a moving average.

    total <- momentum * total + (1 - momentum) * batch        of mean |x| (l1) or mean x^2 (l2)
    weight <- momentum * weight + (1 - momentum)
    activity = total / weight, for l2 its square root         (bias-corrected as in Adam)

Rows are collected in as many forwards as an optimizer step has and count once at its end, so that
the average does not depend on how a batch is cut up (but where only some rows are looked at: see
tiny_onn/model/experts.py). An agent that no row reached stays as it is.
With l2 it is Wanda's norm (arXiv 2306.11695) but for a factor that masks do not depend on.

Shapes: N rows, A agents, I columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Statistic = Literal["l1", "l2"]


class Activity(nn.Module):
    """``total_AI`` and ``weight_A`` are buffers, saved with the weights: masks depend on them."""

    def __init__(self, agents: int, columns: int, momentum: float, statistic: Statistic) -> None:
        super().__init__()
        self.momentum, self.statistic = momentum, statistic
        self.register_buffer("total_AI", torch.zeros(agents, columns))
        self.register_buffer("weight_A", torch.zeros(agents))
        self._pending: Tensor | None = None

    @torch.no_grad()
    def observe(
        self, x_NI: Tensor, runs_NA: Tensor | None = None, num_rows: int | None = None
    ) -> None:
        """Count rows of one forward for the step at hand.

        Args:
            runs_NA: bool, which agents each row is for; None: all of them.
            num_rows: rows that count; the rest are filler.
        """
        size_NI = self._size(x_NI[:num_rows])
        with torch.autocast(x_NI.device.type, enabled=False):
            if runs_NA is None:
                sum_AI = size_NI.sum(dim=0).expand(len(self.total_AI), -1)
                self._add(sum_AI, torch.full_like(sum_AI[:, 0], len(size_NI)))
            else:
                runs_AN = runs_NA[:num_rows].to(size_NI.dtype).T
                self._add(runs_AN @ size_NI, runs_AN.sum(dim=1))

    @torch.no_grad()
    def observe_each(self, x_ANI: Tensor, runs_NA: Tensor) -> None:
        """As :meth:`observe`, of rows that are different ones for each agent."""
        runs_AN = runs_NA.to(self.total_AI.dtype).T
        self._add((self._size(x_ANI) * runs_AN.unsqueeze(2)).sum(dim=1), runs_AN.sum(dim=1))

    def _size(self, x: Tensor) -> Tensor:
        x = x.to(self.total_AI.dtype)
        return x.abs() if self.statistic == "l1" else x.square()

    def _add(self, sum_AI: Tensor, count_A: Tensor) -> None:
        found = torch.cat([sum_AI, count_A.unsqueeze(1)], dim=1)
        self._pending = found if self._pending is None else self._pending + found

    def take(self) -> Tensor:
        """(A, I + 1): the step's sums and, last, its rows; to be added up over processes and given
        to :meth:`commit`. Nothing is pending after."""
        found, self._pending = self._pending, None
        agents, columns = self.total_AI.shape
        return self.total_AI.new_zeros(agents, columns + 1) if found is None else found

    @torch.no_grad()
    def commit(self, found: Tensor, reset_ratio: float | None = None) -> None:
        """End of an optimizer step: what :meth:`take` found enters the average.

        ``reset_ratio``: soft reset, the average moves by that share to the batch's.
        """
        sum_AI, count_A = found[:, :-1], found[:, -1]
        seen_A = count_A > 0
        batch_AI = sum_AI / count_A.clamp(min=1).unsqueeze(1)
        if reset_ratio is None:
            total_AI = torch.lerp(batch_AI, self.total_AI, self.momentum)
            weight_A = self.momentum * self.weight_A + (1 - self.momentum)
        else:
            ratio_A1 = torch.where(self.weight_A > 0, reset_ratio, 1.0).unsqueeze(1).to(batch_AI)
            total_AI = torch.lerp(self._mean(), batch_AI, ratio_A1)
            weight_A = torch.ones_like(self.weight_A)
        self.total_AI.copy_(torch.where(seen_A.unsqueeze(1), total_AI, self.total_AI))
        self.weight_A.copy_(torch.where(seen_A, weight_A, self.weight_A))

    @torch.no_grad()
    def forget(self, agents: list[int]) -> None:
        """These agents are begun anew, as if they had met no row."""
        self.total_AI[agents] = 0
        self.weight_A[agents] = 0
        if self._pending is not None:
            self._pending[agents] = 0

    def _mean(self) -> Tensor:
        tiny = torch.finfo(self.weight_A.dtype).tiny
        return self.total_AI / self.weight_A.clamp(min=tiny).unsqueeze(1)

    @torch.no_grad()
    def value(self) -> Tensor:
        """(A, I); all ones for an agent that has met no row."""
        mean_AI = self._mean()
        mean_AI = mean_AI.sqrt() if self.statistic == "l2" else mean_AI
        return torch.where(self.weight_A.unsqueeze(1) > 0, mean_AI, 1.0)
