"""Which vote is best: every rule on the same candidates of the training hold-out.

    python exp/eavi/votes.py runs/x [runs/y ...] [--views 16] [--score-views 8] [--threads N]

The runs were trained with data.holdout=train_tests. Candidates are decoded once, read by AugScore
once, and ranked by each rule; evaluation tasks are not asked. Task means over the held-out outputs.
Writes exp/results/votes_<run>.json, the run's path with _ between its parts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
import torch

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.config.schema import PredictConfig
from tiny_onn.errors import UserError, run_cli
from tiny_onn.files import atomic_write_text
from tiny_onn.inference.predict import predict_tasks
from tiny_onn.inference.vote import VoteRule, vote
from tiny_onn.model.checkpoint import load_model
from tiny_onn.training.provenance import code_version

RESULTS = Path(__file__).resolve().parents[2] / "exp" / "results"


def compare(run: str, args: argparse.Namespace) -> dict[str, Any]:
    """Task-mean pass@1 and pass@2 of every rule.

    Raises:
        UserError: a run that held nothing out.
    """
    loaded = load_model(run)
    corpus = build_corpus(loaded.config.data, loaded.config.seed)
    if loaded.config.data.holdout != "train_tests":
        raise UserError(
            f"got run '{run}' with data.holdout={loaded.config.data.holdout}; expected one trained "
            "with data.holdout=train_tests; train it so"
        )
    tasks, answers = corpus.holdout_tasks(), corpus.holdout_answers()
    rows = {task_id: row for row, task_id in enumerate(loaded.task_ids)}
    predict = PredictConfig(views=args.views, vote="aug_score", score_views=args.score_views)
    prediction = predict_tasks(
        loaded.model,
        tasks,
        rows,
        predict,
        args.seed,
        context=loaded.config.data.context,
        max_tokens=loaded.config.data.max_tokens,
    )
    found: dict[str, dict[str, float]] = {}
    for rule in get_args(VoteRule):
        shares: dict[int, list[float]] = {1: [], 2: []}
        for task in tasks:
            for k, means in shares.items():
                tests = prediction.candidates[task.id]
                means.append(
                    fmean(
                        any(np.array_equal(grid, answer) for grid in vote(own, k, rule))
                        for own, answer in zip(tests, answers[task.id], strict=True)
                    )
                )
        found[rule] = {f"pass{k}": fmean(means) for k, means in shares.items()}
    stats = prediction.stats
    return {
        "experiment": "votes",
        "run": run,
        **code_version(),
        "views": args.views,
        "score_views": args.score_views,
        "tasks": len(tasks),
        "outputs": sum(len(own) for own in answers.values()),
        "seconds": round(stats.seconds, 1),
        "score_seconds": round(stats.score_seconds, 1),
        "rules": found,
    }


def result_name(run: str) -> str:
    """runs/eavi/soft_seed0 -> eavi_soft_seed0."""
    parts = [part for part in Path(run).parts if part not in ("/", ".", "..", "runs", "checkpoint")]
    return "_".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--score-views", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    RESULTS.mkdir(exist_ok=True)
    for run in args.runs:
        result = compare(run, args)
        path = RESULTS / f"votes_{result_name(run)}.json"
        atomic_write_text(path, json.dumps(result, indent=1) + "\n")
        print(f"{run}: {result['outputs']} outputs of {result['tasks']} tasks")
        for rule, shares in result["rules"].items():
            print(f"  {rule:24} pass@1 {shares['pass1']:.1%}  pass@2 {shares['pass2']:.1%}")
        print(f"  {result['score_seconds']} of {result['seconds']} s read the candidates")
    return 0


if __name__ == "__main__":
    run_cli(main)
