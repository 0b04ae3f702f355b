"""Can K-2:4 recover the masks of four teachers that share a matrix? teachers.md tells more.

    python exp/k24/teachers.py                       (all arms, seed 0; what is there is kept)
    python exp/k24/teachers.py --arms k24,no-div --seeds 0,1,2
    python exp/k24/teachers.py --quick               (50 steps of the main arms, nothing kept)
    python exp/k24/teachers.py --table

A cut call goes on with the runs that are missing when it is given again.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from teachers_arms import ARMS, MAIN
from teachers_train import train

from tiny_onn.errors import UserError, run_cli
from tiny_onn.files import atomic_write_text, ensure_writable_dir
from tiny_onn.sweep.choices import choose_arms, choose_seeds
from tiny_onn.training.provenance import code_version

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "exp" / "results"
STEPS, QUICK_STEPS = 1000, 50


def result_path(arm: str, seed: int) -> Path:
    """Where a run is written down."""
    return RESULTS / f"k24_teachers_{arm}_seed{seed}.json"


def is_there(path: Path, steps: int) -> bool:
    """Whether this run is written down.

    Raises:
        UserError: with another number of steps.
    """
    if not path.exists():
        return False
    found = json.loads(path.read_text())["steps"]
    if found != steps:
        raise UserError(
            f"got --steps {steps}, but {path.name} has {found}; expected the same; "
            f"delete it or give --steps {found}"
        )
    return True


def run_all(arms: list[str], seeds: list[int], steps: int, keep: bool = True) -> None:
    """Train what is missing, arm by arm; seeds are the outer loop."""
    if keep:
        ensure_writable_dir(RESULTS)
    wanted = [(seed, arm) for seed in seeds for arm in arms]
    have = {w for w in wanted if keep and is_there(result_path(w[1], w[0]), steps)}
    about = {
        **code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    for seed, arm in wanted:
        if (seed, arm) in have:
            print(f"{result_path(arm, seed).name}: there already")
            continue
        found = {"arm": arm, **train(ARMS[arm], seed, steps), **about}
        if keep:
            atomic_write_text(result_path(arm, seed), json.dumps(found))
        print(
            f"{arm} seed {seed}: loss {found['loss']:.4f}, groups {found['groups']:.1%}, "
            f"{found['seconds']:.0f} s",
            flush=True,
        )


def load_results() -> dict[str, list[dict[str, Any]]]:
    """Arm -> its runs by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in ARMS:
        paths = sorted(RESULTS.glob(f"k24_teachers_{arm}_seed*.json"))
        if paths:
            found[arm] = [json.loads(path.read_text()) for path in paths]
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; means over the seeds, least and largest in brackets."""
    lines = [
        "| student | seeds | loss / irreducible | entries as the teacher's | groups | "
        "flips, % of entries in 2% of the steps: first, middle, last | drawn as likeliest, last | "
        "mask overlap (teachers') | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        cells = [ARMS[arm].label, str(len(runs)), _spread(runs, "loss", "{:.3f}")]
        cells += [_spread(runs, name, "{:.1%}") for name in ("entries", "groups")]
        cells += [_flips(runs), _agreement(runs)]
        overlap, own = (mean(run[name] for run in runs) for name in ("overlap", "teachers_overlap"))
        cells += [f"{overlap:.2f} ({own:.2f})", f"{mean(run['seconds'] for run in runs):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(runs: list[dict[str, Any]], name: str, form: str) -> str:
    values = [run[name] for run in runs]
    text = form.format(mean(values))
    if len(values) < 2 or form.format(min(values)) == form.format(max(values)):
        return text
    return f"{text} ({form.format(min(values))} to {form.format(max(values))})"


def _flips(runs: list[dict[str, Any]]) -> str:
    counts = [[row["flips"] for row in run["history"][1:]] for run in runs]
    places = [(c[0], c[len(c) // 2], c[-1]) for c in counts]
    return ", ".join(f"{100 * mean(p):.1f}" for p in zip(*places, strict=True))


def _agreement(runs: list[dict[str, Any]]) -> str:
    last = [run["history"][-1].get("agreement") for run in runs]
    return "" if None in last else f"{mean(last):.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms, a,b")
    parser.add_argument("--seeds", default="0", help="0,1,2")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of every arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="try the main arms, keep nothing")
    parser.add_argument("--table", action="store_true", help="the table of what there is")
    args = parser.parse_args()
    if args.steps < 1 or args.threads < 1:
        raise UserError(
            f"got --steps {args.steps} --threads {args.threads}; expected at least 1; change it"
        )
    torch.set_num_threads(args.threads)
    if args.quick:
        run_all(list(MAIN), [0], QUICK_STEPS, keep=False)
        return
    if not args.table:
        run_all(choose_arms(args.arms, ARMS), choose_seeds(args.seeds), args.steps)
    results = load_results()
    if not results:
        raise UserError(
            "got --table, but there are no results; expected some; run it without --table first"
        )
    print(table(results))


if __name__ == "__main__":
    run_cli(main)
