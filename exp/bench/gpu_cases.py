"""Named cases of a GPU benchmark: each is built, checked, and only then timed.

A red check is the case's result and nothing of it is timed. Arms are timed in turn, round by round,
so that their ratios are pairs of neighbours, the L2 cache flushed before every call. First calls,
that compile, are recorded apart. Running out of memory is an arm's result, and so is an arm that
cannot run here. :mod:`gpu_run` goes through the cases.

Import it before ``tiny_onn_kernels``: without a GPU it sends the kernels to the interpreter.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from gpu_stopwatch import Call, Stopwatch, summary
from timing import relative_error
from torch import Tensor

if not torch.cuda.is_available():  # read when kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

FEWEST_ROUNDS, MOST_ROUNDS, QUICK_ROUNDS = 3, 40, 2


class Wrong(Exception):
    """A check that came out red."""


class Unavailable(Exception):
    """An arm that cannot run here; the message says why."""


@dataclass(frozen=True)
class Arm:
    """make: sets up what is not timed and returns what is; raises Unavailable. ours: any other
    error fails the case; a rival's is recorded."""

    make: Callable[[], Call]
    ours: bool = False


@dataclass(frozen=True)
class Work:
    """A case on the device.

    check: errors found, by name, or Wrong; ratios: name to the arms (slow, fast) whose times are
    divided, so above 1 the second is faster; targets: least ratio wanted; derive: what follows from
    the seconds of every timed arm (median), such as TFLOP/s.
    """

    arms: Mapping[str, Arm]
    check: Callable[[], Mapping[str, float]]
    ratios: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    derive: Callable[[Mapping[str, float]], Mapping[str, Any]] = lambda seconds: {}


@dataclass(frozen=True)
class Case:
    """shapes: plain numbers, for the record; build: given the device; memory: measure peaks;
    limit_s: of the timed rounds."""

    name: str
    shapes: Mapping[str, Any]
    build: Callable[[torch.device], Work]
    memory: bool = False
    limit_s: float = 5.0


def agree(what: str, got: Tensor, expected: Tensor, bound: float) -> float:
    """Relative RMS error; raises Wrong above ``bound`` or where something is not finite."""
    error = relative_error(got, expected)
    if not error <= bound:
        raise Wrong(f"{what}: relative RMS error {error:.3g}, expected at most {bound:g}")
    return error


def same_bits(what: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Raises Wrong unless both runs gave the same finite numbers."""
    for a, b in zip(first, second, strict=True):
        if not bool(torch.isfinite(a).all()):
            raise Wrong(f"{what}: not finite")
        if not torch.equal(a, b):
            raise Wrong(f"{what}: two runs differ")


def graphed(call: Call) -> Call:
    """``call`` recorded in a CUDA graph; its replay. Raises Unavailable on a CPU."""
    if not torch.cuda.is_available():
        raise Unavailable("CUDA graphs need a CUDA device")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def _first_call(arm: Arm, watch: Stopwatch, memory: bool) -> tuple[Call | None, dict[str, Any]]:
    """The arm ready to be timed, or why not."""
    try:
        call, setup_s = watch.wall(arm.make)
        _, first_s = watch.wall(call)
        peak_mib, again_s = watch.wall(lambda: watch.peak_mib(call))
        found = {"first_call_s": round(setup_s + first_s, 3), "again_s": again_s}
        return call, found | ({"peak_mib": peak_mib} if memory else {})
    except torch.OutOfMemoryError as error:
        return None, {"status": "out of memory", "why": _line(error)}
    except Unavailable as error:
        return None, {"status": "unavailable", "why": _line(error)}
    except Exception as error:  # of a rival, whatever it is: no reason to lose ours
        if arm.ours:
            raise
        return None, {"status": "error", "why": _line(error)}


def time_arms(
    case: Case, work: Work, watch: Stopwatch, quick: bool, left_s: float
) -> dict[str, Any]:
    """Results of all arms, ratios and what is derived; rounds end with the case's limit, or the
    budget's, but not before FEWEST_ROUNDS."""
    arms, calls = {}, {}
    for name, arm in work.arms.items():
        call, arms[name] = _first_call(arm, watch, case.memory)
        if call is not None:
            calls[name] = call
        elif watch.cuda:
            torch.cuda.empty_cache()
    round_s = max(sum(arms[name].pop("again_s") for name in calls), 1e-6)
    rounds = QUICK_ROUNDS if quick else int(min(case.limit_s, left_s) / round_s)
    rounds = rounds if quick else max(FEWEST_ROUNDS, min(MOST_ROUNDS, rounds))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds if calls else 0):
        for name, value in watch.round(calls, backwards=number % 2 == 1).items():
            seconds[name].append(value)
    for name, values in seconds.items():
        arms[name] |= {"status": "timed", "ms": summary(values, 1e3)}
    ratios = {}
    for name, (slow, fast) in work.ratios.items():
        if slow in seconds and fast in seconds:
            pairs = zip(seconds[slow], seconds[fast], strict=True)
            ratios[name] = summary([a / b for a, b in pairs])
            if name in work.targets:
                ratios[name]["target"] = work.targets[name]
    medians = {name: median(values) for name, values in seconds.items()}
    return {"arms": arms, "ratios": ratios, "derived": dict(work.derive(medians))}


def measure_case(case: Case, watch: Stopwatch, quick: bool, left_s: float) -> dict[str, Any]:
    """One case's record: status done, failed (with its error) or out of memory."""
    began, found = watch.clock(), {"status": "done", "shapes": dict(case.shapes)}
    try:
        work = case.build(watch.device)
        found["checks"] = dict(work.check())
        left_s -= watch.clock() - began
        found |= time_arms(case, work, watch, quick, left_s)
    except torch.OutOfMemoryError as error:
        found |= {"status": "out of memory", "why": _line(error)}
    except Exception as error:  # whatever a new kernel does: recorded, and the next case's turn
        found |= {"status": "failed", "why": f"{type(error).__name__}: {_line(error)}"}
    work = None
    gc.collect()
    return found | {"seconds": round(watch.clock() - began, 2)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]
