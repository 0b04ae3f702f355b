"""How long to train: a budget in minutes, epochs or steps, and the schedule that follows it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median_low

from tiny_onn.config.schema import OptimConfig

FINISH_SECONDS = 0.7
"""Kept free after the last step for writing the results and leaving Python (minutes only)."""


def lr_scale(share: float, optim: OptimConfig) -> float:
    """Warm-up, stable, linear decay (WSD), as a factor of the peak learning rate.

    Args:
        share: share of the budget spent, 0 to 1 (clamped).
    """
    share = min(max(share, 0.0), 1.0)
    if share < optim.warmup_share:
        return share / optim.warmup_share
    left = 1.0 - share
    if left >= optim.decay_share:
        return 1.0
    return optim.final_lr_share + (1 - optim.final_lr_share) * left / optim.decay_share


class Budget:
    """Says how far training is and when it ends.

    With minutes, everything since ``started`` counts (start-up too) and the length of the next
    step is predicted by the median of the last ones, so that the last step completes the decay
    and ends nearest to the deadline. With steps, only the number of steps counts, so that a
    resumed run repeats an undisturbed one exactly.

    Args:
        minutes, steps: exactly one is not None.
        started: ``clock()`` when the training command began.
        spent: seconds used by earlier parts of a resumed run.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        minutes: float | None = None,
        steps: int | None = None,
        started: float | None = None,
        spent: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert (minutes is None) != (steps is None), (minutes, steps)
        self.seconds = None if minutes is None else 60.0 * minutes
        self.steps = steps
        self._clock = clock
        self._started = clock() if started is None else started
        self._spent = spent
        self._recent: deque[float] = deque(maxlen=9)
        self._mark: float | None = None
        self._steps_measured = 0
        self.reserve = 0.0
        """Seconds that saving takes, kept free after the last step (minutes only)."""

    def elapsed(self) -> float:
        """Seconds of training wall clock, earlier parts of a resumed run included."""
        return self._spent + self._clock() - self._started

    def begin_step(self) -> None:
        self._mark = self._clock()

    def end_step(self) -> None:
        """The first step of a process (it compiles, allocates) tells nothing of the next."""
        assert self._mark is not None
        if self._steps_measured > 0:
            self._recent.append(self._clock() - self._mark)
        self._steps_measured += 1

    @property
    def step_seconds(self) -> float:
        """Predicted length of the next step; 0 while unknown."""
        return median_low(self._recent) if self._recent else 0.0

    def share(self, elapsed: float, step: int) -> float:
        """Share of the budget at the middle of step number ``step`` (from 0) that begins now."""
        if self.steps is not None:
            return min(1.0, (step + 0.5) / self.steps)
        return min(1.0, (elapsed + self.step_seconds / 2) / self._deadline)

    def done(self, elapsed: float, step: int) -> bool:
        """Whether to stop before step number ``step``."""
        if self.steps is not None:
            return step >= self.steps
        return elapsed + self.step_seconds / 2 >= self._deadline

    def has_time_for(self, seconds: float, elapsed: float) -> bool:
        """Whether something between two steps leaves time for training to end as planned."""
        return self.steps is not None or elapsed + seconds + self.step_seconds < self._deadline

    @property
    def _deadline(self) -> float:
        """Seconds at which steps end: some are kept for saving, at most 1% of the budget."""
        assert self.seconds is not None
        return self.seconds - min(FINISH_SECONDS + self.reserve, 0.01 * self.seconds)

    def seconds_left(self, elapsed: float, step: int) -> float | None:
        """Estimated seconds to the end; None before anything was measured."""
        if self.seconds is not None:
            return max(0.0, self.seconds - elapsed)
        if not self._recent or self.steps is None:
            return None
        return max(0, self.steps - step) * self.step_seconds
