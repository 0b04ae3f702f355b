"""kappa, which settles the masks, and tau, which shapes their gradient, over a run.

    kappa: geometric from kappa[0] to kappa[1] over the whole schedule
    tau: geometric from tau[0] to tau[1] up to phase_split, from tau[1] to tau[2] after it

Both are functions of the progress alone, so there is nothing to save: a resumed run is where it
was. Progress is the share of the optimizer steps (``k24.schedule_steps``, or ``budget.steps``);
under ``budget.minutes`` without ``schedule_steps`` it is that of the minutes spent, which is saved.
"""

from __future__ import annotations

from dataclasses import dataclass


def geometric(start: float, end: float, share: float) -> float:
    """From ``start`` at 0 to ``end`` at 1, by equal factors; exact at both ends."""
    if share <= 0 or share >= 1:
        return start if share <= 0 else end
    return start * (end / start) ** share


@dataclass(frozen=True)
class K24Schedule:
    """Raises ValueError for numbers that are not above 0 or a split outside (0, 1)."""

    kappa: tuple[float, float] = (1.0, 16.0)
    tau: tuple[float, float, float] = (5.0, 1.0, 0.1)
    phase_split: float = 0.5

    def __post_init__(self) -> None:
        if min(*self.kappa, *self.tau) <= 0:
            raise ValueError(
                f"got kappa={self.kappa}, tau={self.tau}; expected numbers above 0; see "
                "k24.kappa_start and k24.tau_start"
            )
        if not 0 < self.phase_split < 1:
            raise ValueError(
                f"got phase_split={self.phase_split}; expected between 0 and 1; see k24.phase_split"
            )

    def kappa_at(self, progress: float) -> float:
        """At a share of the run, from 0 to 1."""
        return geometric(*self.kappa, progress)

    def tau_at(self, progress: float) -> float:
        """At a share of the run, from 0 to 1; continuous at the split."""
        start, middle, end = self.tau
        if progress < self.phase_split:
            return geometric(start, middle, progress / self.phase_split)
        return geometric(middle, end, (progress - self.phase_split) / (1 - self.phase_split))


class ScheduleState:
    """What all masks of a model read in a forward: one object, set between steps.

    kappa, tau: of the step. seed: of its noise. num_rows: rows of the coming layer's input that are
    real (None: all). watch: whether layers note how far samples agree with argmax.
    """

    def __init__(self, schedule: K24Schedule | None = None) -> None:
        self.schedule = schedule or K24Schedule()
        self.seed = 0
        self.num_rows: int | None = None
        self.watch = False
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Where in the schedule the coming step is, from 0 to 1."""
        self.kappa = self.schedule.kappa_at(progress)
        self.tau = self.schedule.tau_at(progress)

    def set_step(self, step: int, steps: int) -> None:
        """The same by optimizer steps: number ``step`` (from 0) of ``steps``."""
        self.set_progress(min(1.0, step / max(1, steps)))
