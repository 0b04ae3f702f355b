"""The loss of many steps, watched without waiting for the accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


class LossMonitor:
    """Mean loss and the first step that was not finite, without waiting for the accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._count = 0

    def add(self, step: int, loss: Tensor, told: Tensor | None = None) -> None:
        """``loss`` is what must be finite; ``told``, by default the same, is what is averaged."""
        self._sum += loss if told is None else told
        self._count += 1
        bad = (self._first_bad < 0) & ~torch.isfinite(loss)
        self._first_bad = torch.where(bad, step, self._first_bad)

    def first_bad(self) -> int:
        """Step number, or -1. Waits for the accelerator."""
        return int(self._first_bad)

    def take_mean(self) -> float:
        """Mean since the last call. Waits for the accelerator."""
        mean = float(self._sum) / max(1, self._count)
        self._sum.zero_()
        self._count = 0
        return mean
