"""From candidates to attempts: rankings without chance.

Every ranking ends in the same deterministic tie-breaks: the earliest view that voted for the
grid, then the grid's own shape and cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiny_onn.arc.task import Grid

VoteRule = Literal["count", "count_then_likelihood", "sum_prob", "aug_score"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A grid some views agree on, in the task's own orientation and colours.

    logprobs: summed log-probability in nats of the tokens, one for each view that voted for it;
    views: the numbers of those views, ascending, in the same order; score: summed log-likelihood
    over the views that all candidates were read in, None where it was not read (aug_score.py).
    """

    grid: Grid
    logprobs: tuple[float, ...]
    views: tuple[int, ...]
    score: float | None = None

    @property
    def count(self) -> int:
        return len(self.views)

    @property
    def logprob_sum(self) -> float:
        return float(np.sum(self.logprobs))

    @property
    def logprob_mean(self) -> float:
        return float(np.mean(self.logprobs))

    @property
    def logprob_max(self) -> float:
        return float(np.max(self.logprobs))

    @property
    def log_sum_prob(self) -> float:
        """Logarithm of the summed probabilities."""
        return float(np.logaddexp.reduce(self.logprobs))


def rank(candidates: Sequence[Candidate], rule: VoteRule) -> list[Candidate]:
    """All candidates, best first.

    count: number of views; count_then_likelihood: ties in it broken by the mean
    log-likelihood; sum_prob: summed probability over the views; aug_score: ``score``, those
    without one last, as count_then_likelihood ranks them.
    """

    def key(candidate: Candidate) -> tuple:
        last = candidate.views[0], candidate.grid.shape, candidate.grid.tobytes()
        if rule == "count":
            return -candidate.count, *last
        if rule == "count_then_likelihood":
            return -candidate.count, -candidate.logprob_mean, *last
        if rule == "sum_prob":
            return -candidate.log_sum_prob, *last
        if rule == "aug_score":
            unread = candidate.score is None
            score = 0.0 if unread else -candidate.score
            return unread, score, -candidate.count, -candidate.logprob_mean, *last
        raise AssertionError(f"unknown vote rule {rule!r}")

    return sorted(candidates, key=key)


def vote(candidates: Sequence[Candidate], k: int = 2, rule: VoteRule = "aug_score") -> list[Grid]:
    """The ``k`` best grids, all different; fewer when there are fewer candidates."""
    chosen: list[Grid] = []
    for candidate in rank(candidates, rule):
        if len(chosen) < k and not any(np.array_equal(candidate.grid, g) for g in chosen):
            chosen.append(candidate.grid)
    return chosen
