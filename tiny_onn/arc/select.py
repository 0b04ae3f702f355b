"""Which tasks take part: a file of ids, and track nano."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from tiny_onn.arc.task import Task, TrainingTask
from tiny_onn.arc.tokens import grid_length, longest_orientation
from tiny_onn.errors import UserError

NANO_TOKENS = 192
"""Longest pair of track nano, in its longer orientation."""

NANO_IDS_FILE = Path(__file__).with_name("nano_ids.json")


def read_ids(path: str | Path) -> list[str]:
    """Task ids, one a line; blank lines and lines that start with # are skipped.

    Raises:
        UserError: the file cannot be read, is empty, or names an id twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"cannot read '{path}' ({reason}); expected one task id a line; set data.ids"
        ) from error
    ids = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not ids:
        raise UserError(f"'{path}': got no task ids, expected one a line; set data.ids")
    for task_id in ids:
        if ids.count(task_id) > 1:
            raise UserError(f"'{path}': got id '{task_id}' twice, expected it once; remove one")
    return ids


def check_ids(ids: Collection[str], known: Collection[str], path: str | Path) -> None:
    """Every one of ``ids`` must be known.

    Raises:
        UserError: names the first unknown id and the nearest known one.
    """
    unknown = [task_id for task_id in ids if task_id not in known]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], list(known), n=1, cutoff=0.0)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise UserError(
            f"'{path}': got {len(unknown)} unknown ids, first '{unknown[0]}', expected ids of "
            f"the {len(known)} loaded tasks{hint}"
        )


def select_ids(tasks: Sequence[Task], path: str | Path) -> list[Task]:
    """The tasks whose ids stand in the file ``path``, in the order of ``tasks``."""
    ids = set(read_ids(path))
    check_ids(sorted(ids), {task.id for task in tasks}, path)
    return [task for task in tasks if task.id in ids]


@cache
def official_nano_ids() -> dict[str, frozenset[str]]:
    """The official members of track nano among ARC-AGI-1, by ``arc1:<split>``.

    Membership depends on the size of the answers, so it is shipped as a list of ids, made once
    by data/make_nano_ids.py, and never worked out here.
    """
    lists = json.loads(NANO_IDS_FILE.read_text(encoding="utf-8"))
    return {source: frozenset(ids) for source, ids in lists.items()}


def in_nano_track(task: Task) -> bool:
    """Whether every pair has at most 192 tokens in any orientation.

    ARC-AGI-1 goes by the official list. Elsewhere what is known is measured: demonstrations,
    the answers of training tasks, and, where there is no answer, the test input alone.
    """
    official = official_nano_ids().get(task.source)
    if official is not None:
        return task.id in official
    pairs = task.demos + (task.tests if isinstance(task, TrainingTask) else ())
    return all(longest_orientation(pair) <= NANO_TOKENS for pair in pairs) and all(
        3 + max(grid_length(*grid.shape), grid_length(*grid.T.shape)) <= NANO_TOKENS
        for grid in task.test_inputs
    )


def select_track(tasks: Sequence[Task], track: str) -> list[Task]:
    """The tasks of ``track``: all, or nano."""
    return [task for task in tasks if track == "all" or in_nano_track(task)]
