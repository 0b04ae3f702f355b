"""How long the runs that are left will take, by those that were timed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Protocol

from tiny_onn.clock import clock_text
from tiny_onn.sweep.children import Planned
from tiny_onn.sweep.tables import Result

OVERHEAD_S = 30.0
"""A run's hold-out and measurement, until one was timed."""


class Length(Protocol):
    """Budget of a run. minutes: None where it is none of time."""

    @property
    def name(self) -> str: ...

    @property
    def minutes(self) -> float | None: ...


class TimedRun(Planned, Protocol):
    """A run of an arm whose result says ``minutes_command``, and the same names as here."""

    @property
    def arm(self) -> str: ...

    @property
    def tag(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def budget(self) -> Length: ...


def expected_seconds(run: TimedRun, results: Sequence[Result]) -> float | None:
    """Of one run, by those of the same budget: its own arm's, else all arms'; None: unknown."""
    circumstances = (run.budget.name, run.threads, run.jobs)
    alike = [r for r in results if (r["budget"], r["threads"], r["jobs"]) == circumstances]
    own = [r for r in alike if (r["arm"], r["tag"]) == (run.arm, run.tag)]
    if own or (alike and run.budget.minutes is None):
        return 60 * fmean(r["minutes_command"] for r in own or alike)
    return None if run.budget.minutes is None else 60 * run.budget.minutes + OVERHEAD_S


def eta_seconds(runs: Sequence[TimedRun], results: Sequence[Result]) -> float | None:
    """Of all these runs, jobs at once; None while one's length is unknown."""
    seconds = [expected_seconds(run, results) for run in runs]
    if None in seconds:
        return None
    free_at = [0.0] * max((run.jobs for run in runs), default=1)
    for length in seconds:
        free_at[free_at.index(min(free_at))] += length or 0.0
    return max(free_at)


def progress(number: int, runs: Sequence[TimedRun], results: Sequence[Result]) -> str:
    """The line before run ``number`` (from 0)."""
    run, left = runs[number], runs[number:]
    return (
        f"run {number + 1} of {len(runs)}: {run.label}, {run.budget.name}, seed {run.seed}; "
        f"{len(left)} left, ETA {clock_text(eta_seconds(left, results))}"
    )
