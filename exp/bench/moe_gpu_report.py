"""Tables of the experts' GPU benchmark, from its records; they need no device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timing import print_table, text

PASSES = ("forward", "both")
GROUPED = ("grouped_mm", "grouped_mm, plain")
"""What the goals speak of: our reference's dispatch, and the shortest there is."""

RIVALS = (*GROUPED, "ScatterMoE", "all experts", "index_add loop")
"""Names in records; an arm is "NAME, PASS" or "NAME, PASS, graph"."""

MISSING, ENDS = "-", ("p5", "p95")

Record = Mapping[str, Any]


def milliseconds(record: Record, arm: str) -> float | None:
    """Median; None where the arm was not timed."""
    found = record.get("arms", {}).get(arm, {})
    return found["ms"]["median"] if "ms" in found else None


def fastest(record: Record, kind: str) -> list[tuple[str, float]]:
    """Arms of one pass, the fastest first; a graph's replay is an arm of its own."""
    medians = {
        arm: milliseconds(record, arm)
        for arm in record.get("arms", {})
        if arm.endswith((f", {kind}", f", {kind}, graph"))
    }
    timed = [(arm, value) for arm, value in medians.items() if value is not None]
    return sorted(timed, key=lambda pair: pair[1])


def goal(record: Record, kind: str) -> tuple[float, float] | None:
    """How many times faster than the faster grouped_mm ours is, and ought to be; None: unknown."""
    ratios = [
        found
        for rival in GROUPED
        if "target" in (found := record.get("ratios", {}).get(f"{rival} / ours, {kind}", {}))
    ]
    if not ratios:
        return None
    nearest = min(ratios, key=lambda found: found["median"])
    return nearest["median"], nearest["target"]


def _finished(records: Mapping[str, Record]) -> Iterator[tuple[str, Record]]:
    """Cases in which ours was timed."""
    for name, record in records.items():
        if record["status"] == "done" and milliseconds(record, "ours, both") is not None:
            yield name, record


def _number(value: float | None, digits: int = 3, after: str = "") -> str:
    return MISSING if value is None else f"{value:,.{digits}f}{after}"


def _times(records: Mapping[str, Record]) -> list[Sequence[str]]:
    rows = []
    for name, record in _finished(records):
        for kind in PASSES:
            rate = record["derived"]["rates"][f"ours, {kind}"]
            row = [name, kind, text(record["arms"][f"ours, {kind}"]["ms"], 3, ENDS)]
            row.append(_number(rate["tflops"], 1))
            row += [_number(100 * rate[share], 1, " %") for share in ("of_least", "of_kernels")]
            for rival in RIVALS:
                ratio = record["ratios"].get(f"{rival} / ours, {kind}", {})
                row.append(_number(ratio.get("median"), 2))
            rows.append(row)
    return rows


def _winners(records: Mapping[str, Record]) -> list[Sequence[str]]:
    rows = []
    for name, record in _finished(records):
        for kind in PASSES:
            order = fastest(record, kind)
            eager = [pair for pair in order if not pair[0].endswith("graph")]
            graph = [pair for pair in order if pair[0].endswith("graph")]
            cells = [f"{arm.split(f', {kind}')[0]} {value:.3f}" for arm, value in eager[:2]]
            cells += [MISSING] * (2 - len(cells))
            cells.append(f"{graph[0][0].split(', ')[0]} {graph[0][1]:.3f}" if graph else MISSING)
            alone = record["derived"].get("back_to_back_ms", {})
            best = min((arm for arm, _ in eager if arm in alone), key=alone.get, default=None)
            cells.append(MISSING if best is None else f"{best.split(f', {kind}')[0]} {alone[best]}")
            rows.append([name, kind, *cells])
    return rows


def _costs(records: Mapping[str, Record]) -> list[Sequence[str]]:
    """What forward and backward pass of each arm take besides time."""
    rows = []
    for name, record in _finished(records):
        derived = record["derived"]
        for arm in ("ours", *RIVALS):
            both = f"{arm}, both"
            if milliseconds(record, both) is None:
                continue
            counts = derived.get("launches", {}).get(both, {})
            first = derived["first_call"]["s"] if arm == "ours" else None
            new = derived.get("new_tokens", {}).get(arm, {})
            rows.append([
                name, arm, str(counts.get("launches", MISSING)), str(counts.get("waits", MISSING)),
                _number(record["arms"][both].get("peak_mib"), 0),
                _number(record["arms"][both]["first_call_s"] if first is None else first, 2),
                _number(new.get("first_ms"), 2), _number(new.get("again_ms"), 2),
                str(len(new.get("compiled", []))),
                _number(derived["errors"].get(both, {}).get("y"), 4),
            ])  # fmt: skip
    return rows


def _goals(records: Mapping[str, Record]) -> Iterator[str]:
    for name, record in _finished(records):
        if not record["derived"]["on_gpu"]:
            yield f"goal {name}: not on a CPU, where Triton's interpreter ran"
            continue
        for kind in PASSES:
            found = goal(record, kind)
            if found is None:
                measured = any(f"{rival} / ours, {kind}" in record["ratios"] for rival in GROUPED)
                why = "none in this dtype" if measured else "no grouped_mm to compare with"
                yield f"goal {name}, {kind}: {why}"
                continue
            word = "met" if found[0] >= found[1] else "MISSED"
            yield f"goal {name}, {kind}: {found[0]:.2f}x, wanted {found[1]:g}x: {word}"
        new = record["derived"].get("new_tokens", {}).get("ours", {})
        if new.get("compiled"):
            yield f"RECOMPILED {name}: {new['tokens']} tokens compiled {', '.join(new['compiled'])}"
        waits = record["derived"].get("launches", {}).get("ours, both", {}).get("waits", 0)
        if waits:
            yield f"WAITS {name}: ours waited for the device {waits} times"


def report(records: Mapping[str, Record]) -> None:
    """Times, winners, costs, kernels and goals."""
    names = {"grouped_mm, plain": "plain", "index_add loop": "loop"}
    head = ["case", "pass", "ours ms (p5..p95)", "useful TFLOP/s", "of least", "of kernels"]
    print_table([*head, *(names.get(rival, rival) for rival in RIVALS)], _times(records))
    print(
        "arms: times ours, above 1 ours is faster. of least: share of the time that an H200 needs"
    )
    print("to read arguments and write results (or to multiply); of kernels: of what ours move\n")
    head = ["case", "pass", "fastest ms", "second", "fastest graph", "fastest back to back"]
    print_table(head, _winners(records))
    print("\nforward and backward:\n")
    head = ["case", "arm", "launches", "waits", "peak MiB", "first s", "new N ms", "again ms"]
    print_table([*head, "compiled", "error of y"], _costs(records))
    without = 0
    for name, record in records.items():
        kernels = record.get("derived", {}).get("kernels_us")
        if kernels is None:
            without += 1
            continue
        print(f"\nkernels of {name}, forward and backward:\n")
        rows = [
            [kernel, _number(found["us"], 1), _number(found.get("bound_us"), 1)]
            for kernel, found in kernels.items()
        ]
        print_table(["kernel", "us", "bound us"], rows)
    print(f"\nwithout times of single kernels: {without} of {len(records)} cases")
    for name, record in _finished(records):
        share = record["derived"].get("norms_over_both")
        print(f"norms of pairs {name}: {_number(share, 2)} of our forward and backward pass")
    print("\n".join(_goals(records)))
