"""What each sparse part buys on the nano tasks, and what it costs, against its absence.

    python exp/ablation/sparse_parts.py [--arms dense,all] [--seeds 0,1,2]
                                        [--minutes 10 | --tokens 6e6] [--again]
    python exp/ablation/sparse_parts.py --table
    python exp/ablation/sparse_parts.py --tag NAME key=value ...    (other settings, kept apart)

Every run is ``train.py preset=nano`` with the tests of the *training* tasks held out and its parts
switched on and off; evaluation answers are never read. A run whose result lies in exp/results is
skipped; Ctrl-C keeps what is finished, and the same command goes on. Protocol: README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

from arms import ARMS, Budget, Run, check_overrides, choose_arms, choose_budget, choose_seeds
from table import Result, read_results, render

from tiny_onn.clock import clock_text
from tiny_onn.config.load import load_config
from tiny_onn.errors import run_cli
from tiny_onn.files import atomic_write_text, ensure_writable_dir

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "exp" / "results"
CODE = ("tiny_onn", "kernels", "configs", "train.py", "exp/ablation")
"""What decides a result: local changes elsewhere do not make it "-dirty"."""

OVERHEAD_S = 30.0
"""A run's hold-out and measurement, until one was timed."""


def plan(arms: Sequence[str], seeds: Sequence[int], budget: Budget, tag: str) -> list[Run]:
    """Seed by seed, so that what is cut short still compares all arms."""
    return [Run(arm, budget, seed, tag) for seed in seeds for arm in arms]


def to_do(runs: Sequence[Run], folder: Path, again: bool) -> list[Run]:
    """The runs whose result is missing; all of them with ``again``."""
    return [run for run in runs if again or not run.result_path(folder).exists()]


def expected_seconds(run: Run, results: Sequence[Result]) -> float | None:
    """Of one run, by those of the same budget: its own arm's, else all arms'; None: unknown."""
    alike = [r for r in results if r["budget"] == run.budget.name]
    own = [r for r in alike if (r["arm"], r["tag"]) == (run.arm, run.tag)]
    if own or (alike and run.budget.minutes is None):
        return 60 * fmean(r["minutes_command"] for r in own or alike)
    return None if run.budget.minutes is None else 60 * run.budget.minutes + OVERHEAD_S


def eta_seconds(runs: Sequence[Run], results: Sequence[Result]) -> float | None:
    """Of all these runs; None while one's length is unknown."""
    seconds = [expected_seconds(run, results) for run in runs]
    return None if None in seconds else sum(s for s in seconds if s is not None)


def progress(number: int, runs: Sequence[Run], results: Sequence[Result]) -> str:
    """The line before run ``number`` (from 0)."""
    run, left = runs[number], runs[number:]
    return (
        f"run {number + 1} of {len(runs)}: {run.label}, {run.budget.name}, seed {run.seed}; "
        f"{len(left)} left, ETA {clock_text(eta_seconds(left, results))}"
    )


def code_changed() -> bool:
    """Whether the code differs from its commit; False outside a git tree."""
    status = ["git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", *CODE]
    try:
        return bool(subprocess.run(status, capture_output=True, text=True).stdout.strip())
    except FileNotFoundError:
        return False


def train(words: Sequence[str]) -> int:
    """train.py to its end; its exit status. A signal reaches it once, and it saves its place.

    It gets a session of its own: a terminal's Ctrl-C would reach it twice, and the second one
    would cut its saving short. What torch.compile makes is not kept, or only the first run of an
    arm would pay for it.
    """
    print("$ python train.py", *words, flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        process = subprocess.Popen(
            [sys.executable, "train.py", *words],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def run_one(run: Run, extra: list[str], batch_tokens: int, again: bool) -> int:
    """Train, measure, write the result; train.py's exit status."""
    words, changed = run.words(extra, batch_tokens), code_changed()
    began = time.monotonic()
    if again:
        shutil.rmtree(ROOT / "runs" / "ablation" / run.name, ignore_errors=True)
    status = train(words)
    seconds = time.monotonic() - began
    if status == 0:
        from measure import result_of  # imports torch, which refusing bad arguments needs not

        path, result = run.result_path(RESULTS), result_of(run, words, extra, seconds, changed)
        atomic_write_text(path, json.dumps(result, indent=1) + "\n")
        print(f"written: {path.relative_to(ROOT)}", flush=True)
    return status


def run_all(runs: list[Run], extra: list[str], again: bool) -> int:
    """All of them, whatever becomes of one; 1 if one failed."""
    # Settings that some arm cannot have end it here, before any work.
    batch_tokens = [load_config(run.words(extra, 1)).data.batch_tokens for run in runs]
    failed: list[str] = []
    number = 0
    try:
        for number, run in enumerate(runs):
            print(progress(number, runs, read_results(RESULTS)), flush=True)
            status = run_one(run, extra, batch_tokens[number], again)
            if status != 0:
                failed.append(f"{run.name} (train.py ended with status {status})")
                print(f"failed: {failed[-1]}; going on with the others", flush=True)
    except (KeyboardInterrupt, SystemExit):
        print(f"\nstopped in run {number + 1} of {len(runs)}; finished results are kept; "
              + ("--again begins with the first one: name the arms and seeds that are left"
                 if again else "the same command goes on"))  # fmt: skip
        raise
    if failed:
        print(
            f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; see above for "
            "each one's reason; where its folder holds a run of other settings, give --again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def stop(signum: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + signum)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--arms", default=",".join(ARMS), help=f"some of {', '.join(ARMS)}")
    made.add_argument("--seeds", default="0,1,2")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="wall clock of every run (default 10)")
    budget.add_argument("--tokens", type=float, help="training tokens of every run instead")
    made.add_argument("--again", action="store_true", help="redo runs that have a result")
    made.add_argument("--table", action="store_true", help="only print the table")
    made.add_argument("--tag", default="", help="names the settings given as key=value")
    made.add_argument("overrides", nargs="*", help="key=value for train.py; needs --tag")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.table:
        print(render(read_results(RESULTS)))
        return 0
    check_overrides(args.overrides, args.tag)
    minutes = 10.0 if args.minutes is None and args.tokens is None else args.minutes
    budget = choose_budget(minutes, args.tokens)
    runs = plan(choose_arms(args.arms), choose_seeds(args.seeds), budget, args.tag)
    ensure_writable_dir(RESULTS)
    left = to_do(runs, RESULTS, args.again)
    print(f"{len(runs)} runs asked for, {len(runs) - len(left)} have a result, {len(left)} to do")
    signal.signal(signal.SIGTERM, stop)
    status = run_all(left, args.overrides, args.again)
    print(render(read_results(RESULTS)))
    return status


if __name__ == "__main__":
    run_cli(main)
