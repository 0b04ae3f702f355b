"""A GPU benchmark within a budget: its cases one after the other, written one by one.

A script hands :func:`run` its cases. A rerun of the same sources on the same device skips what is
finished; what the budget leaves out is listed as not reached; a case that failed makes the exit
status 1. An error that the device does not recover from (an illegal access) ends no run: the script
starts itself again behind the case that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case, measure_case
from gpu_stopwatch import Stopwatch
from timing import commit, device_name

from tiny_onn.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[2]
FINISHED = ("done", "out of memory")


class Results:
    """exp/results/bench_<name>.json, written whole after every case; a smoke test's below runs/."""

    def __init__(self, name: str, quick: bool, provenance: Mapping[str, Any], fresh: bool) -> None:
        folder = ROOT / "runs" / "bench_quick" if quick else ROOT / "exp" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"bench_{name}.json"
        self.head = {"benchmark": name, "quick": quick, **provenance}
        self.cases: dict[str, Any] = {}
        if not fresh and self.path.exists():
            old = json.loads(self.path.read_text())
            same = ("sources", "device", "torch", "triton")
            if all(old.get(key) == self.head[key] for key in same):
                self.cases = old["cases"]

    def finished(self, name: str) -> bool:
        return self.cases.get(name, {}).get("status") in FINISHED

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        self.cases[name] = dict(found)
        atomic_write_text(self.path, json.dumps(self.head | {"cases": self.cases}, indent=1) + "\n")


def provenance(device: torch.device, sources: Sequence[str]) -> dict[str, Any]:
    """What a result belongs to; sources: a digest of the files that these patterns name, since a
    lent machine may have no history, and an uncommitted change no commit."""
    digest = hashlib.sha256()
    patterns = ("exp/bench/gpu_*.py", *sources)
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return {
        "commit": commit("kernels", "exp/bench"),
        "sources": digest.hexdigest()[:16],
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__,
    }


def read_arguments(
    description: str, minutes: float, add_options: Callable[[argparse.ArgumentParser], None] | None
) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--minutes", type=float, default=minutes, help="budget; default %(default)s")
    made.add_argument("--quick", action="store_true", help="smoke test: tiny, on a CPU too")
    made.add_argument("--only", metavar="TEXT", help="cases whose names contain it")
    made.add_argument("--again", action="store_true", help="finished cases too")
    made.add_argument("--list", action="store_true", help="names of the cases, nothing else")
    made.add_argument("--after", metavar="CASE", help=argparse.SUPPRESS)
    made.add_argument("--spent", type=float, default=0.0, help=argparse.SUPPRESS)
    if add_options is not None:
        add_options(made)
    return made.parse_args()


def run(
    name: str,
    description: str,
    make_cases: Callable[[argparse.Namespace], Sequence[Case]],
    report: Callable[[Mapping[str, Any]], None],
    *,
    minutes: float,
    sources: Sequence[str],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure what is left of the cases; the exit status: 1 if one failed, 2 without a device.

    make_cases: given the arguments, in order of importance, nothing allocated; report: prints
    tables, given the records of the file by name of the case; sources: patterns of files that a
    result depends on.
    """
    began, args = clock(), read_arguments(description, minutes, add_options)
    cases = [case for case in make_cases(args) if args.only is None or args.only in case.name]
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    device = _device(args.quick)
    if device is None:
        print("error: torch sees no CUDA device; --quick is a smoke test on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    fresh = args.quick and args.after is None
    results = Results(name, args.quick, provenance(device, sources), fresh)
    watch = Stopwatch(device, clock)
    names = [case.name for case in cases]
    todo = cases[names.index(args.after) + 1 :] if args.after is not None else cases
    skipped = [case for case in todo if results.finished(case.name) and not args.again]
    todo = [case for case in todo if case not in skipped]
    if skipped:
        print(f"{len(skipped)} of {len(cases)} cases are finished already; --again measures anew")
    budget_s, not_reached = 60 * args.minutes, []
    for number, case in enumerate(todo):
        spent_s = clock() - began + args.spent
        if spent_s >= budget_s:
            not_reached = [case.name for case in todo[number:]]
            break
        found = measure_case(case, watch, args.quick, budget_s - spent_s)
        results.add(case.name, found)
        spent_s = clock() - began + args.spent
        to_go_s = (spent_s - args.spent) / (number + 1) * (len(todo) - number - 1)
        print(
            f"[{number + 1}/{len(todo)}] {case.name}: {found['status']}, {found['seconds']:.1f} s; "
            f"{spent_s:.0f} of {budget_s:.0f} s, about {to_go_s:.0f} to go"
            + (f"\n  {found['why']}" if "why" in found else ""),
            flush=True,
        )
        if _lost(device):
            _start_again(case.name, spent_s)
    report(results.cases)
    return _finish(results, names, len(skipped), not_reached)


def _device(quick: bool) -> torch.device | None:
    """Where to measure; None if nowhere."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu") if quick else None


def _lost(device: torch.device) -> bool:
    """Whether the device answers no more in this process; else its cached memory is given back."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _start_again(after: str, spent_s: float) -> None:
    """This script anew, with a device context of its own, behind the case that lost the last."""
    print(f"the device is lost to this process: starting again behind '{after}'", flush=True)
    words, given = [sys.executable], iter(sys.argv)
    for word in given:
        if word in ("--after", "--spent"):
            next(given)
        else:
            words.append(word)
    sys.stdout.flush()
    os.execv(sys.executable, [*words, "--after", after, "--spent", f"{spent_s:.0f}"])


def _finish(
    results: Results, names: Sequence[str], num_skipped: int, not_reached: Sequence[str]
) -> int:
    """Count what came out of the named cases, and say so."""
    records = {name: results.cases[name] for name in names if name in results.cases}
    states = Counter(record["status"] for record in records.values())
    arms = Counter(
        arm["status"] for record in records.values() for arm in record.get("arms", {}).values()
    )
    for what, counted in (("cases", states), ("arms", arms)):
        print(f"{what}: " + ", ".join(f"{count} {state}" for state, count in counted.items()))
    reasons = {
        (arm["status"], name, arm["why"])
        for record in records.values()
        for name, arm in record.get("arms", {}).items()
        if "why" in arm
    }
    for state, name, why in sorted(reasons):
        print(f"  {name}: {state}: {why}")
    if num_skipped:
        print(f"finished before: {num_skipped}")
    if not_reached:
        print(f"not reached in the budget, a rerun goes on there: {', '.join(not_reached)}")
    failed = [name for name, record in records.items() if record["status"] == "failed"]
    for name in failed:
        print(f"FAILED {name}: {records[name]['why']}")
    print(f"written: {results.path.relative_to(ROOT)}")
    return 1 if failed else 0
