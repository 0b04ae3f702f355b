"""What each sparse part buys on the nano tasks, and what it costs, against its absence.

    python exp/ablation/sparse_parts.py [--arms dense,all] [--seeds 0,1,2]
                                        [--minutes 10 | --tokens 6e6] [--again]
                                        [--threads 2] [--jobs 1]
    python exp/ablation/sparse_parts.py --table
    python exp/ablation/sparse_parts.py --tag NAME key=value ...    (other settings, kept apart)

Every run is ``train.py preset=nano`` with the tests of the *training* tasks held out and its parts
switched on and off; evaluation answers are never read. A run whose result lies in exp/results is
skipped; Ctrl-C keeps what is finished, and the same command goes on. Results of other --threads
and --jobs are kept apart: on two cores ``--threads 1 --jobs 2`` takes half the time of the default,
and every run gets one core. Protocol: README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from arms import ARMS, OWN_KEYS, Budget, Run, choose_budget
from table import read_results, render

from tiny_onn.config.load import load_config
from tiny_onn.errors import run_cli
from tiny_onn.files import atomic_write_text, ensure_writable_dir
from tiny_onn.sweep.children import Training, start, thread_settings
from tiny_onn.sweep.choices import check_cores, check_overrides, choose_arms, choose_seeds
from tiny_onn.sweep.eta import progress
from tiny_onn.sweep.run_queue import report, work_through
from tiny_onn.sweep.source import code_changed

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "exp" / "results"
CODE = ("tiny_onn", "kernels", "configs", "train.py", "exp/ablation")
"""What decides a result: local changes elsewhere do not make it "-dirty"."""


def plan(
    arms: Sequence[str],
    seeds: Sequence[int],
    budget: Budget,
    tag: str,
    threads: int = 2,
    jobs: int = 1,
) -> list[Run]:
    """Seed by seed, so that what is cut short still compares all arms."""
    return [Run(arm, budget, seed, tag, threads, jobs) for seed in seeds for arm in arms]


def to_do(runs: Sequence[Run], folder: Path, again: bool) -> list[Run]:
    """The runs whose result is missing; all of them with ``again``."""
    return [run for run in runs if again or not run.result_path(folder).exists()]


def begin(run: Run, words: list[str], again: bool) -> Training:
    """Start one; ``again``: in an empty folder, its old result gone, so that it can go on if it is
    stopped. Beside others it writes to a file."""
    if again:
        shutil.rmtree(ROOT / "runs" / "ablation" / run.name, ignore_errors=True)
        run.result_path(RESULTS).unlink(missing_ok=True)
    log = ROOT / "runs" / "ablation" / f"{run.name}.log" if run.jobs > 1 else None
    return start(run, words, ROOT, code_changed(ROOT, CODE), log)


def finish(training: Training, status: int, extra: list[str]) -> str:
    """Measure and write the result; "" or why there is none."""
    run = training.run
    if status != 0:
        where = f", see {training.log.relative_to(ROOT)}" if training.log else ""
        return f"{run.name} (train.py ended with status {status}{where})"
    seconds = time.monotonic() - training.began
    from measure import result_of  # imports torch, which refusing bad arguments needs not

    path = run.result_path(RESULTS)
    result = result_of(run, training.words, extra, seconds, training.changed)
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}", flush=True)
    return ""


def run_all(runs: list[Run], extra: list[str], again: bool) -> int:
    """All of them, jobs at once, whatever becomes of one.

    Returns:
        Exit status: 0, 1 if one failed, 130 and 143 after Ctrl-C and SIGTERM.
    """
    # Settings that some arm cannot have end it here, before any work.
    batch_tokens = [load_config(run.words(extra, 1)).data.batch_tokens for run in runs]

    def begin_next(number: int) -> Training:
        run = runs[number]
        print(progress(number, runs, read_results(RESULTS)), flush=True)
        return begin(run, run.words(extra, batch_tokens[number]), again)

    signum, failed = work_through(
        len(runs),
        runs[0].jobs if runs else 1,
        begin_next,
        lambda training, status: finish(training, status, extra),
    )
    return report(signum, failed, len(runs), again)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--arms", default=",".join(ARMS), help=f"some of {', '.join(ARMS)}")
    made.add_argument("--seeds", default="0,1,2")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="wall clock of every run (default 10)")
    budget.add_argument("--tokens", type=float, help="training tokens of every run instead")
    made.add_argument("--again", action="store_true", help="redo runs that have a result")
    made.add_argument("--threads", type=int, default=2, help="of every run (default 2)")
    made.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    made.add_argument("--table", action="store_true", help="only print the table")
    made.add_argument("--tag", default="", help="names the settings given as key=value")
    made.add_argument("overrides", nargs="*", help="key=value for train.py; needs --tag")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.table:
        print(render(read_results(RESULTS)))
        return 0
    check_overrides(args.overrides, args.tag, OWN_KEYS)
    minutes = 10.0 if args.minutes is None and args.tokens is None else args.minutes
    budget = choose_budget(minutes, args.tokens)
    timed = budget.minutes is not None
    check_cores(args.threads, args.jobs, timed, os.cpu_count() or 1)
    arms, seeds = choose_arms(args.arms, ARMS), choose_seeds(args.seeds)
    runs = plan(arms, seeds, budget, args.tag, args.threads, args.jobs)
    ensure_writable_dir(RESULTS)
    left = to_do(runs, RESULTS, args.again)
    print(f"{len(runs)} runs asked for, {len(runs) - len(left)} have a result, {len(left)} to do")
    os.environ.update(thread_settings(args.threads))  # for measuring, in this process
    status = run_all(left, args.overrides, args.again)
    print(render(read_results(RESULTS)))
    return status


if __name__ == "__main__":
    run_cli(main)
