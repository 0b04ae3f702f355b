"""Strict reading of ARC-format JSON: one line of error names file, task, pair and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_onn.arc.task import MAX_SIDE, NUM_COLORS, Grid, Pair, Task, TrainingTask
from tiny_onn.errors import UserError


def brief(value: object) -> str:
    """A short form of ``value`` with its type, for messages."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file, refusing repeated keys (the second one would silently win).

    Raises:
        UserError: the file is missing, unreadable, not UTF-8, not JSON, or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"'{path}': got key '{twice}' twice, expected it once; remove one of the entries"
            )
        return result

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read '{path}' ({error.strerror}); expected {what}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}': got bytes that are not UTF-8, expected {what}; write the file again"
        ) from error
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{path}': not JSON ({error.msg}, line {error.lineno}), expected {what}; "
            "write the file again"
        ) from error
    except RecursionError as error:
        raise UserError(
            f"'{path}': JSON nested too deeply, expected {what}; write the file again"
        ) from error


def grid_problem(value: object) -> str | None:
    """Say what keeps ``value`` from being a plain JSON grid; None when it is one."""
    if not isinstance(value, list) or not value:
        return f"got {brief(value)}, expected a non-empty list of rows"
    if len(value) > MAX_SIDE:
        return f"got {len(value)} rows, expected 1 to {MAX_SIDE}"
    for y, row in enumerate(value):
        if not isinstance(row, list) or not row:
            return f"row {y}: got {brief(row)}, expected a non-empty list of cells"
        if len(row) > MAX_SIDE:
            return f"row {y}: got {len(row)} cells, expected 1 to {MAX_SIDE}"
        if len(row) != len(value[0]):
            return f"row {y}: got {len(row)} cells, expected {len(value[0])} as in row 0"
        if set(map(type, row)) == {int} and min(row) >= 0 and max(row) < NUM_COLORS:
            continue
        for x, cell in enumerate(row):
            if type(cell) is not int or not 0 <= cell < NUM_COLORS:
                return f"row {y} column {x}: got {brief(cell)}, expected an integer 0 to 9"
    return None


def parse_grid(value: object, where: str) -> Grid:
    """The grid that a JSON value spells, uint8 (H, W), read-only.

    Raises:
        UserError: ragged, empty, over 30 a side, or a cell that is no integer 0 to 9.
    """
    problem = grid_problem(value)
    if problem:
        raise UserError(f"{where}: {problem}; correct the grid")
    grid = np.array(value, dtype=np.uint8)
    grid.flags.writeable = False
    return grid


def parse_task(
    data: object, task_id: str, source: str, where: str, read_answers: bool
) -> Task | TrainingTask:
    """A task from ``{"train": [pairs], "test": [pairs]}``.

    With ``read_answers`` false the test outputs are never looked at, well formed or not. With it
    true, a task whose tests all have outputs becomes a TrainingTask.

    Raises:
        UserError: anything that is not such a task; the message starts with ``where``.
    """
    where = f"{where} task '{task_id}'"
    if not isinstance(data, dict):
        raise UserError(
            f"{where}: got {brief(data)}, expected an object with train and test; correct the file"
        )
    demos = []
    for number, entry in enumerate(_entries(data, "train", where)):
        place = f"{where} train pair {number}"
        pair = [
            parse_grid(_get(entry, key, place), f"{place} {key}") for key in ("input", "output")
        ]
        demos.append(Pair(*pair))
    entries = _entries(data, "test", where)
    inputs = []
    for number, entry in enumerate(entries):
        place = f"{where} test pair {number}"
        inputs.append(parse_grid(_get(entry, "input", place), f"{place} input"))
    if not read_answers or not any("output" in entry for entry in entries):
        return Task(task_id, source, tuple(demos), tuple(inputs))
    tests = []
    for number, (entry, grid) in enumerate(zip(entries, inputs, strict=True)):
        place = f"{where} test pair {number}"
        tests.append(Pair(grid, parse_grid(_get(entry, "output", place), f"{place} output")))
    return TrainingTask(task_id, source, tuple(demos), tuple(inputs), tuple(tests))


def _entries(data: dict, key: str, where: str) -> Sequence[dict]:
    if key not in data:
        raise UserError(f"{where}: got no '{key}', expected a list of pairs; correct the file")
    entries = data[key]
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{where}: got {brief(entries)} for '{key}', expected a non-empty list of pairs; "
            "correct the file"
        )
    return entries


def _get(entry: object, key: str, where: str) -> object:
    if not isinstance(entry, dict):
        raise UserError(
            f"{where}: got {brief(entry)}, expected an object with input and output; "
            "correct the file"
        )
    if key not in entry:
        raise UserError(f"{where}: got no '{key}', expected a grid; correct the file")
    return entry[key]
