"""What the scorer found: shares, the counts behind them, every task; plain data and a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TaskScore:
    """One task: for each test output, in order, whether attempt 1, or either one, is right."""

    id: str
    pass1: tuple[bool, ...]
    pass2: tuple[bool, ...]


@dataclass(frozen=True)
class ScoreReport:
    """Scores as shares from 0 to 1, the counts behind them, and every task."""

    task_mean_pass1: float
    task_mean_pass2: float
    micro_pass1: float
    micro_pass2: float
    strict_pass1: float
    strict_pass2: float
    num_tasks: int
    num_outputs: int
    outputs_right_pass1: int
    outputs_right_pass2: int
    tasks_solved_pass1: int
    tasks_solved_pass2: int
    missing_tasks: int
    missing_outputs: int
    missing_attempts: int
    malformed_attempts: int
    tasks_not_scored: int
    ids_without_solution: int
    per_task: tuple[TaskScore, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def render(self) -> str:
        """The table for people."""
        task_right = [
            sum(float(np.mean(getattr(task, key))) for task in self.per_task)
            for key in ("pass1", "pass2")
        ]
        lines = [
            f"{'rule':<24}{'pass@1':>18}{'pass@2':>18}",
            _row(
                "task mean",
                (self.task_mean_pass1, f"{task_right[0]:.1f}"),
                (self.task_mean_pass2, f"{task_right[1]:.1f}"),
                self.num_tasks,
            ),
            _row(
                "per output",
                (self.micro_pass1, str(self.outputs_right_pass1)),
                (self.micro_pass2, str(self.outputs_right_pass2)),
                self.num_outputs,
            ),
            _row(
                "strict (all tests)",
                (self.strict_pass1, str(self.tasks_solved_pass1)),
                (self.strict_pass2, str(self.tasks_solved_pass2)),
                self.num_tasks,
            ),
            f"{self.num_tasks} tasks, {self.num_outputs} test outputs; missing: "
            f"{self.missing_tasks} tasks, {self.missing_outputs} outputs, "
            f"{self.missing_attempts} attempts; malformed attempts: {self.malformed_attempts}; "
            f"submitted tasks not scored: {self.tasks_not_scored}; "
            f"ids without solution: {self.ids_without_solution}",
        ]
        return "\n".join(lines)


def _row(name: str, pass1: tuple[float, str], pass2: tuple[float, str], total: int) -> str:
    cells = [f"{share:7.2%} {f'({right}/{total})':>10}" for share, right in (pass1, pass2)]
    return f"{name:<24}{cells[0]:>18}{cells[1]:>18}"
