"""A finished run folder to one result: what training wrote down, and what the experts do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from arms import Run
from table import EXPERIMENT

from tiny_onn.model.checkpoint import load_model
from tiny_onn.sweep.facts import holdout_facts, measure_experts, run_facts
from tiny_onn.sweep.run_files import log_lines

ROOT = Path(__file__).resolve().parents[2]


def total_resets(lines: list[dict[str, str]]) -> int | None:
    """Experts reborn in the whole run, over the layers; None without that part."""
    last: dict[str, float] = {}
    for line in lines:
        last |= {k: float(v) for k, v in line.items() if k.startswith("moe/resets_")}
    return round(sum(last.values())) if last else None


def result_of(
    run: Run, words: list[str], extra: list[str], seconds: float, changed: bool
) -> dict[str, Any]:
    """What goes into the result file.

    Args:
        words: what train.py got; extra: the user's own among them.
        seconds: wall clock of the training command, hold-out included (its last part).
        changed: whether the code differed from its commit.
    """
    folder = ROOT / "runs" / "ablation" / run.name
    facts = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert facts["threads"] == run.threads, (facts["threads"], run.threads)
    torch.set_num_threads(run.threads)  # the neighbours train on
    lines = log_lines(folder)
    loaded = load_model(folder)
    loaded.model.use_backend("auto", "cpu", "fp32")
    return {
        "experiment": EXPERIMENT,
        "budget_tokens": run.budget.tokens,
        **run_facts(run, words, extra, facts, lines, seconds, changed),
        **holdout_facts(facts["holdout"]),
        **measure_experts(loaded),
        "reborn_experts": total_resets(lines),
    }
