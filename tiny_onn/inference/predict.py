"""Every test input in many views: decode, undo the view, collect what the views agree on.

Views come in rounds: a round adds the same number of views to every test input, and is one
global list of prompts, decoded shortest first. With ``predict.minutes`` the rounds grow as the
measured speed allows and stop in time; without, there is one round of ``predict.views``.
"""

from __future__ import annotations

import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tiny_onn.arc.task import Grid, Task
from tiny_onn.arc.tokens import MAX_DOCUMENT, Document
from tiny_onn.arc.view import View, invert, sample_views
from tiny_onn.config.schema import PredictConfig
from tiny_onn.errors import UserError
from tiny_onn.inference.aug_score import with_scores
from tiny_onn.inference.excursion import Precision
from tiny_onn.inference.generate import Decoder, Generation, generate_batches
from tiny_onn.inference.prompt import Context, encode_query
from tiny_onn.inference.size_rule import Size, output_sizes, size_under
from tiny_onn.inference.vote import Candidate

MAX_TIMED_VIEWS = 512
"""Most views per task when only minutes are given; voting saturates earlier."""

RESERVE = 0.02
"""Share of the minutes left unused, for the work around decoding."""

SCORE_SHARE = 0.3
"""Share of the minutes kept for reading candidates anew (vote=aug_score)."""

ROUND_GROWTH = 4
"""A timed round has at most this many times the views of all rounds before it."""


@dataclass(frozen=True)
class Progress:
    """How far prediction is. total: prompts of the planned rounds; seconds_left: an estimate."""

    done: int
    total: int
    seconds: float
    seconds_left: float
    views: int


@dataclass
class PredictStats:
    """What prediction did. views: rounds completed for every test input (its task may have fewer
    different ones: fewest_views); score_views: those that candidates were read in, which took
    score_seconds of all seconds (vote=aug_score); failures: reason -> outputs that were no grid."""

    num_tasks: int = 0
    num_outputs: int = 0
    views: int = 0
    fewest_views: int = 0
    num_prompts: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    score_views: int = 0
    score_seconds: float = 0.0
    sized_outputs: int = 0
    input_copies: int = 0
    unknown_tasks: int = 0
    discarded_prompts: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def num_failures(self) -> int:
        return sum(self.failures.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """candidates: task id -> test input -> candidates in order of their earliest view; sizes: the
    size rule's answer for each, None where it has none or is switched off; num_views: task id ->
    views that every test input of it was asked in."""

    candidates: dict[str, list[list[Candidate]]]
    sizes: dict[str, list[Size | None]]
    num_views: dict[str, int]
    stats: PredictStats


@dataclass(frozen=True)
class _Job:
    """One test input in one view. task: number in the list of tasks; view: number in its views."""

    task: int
    test: int
    view: int


def check_predict(predict: PredictConfig) -> None:
    """Refuse settings that cannot work.

    Raises:
        UserError: no views and no minutes, or one that is not positive; an empty batch.
    """
    if predict.views is None and predict.minutes is None:
        raise UserError(
            "got predict.views=null without predict.minutes, expected one of them; "
            "set predict.views=16"
        )
    for name in ("views", "minutes", "batch_tokens", "score_views"):
        value = getattr(predict, name)
        if value is not None and not value > 0:
            raise UserError(f"got predict.{name}={value}, expected more than 0; raise it")
    if predict.size_rule and not predict.grammar:
        raise UserError(
            "got predict.size_rule=true with predict.grammar=false, expected the grammar on: it "
            "is what keeps a size; set predict.size_rule=false"
        )


def predict_tasks(
    model: Decoder,
    tasks: Sequence[Task],
    task_rows: Mapping[str, int],
    predict: PredictConfig,
    seed: int,
    *,
    context: Context = "pair",
    max_tokens: int = MAX_DOCUMENT,
    precision: Precision = "fp32",
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Prediction:
    """Candidates for every test input of ``tasks``; deterministic in the seed for given views.

    Args:
        model: ``nn.Module`` with ``prefill`` and ``step``, on its device.
        task_rows: task id -> row of its vector; a task not in it gets the zero vector.
        predict: views, minutes, grammar, size rule, what is dropped.
        seed: seeds the choice of views, for each task by its id alone.
        context, max_tokens: "demos" puts the demonstrations before the query, as many as fit,
            as the model was trained.
        clock: seconds, monotonic; only consulted for ``predict.minutes`` and reports.
        report: called after every batch.

    Raises:
        UserError: see :func:`check_predict`.
    """
    check_predict(predict)
    run = _Run(
        model, tasks, task_rows, predict, seed, context, max_tokens, precision, clock, report
    )
    run.all_rounds()
    prediction = run.prediction()
    return run.scored(prediction) if predict.vote == "aug_score" else prediction


def task_views(task: Task, count: int, seed: int) -> list[View]:
    """The views of ``task``: identity first, a function of seed, count and the task's id."""
    rng = np.random.default_rng([seed, zlib.crc32(task.id.encode())])
    return sample_views(task, count, rng)


class _Run:
    """The state of one prediction: outputs so far, and the time they took."""

    def __init__(
        self,
        model: Decoder,
        tasks: Sequence[Task],
        task_rows: Mapping[str, int],
        predict: PredictConfig,
        seed: int,
        context: Context,
        max_tokens: int,
        precision: Precision,
        clock: Callable[[], float],
        report: Callable[[Progress], None],
    ) -> None:
        self.model, self.tasks, self.predict = model, tasks, predict
        self.context, self.max_tokens, self.precision = context, max_tokens, precision
        self.clock, self.report = clock, report
        self.began = clock()
        reserve = RESERVE + SCORE_SHARE * (predict.vote == "aug_score")
        self.limit = None if predict.minutes is None else predict.minutes * 60 * (1 - reserve)
        self.rows = [task_rows.get(task.id, -1) for task in tasks]
        self.most_views = MAX_TIMED_VIEWS if predict.views is None else predict.views
        self.views = [task_views(task, self.most_views, seed) for task in tasks]
        self.most_views = max((len(views) for views in self.views), default=0)
        self.sizes: list[list[Size | None]] = [
            output_sizes(task) if predict.size_rule else [None] * len(task.test_inputs)
            for task in tasks
        ]
        self.outputs: dict[tuple[int, int], list[tuple[int, Grid, float]]] = {}
        self.failures: Counter[str] = Counter()
        num_outputs = sum(len(task.test_inputs) for task in tasks)
        self.stats = PredictStats(
            num_tasks=len(tasks),
            num_outputs=num_outputs,
            sized_outputs=sum(size is not None for sizes in self.sizes for size in sizes),
            unknown_tasks=self.rows.count(-1),
        )

    def seconds(self) -> float:
        return self.clock() - self.began

    def all_rounds(self) -> None:
        if self.limit is None:
            self._round(self.most_views)
        else:
            slowest = 0.0
            while count := self._next_count(slowest):
                start = self.seconds()
                if not self._round(count):
                    break
                slowest = max(slowest, (self.seconds() - start) / count)
        self.stats.seconds = self.seconds()

    def _next_count(self, slowest: float) -> int:
        """Views of the next timed round: what surely fits; the first has one, come what may."""
        done = self.stats.views
        if done == 0:
            return min(1, self.most_views)
        assert self.limit is not None
        fits = int((self.limit - self.seconds()) / slowest) if slowest > 0 else self.most_views
        return max(0, min(fits, ROUND_GROWTH * done, self.most_views - done))

    def _round(self, count: int) -> bool:
        """Decode ``count`` more views of everything; False if time ran out (nothing is kept)."""
        done = self.stats.views
        jobs = [
            _Job(t, test, view)
            for view in range(done, done + count)
            for t, task in enumerate(self.tasks)
            if view < len(self.views[t])
            for test in range(len(task.test_inputs))
        ]
        decoded: list[tuple[_Job, Generation]] = []
        longest = 0.0
        start = previous = self.seconds()
        batches = generate_batches(
            self.model,
            [self._prompt(job) for job in jobs],
            [self._size(job) for job in jobs],
            grammar=self.predict.grammar,
            batch_tokens=self.predict.batch_tokens,
            precision=self.precision,
        )
        for indices, generations in batches:
            decoded += [(jobs[i], g) for i, g in zip(indices, generations, strict=True)]
            now = self.seconds()
            longest, previous = max(longest, now - previous), now
            left = len(jobs) - len(decoded)
            self._report(len(decoded), len(jobs), now - start)
            if self.limit is not None and done and left and now + longest > self.limit:
                self.stats.discarded_prompts += len(decoded)
                return False
        self._keep(decoded)
        self.stats.views += count
        return True

    def _report(self, done: int, total: int, seconds: float) -> None:
        now = self.seconds()
        left = seconds / done * (total - done)
        if self.limit is not None and self.predict.views is None:
            left = max(left, self.limit - now)
        self.report(Progress(done, total, now, left, self.stats.views))

    def _prompt(self, job: _Job) -> Document:
        task, view = self.tasks[job.task], self.views[job.task][job.view]
        return encode_query(
            task,
            task.test_inputs[job.test],
            row=self.rows[job.task],
            view=view,
            context=self.context,
            max_tokens=self.max_tokens,
            size=self.sizes[job.task][job.test],
        )

    def _size(self, job: _Job) -> Size | None:
        return size_under(self.views[job.task][job.view], self.sizes[job.task][job.test])

    def _keep(self, decoded: Sequence[tuple[_Job, Generation]]) -> None:
        for job, generation in decoded:
            self.stats.num_prompts += 1
            self.stats.new_tokens += len(generation.tokens)
            if generation.grid is None:
                self.failures[failure_kind(generation.failure or "")] += 1
                continue
            grid = invert(self.views[job.task][job.view], generation.grid)
            copies = np.array_equal(grid, self.tasks[job.task].test_inputs[job.test])
            if copies and self.predict.drop_input_copies:
                self.stats.input_copies += 1
                continue
            found = self.outputs.setdefault((job.task, job.test), [])
            found.append((job.view, grid, generation.logprob))

    def prediction(self) -> Prediction:
        self.stats.failures = dict(self.failures.most_common())
        num_views = {
            task.id: min(len(views), self.stats.views)
            for task, views in zip(self.tasks, self.views, strict=True)
        }
        self.stats.fewest_views = min(num_views.values(), default=0)
        candidates = {
            task.id: [
                collect(self.outputs.get((t, test), ())) for test in range(len(task.test_inputs))
            ]
            for t, task in enumerate(self.tasks)
        }
        sizes = {task.id: self.sizes[t] for t, task in enumerate(self.tasks)}
        return Prediction(candidates, sizes, num_views, self.stats)

    def scored(self, prediction: Prediction) -> Prediction:
        """The candidates with AugScore's reading of them."""
        began = self.seconds()
        minutes = self.predict.minutes
        end = math.inf if minutes is None else minutes * 60 * (1 - RESERVE)
        candidates, self.stats.score_views = with_scores(
            self.model,
            self.tasks,
            prediction.candidates,
            [views[: self.predict.score_views] for views in self.views],
            self.rows,
            context=self.context,
            max_tokens=self.max_tokens,
            precision=self.precision,
            seconds_left=lambda: end - self.seconds(),
            report=lambda done, total: self._report(done, total, self.seconds() - began),
        )
        self.stats.score_seconds = self.seconds() - began
        self.stats.seconds = self.seconds()
        return replace(prediction, candidates=candidates)


def collect(outputs: Sequence[tuple[int, Grid, float]]) -> list[Candidate]:
    """Join equal grids of (view number, grid, log-probability) into candidates."""
    votes: dict[tuple, list[tuple[int, Grid, float]]] = {}
    for vote in sorted(outputs, key=lambda vote: vote[0]):
        votes.setdefault((vote[1].shape, vote[1].tobytes()), []).append(vote)
    return [
        Candidate(
            grid=same[0][1],
            logprobs=tuple(logprob for _, _, logprob in same),
            views=tuple(view for view, _, _ in same),
        )
        for same in votes.values()
    ]


def failure_kind(message: str) -> str:
    """The message with its numbers blotted out, so that alike failures are counted together."""
    return re.sub(r"\d+", "N", message)
