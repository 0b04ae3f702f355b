"""What a finished run folder tells of its training."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median


def log_lines(folder: Path) -> list[dict[str, str]]:
    """The CSV log of a run, all its parts; the cells that are filled."""
    lines = []
    parts = folder.glob("logs/version_*/metrics.csv")
    for path in sorted(parts, key=lambda path: int(path.parent.name.rpartition("_")[2])):
        with open(path, newline="", encoding="utf-8") as file:
            lines += [{k: v for k, v in line.items() if v} for line in csv.DictReader(file)]
    return lines


def steady_rate(lines: list[dict[str, str]]) -> float | None:
    """Median tokens per second of the log lines: training alone, without start-up."""
    rates = [float(line["tokens_per_s"]) for line in lines if "tokens_per_s" in line]
    return round(median(rates), 1) if rates else None
