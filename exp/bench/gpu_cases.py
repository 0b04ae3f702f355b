"""Named cases of a GPU benchmark: each is built, checked, and only then timed.

A red check is the case's result and nothing of it is timed. Arms are timed in turn, round by round,
so that their ratios are pairs of neighbours, the L2 cache flushed before every call. First calls,
that compile, are recorded apart. What an arm's error means depends on whose it is (:class:`Arm`);
our programs are called first, rivals next, graphs and compiled programs last, since each of these
may spoil what follows. :mod:`gpu_run` goes through the cases.

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
from gpu_stopwatch import Call, Stopwatch
from timing import percentiles, relative_error
from torch import Tensor

if not torch.cuda.is_available():  # read when kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

FEWEST_ROUNDS, MOST_ROUNDS, QUICK_ROUNDS = 3, 40, 2


class Wrong(Exception):
    """A check that came out red."""


class Unavailable(Exception):
    """An arm that cannot run here; the message says why."""


class NotAtHand(Unavailable):
    """An arm that would run with --third-party, or another folder there."""


STATUS_OF = {
    Wrong: "wrong",
    Unavailable: "unavailable",
    torch.OutOfMemoryError: "out of memory",
}
"""Of an arm by its error; "error" of any other."""


class DeviceLost(Exception):
    """The device answers no more in this process: an illegal access, mostly."""


@dataclass(frozen=True)
class Arm:
    """One program, and what becomes of its errors.

    make: sets up what is not timed and returns what is; raises Unavailable where it cannot run and
    Wrong where it gives something else than it should. Unavailable is always the arm's result.

        a rival                     any error is the arm's result
        ours                        any error fails the case, running out of memory too
        ours, wrapped               Wrong fails the case; any other error is the arm's result

    wrapped: in a CUDA graph or by torch.compile, which may refuse what runs without.
    """

    make: Callable[[], Call]
    ours: bool = False
    wrapped: bool = False

    def fails_the_case(self, error: Exception) -> bool:
        if isinstance(error, Unavailable):
            return False
        return self.ours and (isinstance(error, Wrong) or not self.wrapped)


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


def graphed(call: Callable[[], Any], compare: Callable[[Sequence[Tensor]], Any]) -> Call:
    """``call`` (of tensors) recorded in a CUDA graph; its replay.

    Two replays must each write every output anew: ``compare``, given them, raises Wrong. Leaves
    that ``call`` differentiates should be its own (``tensor.detach().requires_grad_()``): one whose
    gradient waits in a graph made elsewhere would draw that stream into the recording.

    Raises:
        Unavailable: on a CPU.
    """
    if not torch.cuda.is_available():
        raise Unavailable("CUDA graphs need a CUDA device")
    side, stream = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            got = call()
            kept = [t.detach() for t in ([got] if isinstance(got, Tensor) else got)]
            del got  # and with it autograd's nodes
    finally:
        torch.cuda.set_stream(stream)  # a recording that fails may leave its own
    compare_replays(graph.replay, kept, compare)

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return kept

    return replay


def compare_replays(
    replay: Call, outputs: Sequence[Tensor], compare: Callable[[Sequence[Tensor]], Any]
) -> None:
    """Twice: what is no number in all ``outputs``, a replay, ``compare``."""
    for _ in range(2):
        for tensor in outputs:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**20))
        replay()
        compare(outputs)


def _first_call(arm: Arm, watch: Stopwatch, memory: bool) -> tuple[Call | None, dict[str, Any]]:
    """The arm ready to be timed, or why not. Raises DeviceLost, and errors that fail the case."""
    try:
        call, setup_s = watch.wall(arm.make)
        _, first_s = watch.wall(call)
        peak_mib, again_s = watch.wall(lambda: watch.peak_mib(call))
        found = {"first_call_s": round(setup_s + first_s, 3), "again_s": again_s}
        return call, found | ({"peak_mib": peak_mib} if memory else {})
    except Exception as error:  # of a rival, whatever it is: no reason to lose ours
        if not watch.answers():
            raise DeviceLost(_line(error)) from error
        if arm.fails_the_case(error):
            raise
        found = {"status": "error", "why": _line(error)}
        for kind, status in STATUS_OF.items():
            if isinstance(error, kind):
                found["status"] = status
        return None, found | ({"wants": "--third-party"} if isinstance(error, NotAtHand) else {})


def time_arms(
    case: Case,
    work: Work,
    watch: Stopwatch,
    quick: bool,
    left_s: float,
    found: dict[str, Any],
    ours_only: bool,
) -> None:
    """Put results of all arms, ratios and what is derived into ``found``; rounds end with the
    case's limit, or the budget's, but not before FEWEST_ROUNDS."""
    arms, calls, again_s = {}, {}, 0.0
    found |= {"arms": arms, "ratios": {}, "derived": {}}
    order = sorted(work.arms.items(), key=lambda item: (item[1].wrapped, not item[1].ours))
    for name, arm in order:
        if ours_only and not arm.ours:
            arms[name] = {"status": "left out"}
            continue
        found["at"] = name
        found["rivals_took_part"] |= not arm.ours
        call, about = _first_call(arm, watch, case.memory)
        again_s += about.pop("again_s", 0.0)
        arms[name] = about
        if call is not None:
            calls[name] = call
        elif watch.cuda:
            torch.cuda.empty_cache()
    found["at"] = "timed rounds"
    rounds = QUICK_ROUNDS if quick else int(min(case.limit_s, left_s) / max(again_s, 1e-6))
    rounds = rounds if quick else max(FEWEST_ROUNDS, min(MOST_ROUNDS, rounds))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds if calls else 0):
        for name, value in watch.round(calls, backwards=number % 2 == 1).items():
            seconds[name].append(value)
    for name, values in seconds.items():
        arms[name] |= {"status": "timed", "ms": percentiles(values, 1e3)}
    for name, (slow, fast) in work.ratios.items():
        if slow in seconds and fast in seconds:
            pairs = zip(seconds[slow], seconds[fast], strict=True)
            found["ratios"][name] = percentiles([a / b for a, b in pairs])
            if name in work.targets:
                found["ratios"][name]["target"] = work.targets[name]
    found["at"] = "what is derived"
    found["derived"] = dict(work.derive({name: median(s) for name, s in seconds.items()}))


def record_of(case: Case) -> dict[str, Any]:
    """Of a case not yet measured. at: what runs; rivals_took_part: before that, or now."""
    return {"shapes": dict(case.shapes), "at": "set-up", "rivals_took_part": False}


def measure_case(
    case: Case,
    watch: Stopwatch,
    quick: bool,
    left_s: float,
    found: dict[str, Any],
    ours_only: bool = False,
) -> None:
    """Fill a case's record: status done or failed (with its error, and what ran then). Out of
    memory, but in a rival, is failed too."""
    began = watch.clock()
    try:
        work = case.build(watch.device)
        found["at"] = "check"
        found["checks"] = dict(work.check())
        left_s -= watch.clock() - began
        time_arms(case, work, watch, quick, left_s, found, ours_only)
        found["status"] = "done"
        del found["at"]
    except Exception as error:  # whatever a new kernel does: recorded, and the next case's turn
        found |= {"status": "failed", "why": f"{type(error).__name__}: {_line(error)}"}
    work = None
    gc.collect()
    found["seconds"] = round(watch.clock() - began, 2)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]
