"""The race nano219: learn 219 small ARC-AGI-1 tasks from their demonstrations within the clock.

    python exp/race/nano219.py --seed 0            (or: make race, seeds 0, 1, 2)

The clock runs over both commands, ``train.py`` and ``submit.py``, data loading and start-up
included. They get a challenges file without a single test output; the hidden outputs are opened
here only after the submission is written. Protocol and rival: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from tiny_onn.arc.score import load_solutions, score_submission
from tiny_onn.arc.select import official_nano_ids
from tiny_onn.arc.sources import load_challenges
from tiny_onn.arc.task import Pair, Task
from tiny_onn.errors import run_cli
from tiny_onn.files import atomic_write_text
from tiny_onn.inference.holdout import output_nll
from tiny_onn.model.checkpoint import load_model

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("arc1:training", "arc1:evaluation")


def nano_ids() -> dict[str, set[str]]:
    """Ids of track nano by split: training (147) and evaluation (72)."""
    return {split: set(ids) for split, ids in official_nano_ids().items()}


def write_challenges(path: Path) -> list[Task]:
    """The 219 tasks as a Kaggle challenges file: demonstrations and test inputs, no outputs."""
    ids = nano_ids()
    tasks = [t for split in SPLITS for t in load_challenges(split) if t.id in ids[split]]
    plain = {
        t.id: {
            "train": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in t.demos],
            "test": [{"input": grid.tolist()} for grid in t.test_inputs],
        }
        for t in tasks
    }
    atomic_write_text(path, json.dumps(plain))
    return tasks


def command(*words: str) -> None:
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


def commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def scores(submission: dict, ids: set[str], solutions: dict) -> dict:
    report = score_submission(submission, solutions, ids)
    return {
        "task_mean_pass2": report.task_mean_pass2,
        "task_mean_pass1": report.task_mean_pass1,
        "micro_pass2": report.micro_pass2,
        "micro_pass1": report.micro_pass1,
        "strict_pass2": report.strict_pass2,
        "num_outputs": report.num_outputs,
        "solved_pass2": report.outputs_right_pass2,
    }


def hidden_nll(run: Path, tasks: list[Task], solutions: dict) -> dict[str, float]:
    """NLL in nats per hidden output token, over all tasks and over each split."""
    loaded = load_model(run)
    rows = {task_id: i for i, task_id in enumerate(loaded.task_ids)}
    sums = {}
    for task in tasks:
        pairs = [
            (rows[task.id], Pair(grid, answer))
            for grid, answer in zip(task.test_inputs, solutions[task.id], strict=True)
        ]
        sums[task.id] = output_nll(loaded.model, pairs)
    ids = nano_ids()
    groups = {"all": set(sums), "eval": ids["arc1:evaluation"]}
    return {
        name: sum(sums[i][0] for i in group) / sum(sums[i][1] for i in group)
        for name, group in groups.items()
    }


def race(
    network: str, seed: int, minutes: float, predict_minutes: float, views: int, extra: list[str]
) -> int:
    run = ROOT / "runs" / f"race-{network}-seed{seed}"
    run.parent.mkdir(exist_ok=True)
    challenges = ROOT / "runs" / "race_challenges.json"
    tasks = write_challenges(challenges)
    version = commit()
    began = time.monotonic()
    command(
        "train.py",
        "stage=pretrain",
        "preset=nano",
        f"network={network}",
        f"data.sources=[{challenges}]",
        "data.track=all",
        "data.learn=demos",
        f"seed={seed}",
        f"out={run}",
        "resume=false",
        f"budget.minutes={minutes - predict_minutes}",
        *extra,
    )
    trained = time.monotonic()
    command(
        "submit.py",
        f"checkpoint={run}",
        f"challenges={challenges}",
        f"predict.views={views}",
        "predict.vote=count_then_likelihood",  # as all results so far
        f"seed={seed}",
        f"out={run}/submission",
    )
    total = (time.monotonic() - began) / 60
    submission = json.loads((run / "submission" / "submission.json").read_text())
    solutions = {k: v for split in SPLITS for k, v in load_solutions(split).items()}
    ids = nano_ids()
    nll = hidden_nll(run, tasks, solutions)
    facts = json.loads((run / "metrics.json").read_text())
    result = {
        "race": "nano219",
        "network": network,
        "seed": seed,
        "commit": version,
        "device": f"{os.cpu_count()} x {platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "minutes_total": round(total, 3),
        "minutes_train_command": round((trained - began) / 60, 3),
        "minutes_predict_command": round(total - (trained - began) / 60, 3),
        "train_tokens": facts["tokens"],
        "train_flops": facts["train_flops"],
        "train_steps": facts["steps"],
        "parameters": facts["parameters"],
        "table_parameters": facts["table_parameters"],
        "views": views,
        "overrides": extra,
        "all": scores(submission, set().union(*ids.values()), solutions)
        | {"nll_per_output_token": nll["all"]},
        "eval": scores(submission, ids["arc1:evaluation"], solutions)
        | {"nll_per_output_token": nll["eval"]},
    }
    (ROOT / "exp" / "results").mkdir(exist_ok=True)
    path = ROOT / "exp" / "results" / f"race_nano219_{network}_seed{seed}.json"
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"written: {path.relative_to(ROOT)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="sparse", choices=("sparse", "dense"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=29.5, help="clock of the whole run")
    parser.add_argument(
        "--predict-minutes", type=float, default=2.5, help="of these, kept for prediction"
    )
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("overrides", nargs="*", help="key=value for train.py")
    args = parser.parse_args()
    return race(
        args.network, args.seed, args.minutes, args.predict_minutes, args.views, args.overrides
    )


if __name__ == "__main__":
    run_cli(main)
