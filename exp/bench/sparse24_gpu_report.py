"""Tables of the 2:4 GPU benchmark, and from which product on sparse wins; they need no device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timing import print_table

ONCE, ANEW, ACTIVATIONS = "weights once", "weights anew", "activations"
QUESTIONS = (ONCE, ANEW, ACTIVATIONS)
SPARSE = ("CUTLASS", "cuSPARSELt")

Record = Mapping[str, Any]


def gain(record: Record) -> float | None:
    """How many times faster than dense the faster sparse arm is; None where none was timed."""
    found = [record.get("ratios", {}).get(f"dense / {name}") for name in SPARSE]
    return max((ratio["median"] for ratio in found if ratio is not None), default=None)


def break_even(records: Mapping[str, Record], question: str) -> str:
    """From which product on sparse wins at every larger one that was measured."""
    timed = [
        (record["derived"]["gflop"], name, gain(record))
        for name, record in records.items()
        if record.get("derived", {}).get("question") == question and gain(record) is not None
    ]
    if not timed:
        return f"{question}: no sparse product ran here"
    winning = None
    for gflop, name, ratio in sorted(timed, reverse=True):
        if ratio <= 1:
            break
        winning = (gflop, name, ratio)
    if winning is None:
        return f"{question}: dense wins at the largest product, and so everywhere: use dense"
    gflop, name, ratio = winning
    return f"{question}: sparse wins from {gflop:.1f} GFLOP on ({name}, {ratio:.2f}x); below, dense"


def report(records: Mapping[str, Record]) -> None:
    """Times in ms of every arm, the gain over dense with packing, and the break-even."""
    rows = []
    for name, record in records.items():
        for arm, found in record.get("arms", {}).items():
            if "ms" not in found:
                continue
            rate = record["derived"]["tflops"].get(arm)
            ratio = record["ratios"].get(f"dense / {arm}", {}).get("median")
            spread = f"{found['ms']['p5']:.4f}..{found['ms']['p95']:.4f}"
            times = "-" if ratio is None else f"{ratio:.2f}"
            rows.append(
                [
                    name,
                    arm,
                    f"{found['ms']['median']:.4f}",
                    spread,
                    "-" if rate is None else f"{rate:.1f}",
                    times,
                ]
            )
    print_table(["case", "arm", "ms", "p5..p95", "TFLOP/s", "x dense"], rows)
    for question in QUESTIONS:
        print(break_even(records, question))
