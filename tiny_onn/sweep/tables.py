"""Result files read, and tables of them written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tiny_onn.errors import UserError

Result = Mapping[str, Any]


def read_results(folder: Path, pattern: str, experiment: str) -> list[Result]:
    """All results of ``experiment`` among the files of ``folder`` that match ``pattern``, by name.

    Raises:
        UserError: a file that is none.
    """
    results = []
    for path in sorted(folder.glob(pattern)):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"'{path}' is no result ({error}); expected JSON; delete it and give the same "
                "command again"
            ) from error
        if isinstance(result, dict) and result.get("experiment") == experiment:
            results.append(result)
    return results


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean, and (smallest..largest) of several."""
    if not values:
        return ""
    if len(values) == 1:
        return show(values[0])
    return f"{show(fmean(values))} ({show(min(values))}..{show(max(values))})"


def differences(group: Sequence[Result], base: Sequence[Result], name: str) -> list[float]:
    """``name`` above that of ``base``, seed by seed, for the seeds that both have."""
    of_seed = {result["seed"]: result[name] for result in base}
    return [r[name] - of_seed[r["seed"]] for r in group if r["seed"] in of_seed]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned; the first line is its head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    head, *rest = lines
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in (head, ["-" * width for width in widths], *rest)
    )
