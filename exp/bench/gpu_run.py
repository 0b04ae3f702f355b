"""A GPU benchmark within a budget: its cases one after the other, written one by one.

A script hands :func:`run` its cases. A rerun of the same sources on the same device skips what is
finished; what the budget leaves out is listed as not reached; a case that failed makes the exit
status 1.

Two things end no run, the script starts itself again: an error that the device does not recover
from (an illegal access), and a case that takes longer than --case-limit (a hanging kernel). If
rivals took part in it, the case is tried once more with ours only, and its record says so; then the
next one's turn comes.
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
from gpu_cases import Case, measure_case, record_of
from gpu_stopwatch import Stopwatch
from gpu_watchdog import Watchdog, replace_process
from timing import commit, device_name

from tiny_onn.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[2]
SHARED_SOURCES = ("exp/bench/gpu_*.py", "exp/bench/timing.py", "exp/bench/source_tree.py")
CASE_LIMIT_S = 120.0
RESTART_OPTIONS = ("--after", "--ours-only", "--spent")


class Results:
    """exp/results/bench_<name>.json, written whole after every case; a smoke test's below runs/.

    Where the environment's OUT names a folder, there too: what a lent machine brings back even if
    its time is up.
    """

    def __init__(self, name: str, quick: bool, provenance: Mapping[str, Any], fresh: bool) -> None:
        folder = ROOT / "runs" / "bench_quick" if quick else ROOT / "exp" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"bench_{name}.json"
        self.paths, out = [self.path], os.environ.get("OUT")
        if out and Path(out).is_dir():
            self.paths.append(Path(out) / self.path.name)
        self.head = {"benchmark": name, "quick": quick, **provenance}
        self.cases: dict[str, Any] = {}
        if not fresh and self.path.exists():
            old = json.loads(self.path.read_text())
            same = ("sources", "device", "torch", "triton")
            if all(old.get(key) == self.head[key] for key in same):
                self.cases = old["cases"]

    def finished(self, name: str, third_party: str | None) -> bool:
        """Whether nothing is left to measure: a folder of public programs that the record did not
        have lets arms run that it lacks."""
        record = self.cases.get(name, {})
        if record.get("status") != "done":
            return False
        lacks = any("wants" in arm for arm in record.get("arms", {}).values())
        return not lacks or third_party is None or record.get("third_party") == third_party

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        self.cases[name] = dict(found)
        text = json.dumps(self.head | {"cases": self.cases}, indent=1) + "\n"
        for path in self.paths:
            atomic_write_text(path, text)


def provenance(device: torch.device, sources: Sequence[str]) -> dict[str, Any]:
    """What a result belongs to; sources: a digest of the files that these patterns name, since a
    lent machine may have no history, and an uncommitted change no commit."""
    digest = hashlib.sha256()
    patterns = (*SHARED_SOURCES, *sources)
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
    made.add_argument(
        "--case-limit",
        type=float,
        default=CASE_LIMIT_S,
        metavar="S",
        help="seconds after which a case counts as hung; default %(default)s",
    )
    made.add_argument("--after", metavar="CASE", help=argparse.SUPPRESS)
    made.add_argument("--ours-only", metavar="CASE", help=argparse.SUPPRESS)
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
    fresh = args.quick and args.after is None and args.ours_only is None
    results = Results(name, args.quick, provenance(device, sources), fresh)
    names = [case.name for case in cases]
    todo, num_skipped = _left_to_do(cases, results, args)
    if num_skipped:
        print(f"{num_skipped} of {len(cases)} cases are finished already; --again measures anew")
    one = _OneByOne(results, Stopwatch(device, clock), args, began - args.spent)
    budget_s, not_reached = 60 * args.minutes, []
    for number, case in enumerate(todo):
        if one.spent_s() >= budget_s:
            not_reached = [case.name for case in todo[number:]]
            break
        found, lost = one.measure(case, budget_s - one.spent_s())
        to_go_s = (one.spent_s() - args.spent) / (number + 1) * (len(todo) - number - 1)
        print(
            f"[{number + 1}/{len(todo)}] {case.name}: {found['status']}, {found['seconds']:.1f} s; "
            f"{one.spent_s():.0f} of {budget_s:.0f} s, about {to_go_s:.0f} to go"
            + (f"\n  {found['why']}" if "why" in found else ""),
            flush=True,
        )
        if lost:
            one.start_again(case.name, found, "the device is lost to this process")
    report(results.cases)
    return _finish(results, names, num_skipped, not_reached)


def _left_to_do(
    cases: Sequence[Case], results: Results, args: argparse.Namespace
) -> tuple[list[Case], int]:
    """Cases to measure, and how many others are finished."""
    names, todo = [case.name for case in cases], list(cases)
    if args.ours_only is not None:
        todo = todo[names.index(args.ours_only) :]
    elif args.after is not None:
        todo = todo[names.index(args.after) + 1 :]
    third_party = _third_party(args)
    left = [case for case in todo if args.again or not results.finished(case.name, third_party)]
    return left, len(todo) - len(left)


def _third_party(args: argparse.Namespace) -> str | None:
    folder = getattr(args, "third_party", None)
    return None if folder is None else str(folder)


class _OneByOne:
    """Measures single cases and writes their records, whatever they do; starts the script again."""

    def __init__(
        self, results: Results, watch: Stopwatch, args: argparse.Namespace, began: float
    ) -> None:
        self.results, self.watch, self.args, self.began = results, watch, args, began

    def spent_s(self) -> float:
        """Of the budget, before this start of the script too."""
        return self.watch.clock() - self.began

    def measure(self, case: Case, left_s: float) -> tuple[dict[str, Any], bool]:
        """The case's record, which is in the file, and whether the device is lost."""
        found, alone = record_of(case), case.name == self.args.ours_only
        if _third_party(self.args) is not None:
            found["third_party"] = _third_party(self.args)
        if alone:
            first = self.results.cases.get(case.name, {})
            found["ours_only"] = f"with rivals: {first.get('why')} (at {first.get('at')})"
        with Watchdog(self.args.case_limit, lambda: self._give_up(case.name, found)):
            measure_case(case, self.watch, self.args.quick, left_s, found, alone)
            lost = _lost(self.watch)
        if lost and found["status"] == "done":  # after its last call
            found |= {"status": "failed", "why": "the device was lost", "at": "its end"}
        self.results.add(case.name, found)
        return found, lost

    def _give_up(self, name: str, found: Mapping[str, Any]) -> None:
        """Of a case that hangs, in another thread: write it down and start the script again."""
        why = f"hung: not finished in {self.args.case_limit:g} s"
        seen = {"at": "its end"} | dict(found)  # copies: the case may yet go on
        seen["arms"] = dict(found.get("arms", {}))
        seen |= {"status": "failed", "why": why, "seconds": self.args.case_limit}
        self.results.add(name, seen)
        print(f"{name}: {why}, at {seen['at']}", flush=True)
        self.start_again(name, seen, "a case hangs")

    def start_again(self, name: str, found: Mapping[str, Any], why: str) -> None:
        """The script anew, with a device context of its own: at the case that ended the last with
        ours only, if rivals may have been the cause, or else behind it."""
        option = "--ours-only" if found["rivals_took_part"] else "--after"
        what = "at it, with ours only" if found["rivals_took_part"] else "behind it"
        print(f"{why}: starting again {what}: '{name}'", flush=True)
        words, given = [sys.executable], iter(sys.argv)
        for word in given:
            if word in RESTART_OPTIONS:
                next(given)
            else:
                words.append(word)
        replace_process([*words, option, name, "--spent", f"{self.spent_s():.0f}"])


def _device(quick: bool) -> torch.device | None:
    """Where to measure; None if nowhere."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu") if quick else None


def _lost(watch: Stopwatch) -> bool:
    """Whether the device answers no more in this process; else its cached memory is given back."""
    if not watch.answers():
        return True
    if watch.cuda:
        torch.cuda.empty_cache()
    return False


def _finish(
    results: Results, names: Sequence[str], num_skipped: int, not_reached: Sequence[str]
) -> int:
    """Count what came out of the named cases, and say so."""
    records = {name: results.cases[name] for name in names if name in results.cases}
    states = Counter(record["status"] for record in records.values())
    arms = Counter(
        arm.get("status", "not timed")
        for record in records.values()
        for arm in record.get("arms", {}).values()
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
    for name, record in records.items():
        if "ours_only" in record:
            print(f"OURS ONLY {name}: {record['ours_only']}")
    failed = [name for name, record in records.items() if record["status"] == "failed"]
    for name in failed:
        print(f"FAILED {name}: {records[name]['why']} (at {records[name].get('at', '-')})")
    print(
        f"written: {', '.join(str(path) for path in results.paths if path.exists()) or 'nothing'}"
    )
    return 1 if failed else 0
