"""submission.json by the ARC Prize schema: build, write, read, validate.

``{task id: [{"attempt_1": grid, "attempt_2": grid}, one object per test input, in order]}``, grids
as plain lists of int 0 to 9, rectangular, 1 to 30 a side. What is iterated is always the
challenges, never the predictions, so that a missing prediction cannot shift a later answer.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiny_onn.arc.parse import brief, grid_problem, read_json
from tiny_onn.arc.select import select_track
from tiny_onn.arc.sources import load_challenges
from tiny_onn.arc.task import NUM_COLORS, Grid, Task
from tiny_onn.errors import UserError, run_cli
from tiny_onn.files import write_output

ATTEMPT_KEYS = ("attempt_1", "attempt_2")
PlainGrid = list[list[int]]
Submission = dict[str, list[dict[str, PlainGrid]]]


@dataclass(frozen=True)
class Fallback:
    """One attempt that had no prediction and was filled: where (from 0) and why."""

    task: str
    test: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class BuildCounts:
    """What building a submission met. ``fallbacks`` lists every filled attempt."""

    num_tasks: int
    num_outputs: int
    num_attempts: int
    fallbacks: tuple[Fallback, ...]

    @property
    def num_fallbacks(self) -> int:
        return len(self.fallbacks)

    @property
    def by_reason(self) -> dict[str, int]:
        """Number of filled attempts by reason, the most frequent first."""
        return dict(Counter(fallback.reason for fallback in self.fallbacks).most_common())

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_tasks": self.num_tasks,
            "num_outputs": self.num_outputs,
            "num_attempts": self.num_attempts,
            "num_fallbacks": self.num_fallbacks,
            "by_reason": self.by_reason,
        }

    def render(self) -> str:
        """One line for people."""
        line = f"{self.num_tasks} tasks, {self.num_outputs} outputs, {self.num_attempts} attempts"
        if not self.fallbacks:
            return f"{line}, no fallback"
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.by_reason.items())
        return f"{line}, {self.num_fallbacks} fallbacks ({reasons})"


def plain_grid(grid: Grid | Sequence[Sequence[Any]], where: str = "grid") -> PlainGrid:
    """``grid`` as lists of plain Python ints; numpy integers are converted, nothing is rounded.

    Raises:
        UserError: not a rectangular grid of integers 0 to 9, 1 to 30 a side.
    """
    if isinstance(grid, np.ndarray):
        if grid.ndim != 2 or not np.issubdtype(grid.dtype, np.integer):
            raise UserError(
                f"{where}: got an array of shape {grid.shape} and dtype {grid.dtype}, expected "
                "a two-dimensional integer array; check the decoder"
            )
        rows: Any = grid.tolist()
    else:
        rows = [
            [int(cell) if isinstance(cell, np.integer) else cell for cell in row] for row in grid
        ]
    problem = grid_problem(rows)
    if problem:
        raise UserError(f"{where}: {problem}; check the decoder")
    return rows


def filler_grid(test_input: Grid, taken: Sequence[PlainGrid]) -> PlainGrid:
    """A deterministic stand-in: the input's size in one colour, different from ``taken``."""
    height, width = test_input.shape
    for color in range(NUM_COLORS):
        filler = [[color] * width for _ in range(height)]
        if filler not in taken:
            return filler
    raise AssertionError(f"more than {NUM_COLORS - 1} attempts taken: {len(taken)}")


def build_submission(
    challenges: Sequence[Task],
    attempts: Mapping[str, Sequence[Sequence[Grid | Sequence[Sequence[int]]]]],
) -> tuple[Submission, BuildCounts]:
    """Two different attempts for every test input of every challenge.

    Args:
        challenges: the tasks to answer, which decide what the submission holds.
        attempts: task id -> test input -> ranked grids (the first two distinct ones are used;
            fewer, or a missing task or test, are filled by :func:`filler_grid` and counted).

    Raises:
        UserError: an attempt that is no grid, a predicted task that is no challenge, more
            predicted test inputs than the challenge has, or an id twice among the challenges.
    """
    submission: Submission = {}
    fallbacks: list[Fallback] = []
    known = {task.id for task in challenges}
    strangers = sorted(set(attempts) - known)
    if strangers:
        raise UserError(
            f"got attempts for task '{strangers[0]}' ({len(strangers)} such), expected only the "
            f"{len(known)} tasks of the challenges; predict with the same challenges file"
        )
    for task in challenges:
        if task.id in submission:
            raise UserError(
                f"got task '{task.id}' twice among the challenges, expected distinct ids; drop one"
            )
        ranked_tests = attempts.get(task.id)
        if ranked_tests is not None and len(ranked_tests) > len(task.test_inputs):
            raise UserError(
                f"task '{task.id}': got attempts for {len(ranked_tests)} test inputs, expected "
                f"{len(task.test_inputs)}; predict with the same challenges file"
            )
        entries = []
        for test, test_input in enumerate(task.test_inputs):
            chosen, reason = _choose(task.id, test, ranked_tests)
            while len(chosen) < len(ATTEMPT_KEYS):
                fallbacks.append(Fallback(task.id, test, len(chosen), reason))
                chosen.append(filler_grid(test_input, chosen))
            entries.append(dict(zip(ATTEMPT_KEYS, chosen, strict=True)))
        submission[task.id] = entries
    num_outputs = sum(len(entries) for entries in submission.values())
    counts = BuildCounts(
        num_tasks=len(submission),
        num_outputs=num_outputs,
        num_attempts=num_outputs * len(ATTEMPT_KEYS),
        fallbacks=tuple(fallbacks),
    )
    return submission, counts


def _choose(task_id: str, test: int, ranked_tests: Sequence | None) -> tuple[list[PlainGrid], str]:
    """The first two distinct grids, and the reason to give if there are fewer."""
    if ranked_tests is None:
        return [], "task not predicted"
    if test >= len(ranked_tests):
        return [], "test input not predicted"
    chosen: list[PlainGrid] = []
    for rank, grid in enumerate(ranked_tests[test]):
        plain = plain_grid(grid, f"task '{task_id}' test {test} attempt {rank + 1}")
        if plain not in chosen and len(chosen) < len(ATTEMPT_KEYS):
            chosen.append(plain)
    return chosen, "only one distinct grid" if chosen else "no valid grid"


def write_submission(path: str | Path, submission: Submission) -> None:
    """Write ``submission`` as compact JSON, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    write_output(path, json.dumps(submission, separators=(",", ":")) + "\n")


def find_problems(submission: object, challenges: Sequence[Task]) -> list[str]:
    """Every way in which ``submission`` fails the schema; each names task, test and attempt."""
    if not isinstance(submission, dict):
        return [f"got {brief(submission)}, expected an object from task id to answers"]
    problems: list[str] = []
    for task in challenges:
        if task.id not in submission:
            problems.append(f"task '{task.id}': missing, expected one entry per challenge")
            continue
        entries = submission[task.id]
        num_tests = len(task.test_inputs)
        if not isinstance(entries, list):
            problems.append(f"task '{task.id}': got {brief(entries)}, expected a list of answers")
            continue
        if len(entries) != num_tests:
            problems.append(
                f"task '{task.id}': got {len(entries)} answers, expected {num_tests}, one per "
                "test input"
            )
        for test, entry in enumerate(entries):
            problems.extend(_entry_problems(f"task '{task.id}' test {test}", entry))
    known = {task.id for task in challenges}
    for task_id in submission:
        if task_id not in known:
            problems.append(f"task '{task_id}': not among the challenges, expected no such entry")
    return problems


def _entry_problems(where: str, entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{where}: got {brief(entry)}, expected an object with attempt_1 and attempt_2"]
    problems = []
    for key in ATTEMPT_KEYS:
        if key not in entry:
            problems.append(f"{where} {key}: missing, expected a grid")
        elif problem := grid_problem(entry[key]):
            problems.append(f"{where} {key}: {problem}")
    for key in entry:
        if key not in ATTEMPT_KEYS:
            problems.append(f"{where}: got key {brief(key)}, expected only attempt_1, attempt_2")
    return problems


def validate_submission(submission: object, challenges: Sequence[Task]) -> None:
    """Check ``submission`` against ``challenges``.

    Raises:
        UserError: the first problem, and how many more there are.
    """
    problems = find_problems(submission, challenges)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; write the submission again for these challenges")


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tiny_onn.arc.submission SUBMISSION CHALLENGES [--track nano]``: 0 or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny_onn.arc.submission", description="Validate a submission file."
    )
    parser.add_argument("submission", help="submission.json")
    parser.add_argument("challenges", help="challenges file, or arc1:evaluation and the like")
    parser.add_argument("--track", choices=("all", "nano"), default="all", help="expect these only")
    args = parser.parse_args(argv)
    submission = read_json(args.submission, "a submission file")
    challenges = select_track(load_challenges(args.challenges), args.track)
    validate_submission(submission, challenges)
    outputs = sum(len(task.test_inputs) for task in challenges)
    print(f"valid: {len(challenges)} tasks, {outputs} outputs, {2 * outputs} attempts")
    return 0


if __name__ == "__main__":
    run_cli(main)
