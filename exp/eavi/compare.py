"""EAVI against the honest control: the same extra minutes spent on more teacher forcing.

    python exp/eavi/compare.py [--minutes 10] [--seeds 0,1,2] [--arms teacher,soft] [--threads 1]
                               [--network sparse] [--submit] [--tag NAME key=value ...]
    python exp/eavi/compare.py --table

Every seed pretrains for --minutes with the tests of the *training* tasks held out; every arm goes
on from there for half of them, with the same optimizer and schedule, and is measured on the
hold-out. --submit also predicts the evaluation tasks of track nano and scores them, for the final
table alone. What has a result is skipped; Ctrl-C keeps what is finished, and unfinished runs go on.
Protocol: README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.errors import UserError, run_cli
from tiny_onn.files import atomic_write_text
from tiny_onn.inference.holdout import measure
from tiny_onn.inference.prompt import encode_query
from tiny_onn.model.checkpoint import load_model
from tiny_onn.training.exposure import measure_exposure
from tiny_onn.training.provenance import code_version

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "exp" / "results"

ARMS: dict[str, tuple[str, ...]] = {
    "pretrained": (),
    "teacher": ("stage=pretrain",),
    "soft": ("stage=eavi", "eavi.feed=soft"),
    "sample": ("stage=eavi", "eavi.feed=sample"),
    "greedy": ("stage=eavi", "eavi.feed=greedy"),
    "free": ("stage=eavi", "eavi.feed=sample", "eavi.geometry=free"),
    "scheduled": ("stage=eavi", "eavi.feed=single"),
}
"""Arm -> how it goes on. pretrained: not at all; teacher: control b; scheduled: control c."""

OPTIMIZER = (
    "optim.muon_lr=0.005",
    "optim.adamw_lr=5e-4",
    "optim.table_lr=1e-3",
    "optim.deep_embed_lr=2e-3",
)
"""Of all second halves alike: those of configs/stage/eavi.yaml."""


def folder(arm: str, name: str, seed: int) -> Path:
    return Path("runs") / "eavi" / f"{arm}_{name}_seed{seed}"


def run_folder(arm: str, seed: int, args: argparse.Namespace) -> Path:
    """All tags begin with the same pretrained models."""
    return folder(arm, args.base if arm == "pretrained" else args.name, seed)


def result_path(arm: str, name: str, seed: int) -> Path:
    return RESULTS / f"eavi_{arm}_{name}_seed{seed}.json"


def command(threads: int, *words: str) -> None:
    """One of the project's own commands on so many threads, its output shown.

    Raises:
        SystemExit: with its status, if that is not 0.
    """
    print("$ python", *words, flush=True)
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    if threads:
        names = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
        environment |= dict.fromkeys(names, str(threads))
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(done.returncode)


def train(arm: str, seed: int, args: argparse.Namespace) -> Path:
    """Train the arm (its beginning too, if that is missing); its run folder."""
    run = run_folder(arm, seed, args)
    common = (
        "preset=nano",
        f"network={args.network}",
        "data.track=nano",
        "data.holdout=train_tests",
        "trainer.holdout_decode=0",
        "trainer.tensorboard=false",
        f"trainer.threads={args.threads}",
        f"seed={seed}",
        f"out={run}",
    )
    if arm == "pretrained":
        command(
            args.threads, "train.py", "stage=pretrain", *common, f"budget.minutes={args.minutes:g}"
        )
        return run
    begin = train("pretrained", seed, args)
    if args.warm:
        args.warm = False
        warm_up(begin, common, args)
    command(
        args.threads,
        "train.py",
        *ARMS[arm],
        *common,
        f"init_from={begin}",
        f"budget.minutes={args.minutes / 2:g}",
        *OPTIMIZER,
        *args.overrides,
    )
    return run


def warm_up(begin: Path, common: Sequence[str], args: argparse.Namespace) -> None:
    """Two steps of each stage: what torch.compile keeps on the disk is there for all arms, whose
    minutes begin with ``train.py``."""
    scratch = Path("runs") / "eavi" / f"warm_{args.name}_{os.getpid()}"
    budget = ("budget.minutes=null", "budget.steps=2", "resume=false")
    for stage in ("pretrain", "eavi"):
        words = (f"stage={stage}", f"init_from={begin}", f"out={scratch}")
        command(args.threads, "train.py", *common[:-1], *words, *budget)
    shutil.rmtree(ROOT / scratch, ignore_errors=True)


def measured(arm: str, seed: int, args: argparse.Namespace, run: Path) -> dict[str, Any]:
    """Exposure and exact match of the hold-out."""
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load_model(ROOT / run)
    corpus = build_corpus(loaded.config.data, loaded.config.seed)
    documents = [encode_query(corpus.tasks[e.task], e.pair, row=e.task) for e in corpus.holdout]
    began = time.monotonic()
    exposure = measure_exposure(loaded.model, documents).to_dict()
    free = measure(loaded.model, corpus.holdout, corpus.tasks, max_decoded=len(corpus.holdout))
    facts = loaded.provenance
    return {
        "experiment": "eavi",
        "arm": arm,
        "name": args.name,
        "seed": seed,
        "network": args.network,
        "pretrain_minutes": args.minutes,
        "overrides": args.overrides,
        **code_version(),
        "threads": args.threads,
        "device": f"{os.cpu_count()} x {facts['device']}",
        "steps": facts["steps"],
        "tokens": facts["tokens"],
        "excursion_tokens": facts["excursion_tokens"],
        "seconds": facts["seconds"],
        "seconds_per_step": seconds_per_step(ROOT / run),
        "train_flops": facts["train_flops"],
        "measure_seconds": round(time.monotonic() - began, 1),
        "exposure": exposure,
        "holdout": free.to_dict(),
    }


def seconds_per_step(run: Path) -> float | None:
    """Median between the lines of the log: neither start-up nor compilation. None for a run too
    short to say."""
    pairs: list[float] = []
    for log in sorted(run.glob("logs/version_*/metrics.csv")):  # one for every start
        with open(log) as file:
            rows = [r for r in csv.DictReader(file) if r["seconds"] and r["step"]]
        marks = [(float(r["seconds"]), int(r["step"])) for r in rows]
        pairs += [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(marks) if b[1] > a[1]]
    return round(median(pairs), 4) if pairs else None


def submitted(run: Path, seed: int, threads: int) -> dict[str, float]:
    """Scores of the evaluation tasks of track nano."""
    command(
        threads,
        "submit.py",
        f"checkpoint={run}",
        "track=nano",
        "solutions=arc1:evaluation",
        "predict.vote=count_then_likelihood",  # as all results of this table
        f"seed={seed}",
        f"threads={threads}",
        "progress=false",
    )
    score = json.loads((ROOT / run / "submission" / "score.json").read_text())
    return {k: score[k] for k in ("task_mean_pass1", "task_mean_pass2", "micro_pass2")}


COLUMNS = (
    ("exact_forced", "exposure", "exact, true prefix"),
    ("exact_match", "holdout", "exact, free-running"),
    ("colors_forced", "exposure", "colours, true prefix"),
    ("colors_own", "exposure", "colours, own prefix"),
    ("gap", "exposure", "gap"),
    ("nll_forced", "exposure", "NLL, true prefix"),
    ("nll_own", "exposure", "NLL, own prefix"),
    ("recovery", "exposure", "recovery"),
    ("recovery_cells", "exposure", "recovery, cells"),
    ("task_mean_pass2", "evaluation", "task mean pass@2"),
    ("seconds_per_step", None, "s/step"),
    ("tokens", None, "tokens"),
)


def table(name: str | None = None) -> str:
    """Means over seeds, smallest and largest in brackets, in Markdown; '' without results."""
    results = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("eavi_*.json"))]
    names = sorted({r["name"] for r in results if name in (None, r["name"])})
    lines: list[str] = []
    for one in names:
        lines += [f"{one}:", ""]
        lines.append("| arm | seeds | " + " | ".join(title for *_, title in COLUMNS) + " |")
        lines.append("|---" * (len(COLUMNS) + 2) + "|")
        for arm in ARMS:
            own = [r for r in results if (r["arm"], r["name"]) == (arm, one)]
            if own:
                cells = [_cell(own, key, group) for key, group, _ in COLUMNS]
                seeds = ",".join(str(r["seed"]) for r in own)
                lines.append(f"| {arm} | {seeds} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(results: Sequence[dict[str, Any]], key: str, group: str | None) -> str:
    found = [r if group is None else r.get(group) for r in results]
    values = [f[key] for f in found if f is not None and f[key] is not None]
    if not values:
        return ""
    digits = 0 if max(values) > 100 else 3
    mean = f"{fmean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of pretraining")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--network", default="sparse", choices=("sparse", "dense"))
    parser.add_argument("--threads", type=int, default=2, help="of every run")
    parser.add_argument("--tag", default="", help="keeps other settings apart")
    parser.add_argument("--submit", action="store_true", help="score the evaluation tasks too")
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("overrides", nargs="*", help="key=value for the arms' second half")
    args = parser.parse_args()
    if args.table:
        print(table())
        return 0
    arms = args.arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            raise UserError(
                f"got arm '{arm}'; expected some of {', '.join(ARMS)}; choose among them"
            )
    if args.overrides and not args.tag:
        raise UserError(
            f"got {args.overrides[0]} without --tag; expected a name that keeps its results apart; "
            "give --tag NAME"
        )
    tag = f"_{args.tag}" if args.tag else ""
    args.base = f"{args.network}_{args.minutes:g}min_{args.threads}t"
    args.name = args.base + tag
    args.warm = True
    RESULTS.mkdir(exist_ok=True)
    for seed in (int(s) for s in args.seeds.split(",")):
        for arm in arms:
            path = result_path(arm, args.name, seed)
            if not path.exists():
                run = train(arm, seed, args)
                found = measured(arm, seed, args, run)
                atomic_write_text(path, json.dumps(found, indent=1) + "\n")
                print(f"written: {path.relative_to(ROOT)}", flush=True)
            found = json.loads(path.read_text())
            if args.submit and "evaluation" not in found:
                found["evaluation"] = submitted(run_folder(arm, seed, args), seed, args.threads)
                atomic_write_text(path, json.dumps(found, indent=1) + "\n")
    print(table(args.name))
    return 0


if __name__ == "__main__":
    run_cli(main)
