"""What 2:4 sparsity costs and buys on the nano tasks, against dense weights.

    python exp/k24/arc.py --arms weights --steps 900 [--seeds 0,1,2] [--threads 1] [--jobs 2]
    python exp/k24/arc.py --arms sharing,dense --minutes 8
    python exp/k24/arc.py --arms activations --steps 900
    python exp/k24/arc.py --table
    python exp/k24/arc.py --arms k24 --steps 900 --tag NAME key=value ...     (other settings)

Every run is ``train.py preset=nano`` with the tests of the *training* tasks held out; evaluation
answers are never read. A run whose result lies in exp/results is skipped; Ctrl-C keeps what is
finished, and the same command goes on. Protocol: README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from arms import (
    ARMS,
    OWN_KEYS,
    PARTS,
    Budget,
    Run,
    choose_budget,
    expand,
)
from table import read_results, render

from tiny_onn.config.load import load_config
from tiny_onn.errors import UserError, run_cli
from tiny_onn.files import atomic_write_text, ensure_writable_dir
from tiny_onn.sweep.children import Training, start, thread_settings
from tiny_onn.sweep.choices import check_cores, check_overrides, choose_arms, choose_seeds
from tiny_onn.sweep.eta import progress
from tiny_onn.sweep.run_queue import report, work_through
from tiny_onn.sweep.source import code_changed

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "exp" / "results"
CODE = ("tiny_onn", "kernels", "configs", "train.py", "exp/k24")
"""What decides a result: local changes elsewhere do not make it "-dirty"."""

SCRIPT = "exp/k24/train_observed.py"


def plan(
    arms: Sequence[str], seeds: Sequence[int], budget: Budget, tag: str, threads: int, jobs: int
) -> list[Run]:
    """Seed by seed, so that what is cut short still compares all arms."""
    return [Run(arm, budget, seed, tag, threads, jobs) for seed in seeds for arm in arms]


def to_do(runs: Sequence[Run], folder: Path, again: bool) -> list[Run]:
    """The runs whose result is missing; all of them with ``again``."""
    return [run for run in runs if again or not run.result_path(folder).exists()]


def begin(run: Run, words: list[str], again: bool) -> Training:
    """Start one; ``again``: in an empty folder, its old result gone, so that it can go on if it is
    stopped. Beside others it writes to a file."""
    folder = run.folder(ROOT)
    if again:
        shutil.rmtree(folder, ignore_errors=True)
        run.result_path(RESULTS).unlink(missing_ok=True)
    log = folder.with_name(f"{run.name}.log") if run.jobs > 1 else None
    words = [str(run.budget.observe_steps), *words]
    return start(run, words, ROOT, code_changed(ROOT, CODE), log, SCRIPT)


def write(run: Run, result: dict) -> None:
    path = run.result_path(RESULTS)
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}", flush=True)


def finish(training: Training, status: int, extra: list[str]) -> str:
    """Measure and write the result; "" or why there is none."""
    run = training.run
    if status != 0:
        where = f", see {training.log.relative_to(ROOT)}" if training.log else ""
        return f"{run.name} (training ended with status {status}{where})"
    seconds = time.monotonic() - training.began
    from measure import result_of  # imports torch, which refusing bad arguments needs not

    _, *words = training.words
    write(run, result_of(run, ROOT, words, extra, seconds, training.changed))
    return ""


def prune_all(runs: Sequence[Run]) -> list[str]:
    """Results of the arms that are pruned, here and one by one; why some have none."""
    if not runs:
        return []
    from measure import pruned_result

    failed = []
    for run in runs:
        began, changed = time.monotonic(), code_changed(ROOT, CODE)
        print(f"pruning for {run.name}", flush=True)
        try:
            result = pruned_result(run, ROOT, RESULTS)
        except UserError as error:
            failed.append(f"{run.name} ({error})")
            print(f"failed: {failed[-1]}; going on with the others", flush=True)
            continue
        minutes = round((time.monotonic() - began) / 60, 3)
        write(run, result | {"minutes_command": minutes, "dirty_at_pruning": changed})
    return failed


def run_all(runs: list[Run], extra: list[str], again: bool) -> int:
    """All of them, jobs at once, whatever becomes of one; what is pruned comes last.

    Returns:
        Exit status: 0, 1 if one failed, 130 and 143 after Ctrl-C and SIGTERM.
    """
    trained = [run for run in runs if not ARMS[run.arm].pruned_by]
    pruned = [run for run in runs if ARMS[run.arm].pruned_by]
    for run in trained:  # settings that some arm cannot have end it here, before any work
        load_config(run.words(extra))

    def begin_next(number: int) -> Training:
        print(progress(number, trained, read_results(RESULTS)), flush=True)
        return begin(trained[number], trained[number].words(extra), again)

    signum, failed = work_through(
        len(trained),
        runs[0].jobs if runs else 1,
        begin_next,
        lambda training, status: finish(training, status, extra),
    )
    if signum is None:
        failed += prune_all(pruned)
    return report(signum, failed, len(runs), again)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = f"parts {', '.join(PARTS)}; arms {', '.join(ARMS)}"
    made.add_argument("--arms", default="weights", help=f"{known} (default weights)")
    made.add_argument("--seeds", default="0,1,2")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="optimizer steps of every run (default 900)")
    budget.add_argument("--minutes", type=float, help="wall clock of every run instead")
    made.add_argument("--again", action="store_true", help="redo runs that have a result")
    made.add_argument("--threads", type=int, default=1, help="of every run (default 1)")
    made.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    made.add_argument("--table", action="store_true", help="only print the tables")
    made.add_argument("--tag", default="", help="names the settings given as key=value")
    made.add_argument("overrides", nargs="*", help="key=value for train.py; needs --tag")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.table:
        print(render(read_results(RESULTS)))
        return 0
    check_overrides(args.overrides, args.tag, OWN_KEYS)
    steps = 900 if args.minutes is None and args.steps is None else args.steps
    budget = choose_budget(args.minutes, steps)
    timed = budget.minutes is not None
    check_cores(args.threads, args.jobs, timed, os.cpu_count() or 1)
    arms, seeds = choose_arms(expand(args.arms), ARMS), choose_seeds(args.seeds)
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
