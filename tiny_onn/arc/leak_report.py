"""The leak report: what is learnt from, what was left out and why, and hashes of both."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tiny_onn.arc.task import Grid, Pair, Task, TrainingTask


@dataclass(frozen=True)
class SourceCount:
    """What one source gave: tasks and pairs read, and what of them is learnt from.

    tests_without_answer: test inputs whose outputs were never read. sha256: of all that was
    read (ids, demonstrations, test inputs, answers of training tasks).
    """

    tasks: int
    demos: int
    tests_with_answer: int
    tests_without_answer: int
    tasks_used: int
    demos_learned: int
    tests_learned: int
    held_out: int
    sha256: str


@dataclass(frozen=True)
class Exclusion:
    """A task (``pair`` empty) or a pair of it that is not learnt from, and why."""

    task: str
    source: str
    reason: str
    pair: str = ""


@dataclass(frozen=True)
class LeakReport:
    """Sources, exclusions and hashes.

    corpus_sha256: of the tasks as they are shown, in order, every example and held-out pair; by
    it a resumed run knows its data again.
    """

    sources: dict[str, SourceCount]
    excluded: tuple[Exclusion, ...]
    num_tasks: int
    num_examples: int
    num_holdout: int
    corpus_sha256: str

    @property
    def reasons(self) -> dict[str, dict[str, int]]:
        """How many tasks and pairs each reason left out."""
        counts: dict[str, dict[str, int]] = {}
        for kind in ("tasks", "pairs"):
            chosen = Counter(e.reason for e in self.excluded if bool(e.pair) == (kind == "pairs"))
            for reason, number in chosen.items():
                counts.setdefault(reason, {"tasks": 0, "pairs": 0})[kind] = number
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the counts by reason."""
        return {**asdict(self), "reasons": self.reasons}

    def render(self) -> str:
        """The report in a few lines; the ids left out are in :meth:`to_dict`."""
        width = max(12, *(len(name) for name in self.sources))
        head = ("tasks", "used", "demos", "tests", "hidden", "learned", "held out")
        lines = [
            f"data: {self.num_examples} pairs of {self.num_tasks} tasks to learn from, "
            f"{self.num_holdout} held out",
            f"  {'source':<{width}}" + "".join(f"{name:>9}" for name in head) + "  sha256",
        ]
        for name, c in self.sources.items():
            learned = c.demos_learned + c.tests_learned
            cells = (c.tasks, c.tasks_used, c.demos, c.tests_with_answer, c.tests_without_answer)
            row = "".join(f"{n:>9}" for n in (*cells, learned, c.held_out))
            lines.append(f"  {name:<{width}}{row}  {c.sha256[:12]}")
        for reason, count in self.reasons.items():
            parts = [f"{number} {kind}" for kind, number in count.items() if number]
            lines.append(f"  left out, {reason}: {', '.join(parts)}")
        hidden = sum(count.tests_without_answer for count in self.sources.values())
        lines.append(
            f"  answers of {hidden} test inputs were not read; corpus sha256 "
            f"{self.corpus_sha256[:12]}"
        )
        return "\n".join(lines)


def _add_grid(digest: Any, grid: Grid) -> None:
    digest.update(bytes(grid.shape) + grid.tobytes())


def hash_corpus(tasks: Iterable[Task], pairs: Iterable[tuple[str, Pair]]) -> str:
    """sha256 of the tasks that a run shows and of named pairs, both in their order."""
    digest = hashlib.sha256(hash_tasks(tasks).encode())
    for name, pair in pairs:
        digest.update(name.encode() + b"\0")
        _add_grid(digest, pair.input)
        _add_grid(digest, pair.output)
    return digest.hexdigest()


def hash_tasks(tasks: Iterable[Task]) -> str:
    """sha256 of everything that ``tasks`` hold, in their order."""
    digest = hashlib.sha256()
    for task in tasks:
        tests = task.tests if isinstance(task, TrainingTask) else ()
        digest.update(f"{task.id}\0{len(task.demos)},{len(tests)}\0".encode())
        for pair in task.demos + tests:
            _add_grid(digest, pair.input)
            _add_grid(digest, pair.output)
        for grid in task.test_inputs:
            _add_grid(digest, grid)
    return digest.hexdigest()
