"""A finished run folder to one result: what training wrote down, and what the experts do."""

from __future__ import annotations

import csv
import json
import os
import shlex
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arms import Run
from table import EXPERIMENT

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.inference.prompt import encode_query
from tiny_onn.inspect.experts import expert_stats
from tiny_onn.inspect.parameters import active_parameters, total_parameters
from tiny_onn.model.checkpoint import Loaded, load_model

ROOT = Path(__file__).resolve().parents[2]


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


def total_resets(lines: list[dict[str, str]]) -> int | None:
    """Experts reborn in the whole run, over the layers; None without that part."""
    last: dict[str, float] = {}
    for line in lines:
        last |= {k: float(v) for k, v in line.items() if k.startswith("moe/resets_")}
    return round(sum(last.values())) if last else None


def measure_experts(loaded: Loaded) -> dict[str, Any]:
    """Mean active and dead experts over all pairs of the run, learnt and held out, as they are
    given; and the parameters that a token passes."""
    data = loaded.config.data
    corpus = build_corpus(data, loaded.config.seed)
    documents = [
        encode_query(
            corpus.tasks[example.task],
            example.pair,
            row=example.task,
            context=data.context,
            max_tokens=data.max_tokens,
        )
        for example in (*corpus.examples, *corpus.holdout)
    ]
    stats = expert_stats(loaded.model, documents)
    active, run = ({}, {}) if stats is None else (stats.mean_active(), stats.mean_run())
    found: dict[str, Any] = {
        "parameters": total_parameters(loaded.model),
        "active_parameters": round(active_parameters(loaded.model, run)),
        "experts": None,
        "mean_active_experts": None,
        "dead_experts": None,
    }
    if stats is not None:
        found |= {
            "experts": stats.num_experts,
            "mean_active_experts": round(sum(active.values()) / len(active), 4),
            "mean_active_by_layer": {str(layer): round(k, 4) for layer, k in active.items()},
            "dead_experts": stats.num_dead,
            "none_active_share": round(stats.none_share(), 5),
        }
    return found


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
    holdout, lines = facts["holdout"], log_lines(folder)
    loaded = load_model(folder)
    loaded.model.use_backend("auto", "cpu", "fp32")
    return {
        "experiment": EXPERIMENT,
        "arm": run.arm,
        "tag": run.tag,
        "overrides": extra,
        "budget": run.budget.name,
        "budget_minutes": run.budget.minutes,
        "budget_tokens": run.budget.tokens,
        "seed": run.seed,
        "threads": run.threads,
        "jobs": run.jobs,
        "commit": facts["commit"] and facts["commit"] + ("-dirty" if changed else ""),
        "device": f"{os.cpu_count()} x {facts['device']}",
        "torch": facts["torch"],
        "command": shlex.join(["python", "train.py", *words]),
        "nll_per_output_token": holdout["nll_per_token"],
        "token_accuracy": holdout["token_accuracy"],
        "exact_match": holdout["exact_match"],
        "num_outputs": holdout["num_outputs"],
        "num_decoded": holdout["num_decoded"],
        "train_loss": facts["loss"],
        "tokens": facts["tokens"],
        "steps": facts["steps"],
        "train_flops": facts["train_flops"],
        "minutes": facts["minutes"],
        "minutes_command": round(max(seconds, facts["seconds"]) / 60, 3),
        "tokens_per_s": steady_rate(lines),
        "tokens_per_s_with_startup": round(facts["tokens"] / facts["seconds"], 1),
        "table_parameters": facts["table_parameters"],
        **measure_experts(loaded),
        "reborn_experts": total_resets(lines),
    }
