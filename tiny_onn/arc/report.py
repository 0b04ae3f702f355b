"""report.html: one self-contained page that shows every task, both attempts and the truth.

The page needs no network (its content policy forbids any) and no installation. Its HTML, CSS and
script are the files of ``report_page/``; the data goes in as one JSON block. What a task counts as
is decided here, so that the page only draws.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from tiny_onn.arc.parse import grid_problem
from tiny_onn.arc.score_report import ScoreReport
from tiny_onn.arc.submission import ATTEMPT_KEYS, PlainGrid
from tiny_onn.arc.task import Grid, Task
from tiny_onn.errors import UserError
from tiny_onn.files import write_output

OUTCOMES = ("solved", "near", "unsolved", "unknown")
"""Of a test output and of a task; ``unknown``: no truth was given."""

NEAR_MISS_SHARE = 0.1
"""A near miss has the right size and at most this share of wrong cells."""


@dataclass(frozen=True)
class AttemptInfo:
    """How an attempt came about.

    Args:
        votes: views that voted for this grid.
        views: views that were asked.
        logprob: log-likelihood of the grid (natural logarithm), None when not measured.
        reason: why the attempt is a fallback; empty when it is a prediction.
    """

    votes: int
    views: int
    logprob: float | None = None
    reason: str = ""


def wrong_cells(attempt: PlainGrid, truth: Grid) -> int | None:
    """Number of cells that differ from ``truth`` (uint8 (H, W)); None when the sizes differ."""
    if (len(attempt), len(attempt[0])) != truth.shape:
        return None
    return int((np.array(attempt, dtype=np.uint8) != truth).sum())


def output_outcome(attempts: Sequence[PlainGrid], truth: Grid | None) -> str:
    """One of OUTCOMES for one test output, from the better attempt."""
    if truth is None:
        return "unknown"
    wrong = [wrong_cells(attempt, truth) for attempt in attempts]
    if 0 in wrong:
        return "solved"
    near = any(count is not None and count <= NEAR_MISS_SHARE * truth.size for count in wrong)
    return "near" if near else "unsolved"


def task_outcome(outcomes: Sequence[str]) -> str:
    """One of OUTCOMES for a task: that of its worst test output; unknown if any is."""
    return max(outcomes, key=OUTCOMES.index)


def render_report(
    path: str | Path,
    challenges: Sequence[Task],
    submission: Mapping[str, Any],
    score: ScoreReport | None = None,
    truths: Mapping[str, Sequence[Grid]] | None = None,
    details: Mapping[str, Sequence[Sequence[AttemptInfo]]] | None = None,
    facts: Mapping[str, str] | None = None,
    title: str = "Tiny-ONN on ARC-AGI",
) -> dict[str, int]:
    """Write the page atomically; returns the number of tasks by outcome.

    Args:
        path: the file to write.
        challenges: the tasks, in the order of the page.
        submission: parsed submission.json; what is missing is shown as missing.
        score: shown as a table at the top.
        truths: task id -> right output of each test input; tasks without are "no truth".
        details: task id -> test input -> one AttemptInfo an attempt.
        facts: run facts by name (checkpoint, commit, views, minutes, fallbacks).
        title: heading of the page.

    Raises:
        UserError: the file cannot be written, or truths and test inputs differ in number.
    """
    truths, details = truths or {}, details or {}
    tasks = [
        _task_record(task, submission.get(task.id), truths.get(task.id), details.get(task.id, ()))
        for task in challenges
    ]
    found = Counter(task["outcome"] for task in tasks)
    counts = {outcome: found[outcome] for outcome in OUTCOMES}
    data = {
        "title": title,
        "facts": [[str(name), str(value)] for name, value in (facts or {}).items()],
        "score": None if score is None else _score_rows(score),
        "counts": counts,
        "tasks": tasks,
    }
    write_output(path, _page(data))
    return counts


def _page(data: Mapping[str, Any]) -> str:
    """The page's files put together; no text of the data can end the script block."""
    folder = files("tiny_onn.arc").joinpath("report_page")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    for mark, part in (
        ("/*STYLE*/", folder.joinpath("page.css").read_text(encoding="utf-8")),
        ("/*SCRIPT*/", folder.joinpath("page.js").read_text(encoding="utf-8")),
        ("/*DATA*/", text),
    ):
        assert page.count(mark) == 1, (mark, page.count(mark))
        page = page.replace(mark, part)
    return page


def _score_rows(score: ScoreReport) -> list[list[Any]]:
    """[rule, meaning, pass@1, pass@2, counts of pass@2], shares from 0 to 1."""
    outputs = f"{score.outputs_right_pass2} of {score.num_outputs} outputs"
    strict = f"{score.tasks_solved_pass2} of {score.num_tasks} tasks"
    return [
        ["Task mean", "mean over tasks", score.task_mean_pass1, score.task_mean_pass2],
        ["Per output", outputs, score.micro_pass1, score.micro_pass2],
        ["Strict", strict, score.strict_pass1, score.strict_pass2],
    ]


def _task_record(
    task: Task,
    entries: Sequence[Mapping[str, PlainGrid]] | None,
    truths: Sequence[Grid] | None,
    details: Sequence[Sequence[AttemptInfo]],
) -> dict[str, Any]:
    if truths is not None and len(truths) != len(task.test_inputs):
        raise UserError(
            f"task '{task.id}': got {len(truths)} solutions, expected {len(task.test_inputs)}, "
            "one per test input; give the solutions of these challenges"
        )
    tests = []
    for test, test_input in enumerate(task.test_inputs):
        entry = entries[test] if entries is not None and test < len(entries) else {}
        truth = None if truths is None else truths[test]
        infos = details[test] if test < len(details) else ()
        attempts = [
            _attempt_record(entry.get(key), truth, infos[rank] if rank < len(infos) else None)
            for rank, key in enumerate(ATTEMPT_KEYS)
        ]
        grids = [entry[key] for key in ATTEMPT_KEYS if grid_problem(entry.get(key)) is None]
        tests.append(
            {
                "input": _code(test_input.tolist()),
                "truth": None if truth is None else _code(truth.tolist()),
                "attempts": attempts,
                "outcome": output_outcome(grids, truth),
            }
        )
    return {
        "id": task.id,
        "demos": [[_code(pair.input.tolist()), _code(pair.output.tolist())] for pair in task.demos],
        "tests": tests,
        "outcome": task_outcome([test["outcome"] for test in tests]),
    }


def _attempt_record(grid: Any, truth: Grid | None, info: AttemptInfo | None) -> dict[str, Any]:
    """``wrong``: None without truth, -1 for a wrong size, else the number of wrong cells."""
    record: dict[str, Any] = {"grid": None, "wrong": None}
    if grid is None:
        record["note"] = "missing"
    elif problem := grid_problem(grid):
        record["note"] = f"malformed: {problem}"
    else:
        record["grid"] = _code(grid)
        if truth is not None:
            wrong = wrong_cells(grid, truth)
            record["wrong"] = -1 if wrong is None else wrong
    if info is not None:
        finite = info.logprob is not None and np.isfinite(info.logprob)
        record["votes"], record["views"] = int(info.votes), int(info.views)
        record["logprob"] = round(float(info.logprob), 3) if finite else None
        record["reason"] = info.reason
    return record


def _code(grid: PlainGrid) -> str:
    """Rows of digits joined by slashes: a tenth of the size of nested lists."""
    return "/".join("".join(map(str, row)) for row in grid)
