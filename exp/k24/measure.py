"""A finished run to one result: what training wrote down, its masks, and its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, DENSE, Run
from masks import PACKED_24, ffn_weights, flips
from prune import ffn_matrices, measure_pruned
from table import EXPERIMENT

from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import Loaded, load_model
from tiny_onn.sweep.facts import holdout_facts, measure_experts, run_facts
from tiny_onn.sweep.run_files import log_lines

LOGGED = ("k24/kappa", "k24/tau", "k24/agreement", "k24/diversity")
POINTS = 20
"""Of a series out of the log, at most."""


def thinned(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most about POINTS of them, evenly spaced, the last one among them."""
    every = -(-len(points) // POINTS) or 1
    return points[::-1][::every][::-1]


def mask_series(lines: list[dict[str, str]]) -> list[dict[str, float]]:
    """Of K-2:4's log lines: step, kappa, tau, agreement of samples with the likeliest pattern."""
    return thinned(
        [
            {"step": int(line["step"])}
            | {n.removeprefix("k24/"): round(float(line[n]), 6) for n in LOGGED if n in line}
            for line in lines
            if "k24/kappa" in line
        ]
    )


def drop_series(lines: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Of the log lines of 2:4 activations: step, whether they were sparse, and by layer the share
    that was not zero, of it the share that 2:4 dropped (in the dense warm-up: would have), and the
    same along tokens for weight gradients."""
    found = []
    for line in lines:
        if "act24/sparse" not in line:
            continue
        row: dict[str, Any] = {"step": int(line["step"])}
        row["sparse"] = bool(float(line["act24/sparse"]))
        for name in ("nonzero", "dropped", "feature_dropped"):
            row[name] = []
            while (key := f"act24/{name}_{len(row[name])}") in line:
                row[name].append(round(float(line[key]), 5))
        found.append(row)
    return thinned(found)


def ready(run: Run, root: Path) -> Loaded:
    """Its checkpoint, to be run on this run's threads."""
    torch.set_num_threads(run.threads)  # the neighbours train on
    loaded = load_model(run.folder(root))
    loaded.model.use_backend("auto", "cpu", "fp32")
    return loaded


def result_of(
    run: Run, root: Path, words: list[str], extra: list[str], seconds: float, changed: bool
) -> dict[str, Any]:
    """What goes into the result file.

    Args:
        root: of the tree, below which the run's folder lies.
        words: what train.py got; extra: the user's own among them.
        seconds: wall clock of the training command, hold-out included (its last part).
        changed: whether the code differed from its commit.
    """
    folder = run.folder(root)
    facts = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    lines = log_lines(folder)
    loaded = ready(run, root)
    weights = list(ffn_weights(loaded.model))
    return {
        "experiment": EXPERIMENT,
        "budget_steps": run.budget.steps,
        **run_facts(run, words, extra, facts, lines, seconds, changed),
        **holdout_facts(facts["holdout"]),
        **measure_experts(loaded),
        "pattern_parameters": facts["pattern_parameters"],
        "ffn_weights": sum(count for count, _ in weights),
        "ffn_bytes": round(sum(size for _, size in weights)),
        "observe_steps": run.budget.observe_steps,
        "flips": flips(folder),
        "masks": mask_series(lines),
        "drops": drop_series(lines),
    }


def pruned_result(run: Run, root: Path, results: Path) -> dict[str, Any]:
    """The result of an arm that is pruned from the dense one of the same budget, seed, tag
    and share of the machine: that one's, but for what pruning changes.

    Raises:
        UserError: there is no such result or checkpoint.
    """
    dense = replace(run, arm=DENSE)
    path = dense.result_path(results)
    if not path.exists():
        raise UserError(
            f"arm {run.arm} is pruned from {dense.name}, which has no result; expected it trained "
            f"first; give --arms {DENSE},{run.arm}"
        )
    before = json.loads(path.read_text(encoding="utf-8"))
    loaded = ready(dense, root)
    metrics = measure_pruned(loaded, ARMS[run.arm].pruned_by)
    count = sum(m.weight.numel() for m in ffn_matrices(loaded.model).values())
    return before | {
        "arm": run.arm,
        "pruned_from": dense.name,
        **holdout_facts(metrics),
        "ffn_weights": count,
        "ffn_bytes": round(count * PACKED_24),
    }
