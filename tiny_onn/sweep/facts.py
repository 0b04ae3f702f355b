"""What a result file says of a finished run, whatever the comparison."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tiny_onn.arc.corpus import Corpus, Example, build_corpus
from tiny_onn.arc.tokens import Document
from tiny_onn.config.schema import Config
from tiny_onn.inference.prompt import encode_query
from tiny_onn.inspect.experts import expert_stats
from tiny_onn.inspect.parameters import active_parameters, total_parameters
from tiny_onn.model.checkpoint import Loaded
from tiny_onn.sweep.eta import TimedRun
from tiny_onn.sweep.run_files import steady_rate


def run_facts(
    run: TimedRun,
    words: list[str],
    extra: list[str],
    facts: Mapping[str, Any],
    lines: list[dict[str, str]],
    seconds: float,
    changed: bool,
) -> dict[str, Any]:
    """Who it was, on what machine, with which effort.

    Args:
        words: what the training got; extra: the user's own among them.
        facts: its metrics.json; lines: its log.
        seconds: wall clock of the command, hold-out included (its last part).
        changed: whether the code differed from its commit.
    """
    return {
        "arm": run.arm,
        "tag": run.tag,
        "overrides": extra,
        "budget": run.budget.name,
        "budget_minutes": run.budget.minutes,
        "seed": run.seed,
        "threads": run.threads,
        "jobs": run.jobs,
        "commit": facts["commit"] and facts["commit"] + ("-dirty" if changed else ""),
        "device": f"{os.cpu_count()} x {facts['device']}",
        "torch": facts["torch"],
        "command": shlex.join(["python", "train.py", *words]),
        "train_loss": facts["loss"],
        "tokens": facts["tokens"],
        "steps": facts["steps"],
        "train_flops": facts["train_flops"],
        "minutes": facts["minutes"],
        "minutes_command": round(max(seconds, facts["seconds"]) / 60, 3),
        "tokens_per_s": steady_rate(lines),
        "tokens_per_s_with_startup": round(facts["tokens"] / facts["seconds"], 1),
        "table_parameters": facts["table_parameters"],
    }


def holdout_facts(holdout: Mapping[str, Any]) -> dict[str, Any]:
    """Of the hold-out's metrics, under the names that result files use."""
    return {
        "nll_per_output_token": holdout["nll_per_token"],
        **{
            name: holdout[name]
            for name in ("token_accuracy", "exact_match", "num_outputs", "num_decoded")
        },
    }


def encode_all(corpus: Corpus, examples: Sequence[Example], config: Config) -> list[Document]:
    """The examples as documents, as they are given."""
    return [
        encode_query(
            corpus.tasks[example.task],
            example.pair,
            row=example.task,
            context=config.data.context,
            max_tokens=config.data.max_tokens,
        )
        for example in examples
    ]


def measure_experts(loaded: Loaded) -> dict[str, Any]:
    """Mean active and dead experts over all pairs of the run, learnt and held out, as they are
    given; and the parameters that a token passes."""
    corpus = build_corpus(loaded.config.data, loaded.config.seed)
    examples = (*corpus.examples, *corpus.holdout)
    stats = expert_stats(loaded.model, encode_all(corpus, examples, loaded.config))
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
