"""Tables of the 2:4 GPU benchmark, and from which product on sparse wins; they need no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timing import print_table

ONCE, ANEW, ACTIVATIONS = "weights once", "weights anew", "activations"
QUESTIONS = (ONCE, ANEW, ACTIVATIONS)
SPARSE = ("CUTLASS", "cuSPARSELt")
DRAWN, SQUARED = "PyTorch / pattern24", "PyTorch / relu2_24"

Record = Mapping[str, Any]


def gain(record: Record) -> float | None:
    """How many times faster than dense the faster sparse arm is; None where none was timed."""
    found = [record.get("ratios", {}).get(f"dense / {name}") for name in SPARSE]
    return max((ratio["median"] for ratio in found if ratio is not None), default=None)


Timed = Sequence[tuple[float, str, float]]


def smallest_win(timed: Timed) -> tuple[float, str, float] | None:
    """Of (size, name, ratio) the smallest from which on every ratio is above 1; None: the largest
    is not."""
    winning = None
    for entry in sorted(timed, reverse=True):
        if entry[2] <= 1:
            break
        winning = entry
    return winning


def break_even(records: Mapping[str, Record], question: str) -> str:
    """From which product on sparse wins at every larger one that was measured."""
    timed = [
        (record["derived"]["gflop"], name, gain(record))
        for name, record in records.items()
        if record.get("derived", {}).get("question") == question and gain(record) is not None
    ]
    if not timed:
        return f"{question}: no sparse product ran here"
    winning = smallest_win(timed)
    if winning is None:
        return f"{question}: dense wins at the largest product, and so everywhere: use dense"
    gflop, name, ratio = winning
    return f"{question}: sparse wins from {gflop:.1f} GFLOP on ({name}, {ratio:.2f}x); below, dense"


KERNELS = (("pattern24", "weights", DRAWN, 1.0), ("relu2_24", "gflop", SQUARED, 1e9))
"""Name in kernels/break_even.py, what its size is in the records and times what, and the ratio."""


def table_entry(records: Mapping[str, Record]) -> str:
    """This GPU's line of WINS_FROM in kernels/break_even.py; without what was not measured."""
    entry: dict[str, float | None] = {}
    for kernel, size, ratio, unit in KERNELS:
        wanted = ANEW if kernel == "pattern24" else ACTIVATIONS
        timed = [
            (record["derived"][size], name, record["ratios"][ratio]["median"])
            for name, record in records.items()
            if record.get("derived", {}).get("question") == wanted
            and ratio in record.get("ratios", {})
        ]
        if timed:
            winning = smallest_win(timed)
            entry[kernel] = None if winning is None else winning[0] * unit
    return f"for WINS_FROM in kernels/break_even.py, under this GPU's capability: {entry}"


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
    print(table_entry(records))
