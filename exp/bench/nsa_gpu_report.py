"""Tables of what nsa_gpu.py has measured, targets beside ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attention import crossing, crossing_text
from gpu_roofline import SUSTAINED_FLOPS_PER_S
from timing import print_table, text

RIVALS = {"flash": "FA2 class", "cudnn": "FA3 class"}
BOTH = "forward+backward"
RATIOS = {
    "forward": "forward, {} over nsa",
    "both": BOTH + ", {} over nsa",
    "both, our graph": BOTH + ", {} over nsa graph",
}
MISSING, ENDS = "-", ("p5", "p95")

Record = Mapping[str, Any]


def _of(records: Mapping[str, Record], kind: str) -> list[tuple[str, Record]]:
    """Measured cases whose names begin with ``kind``, ascending in tokens."""
    found = [
        (name, record)
        for name, record in records.items()
        if name.startswith(f"{kind} ") and record["status"] == "done"
    ]
    return sorted(found, key=lambda item: (item[0].rsplit(" ", 1)[0], item[1]["shapes"]["tokens"]))


def _ms(record: Record, arm: str) -> str:
    found = record["arms"].get(arm, {})
    if found.get("status") != "timed":
        return found.get("status", MISSING)
    return text(found["ms"], 3, ENDS)


def _mib(record: Record, arm: str) -> str:
    peak = record["arms"].get(arm, {}).get("peak_mib")
    return MISSING if peak is None else f"{peak:,.0f}"


def ratio_text(record: Record, name: str) -> str:
    """``1.23 (1.20..1.27)``, and its target with whether it is reached."""
    found = record["ratios"].get(name)
    if found is None:
        return MISSING
    words = text(found, 2, ENDS)
    if "target" in found:
        reached = "reached" if found["median"] >= found["target"] else "MISSED"
        words += f", target >= {found['target']:g}: {reached}"
    return words


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        print(f"\n{title}")
        print_table(head, rows)


def break_even(records: Mapping[str, Record], setting: str) -> Iterator[str]:
    """Where forward+backward becomes faster than each class of dense attention."""
    cases = [r for _, r in _of(records, f"complete {setting}")]
    for rival, kind in RIVALS.items():
        points = [
            (record["shapes"]["tokens"], 1 / record["ratios"][name]["median"])
            for record in cases
            if (name := f"{BOTH}, {rival} over nsa") in record["ratios"]
        ]
        if len(points) > 1:
            lengths, over = zip(*points, strict=True)
            where = crossing_text(lengths, crossing(lengths, over))
            yield f"{setting}, {BOTH}: faster than {rival} ({kind}) {where}"


def report(records: Mapping[str, Record]) -> None:
    for setting in ("paper", "arc"):
        rows = [
            [f"{r['shapes']['documents']} x {r['shapes']['tokens']:,}"]
            + [_ms(r, f"nsa {word}") for word in ("forward", "backward", BOTH, f"{BOTH} graph")]
            + [_ms(r, f"{rival} {BOTH}") for rival in RIVALS]
            for _, r in _of(records, f"complete {setting}")
        ]
        head = ["tokens", "forward", "backward", "both", "both, graph", *RIVALS]
        _table(f"NSA complete, {setting}: ms (dense: both)", head, rows)
        rows = [
            [f"{r['shapes']['tokens']:,}"]
            + [ratio_text(r, text.format(n)) for n in RIVALS for text in RATIOS.values()]
            + [_mib(r, f"{name} {BOTH}") for name in ("nsa", *RIVALS)]
            for _, r in _of(records, f"complete {setting}")
        ]
        head = ["tokens"] + [f"{n}, {word}" for n in RIVALS for word in RATIOS]
        head += [f"{name} MiB" for name in ("nsa", *RIVALS)]
        _table(f"NSA complete, {setting}: dense over NSA, and peaks of both", head, rows)
        for line in break_even(records, setting):
            print(line)
    for name, record in _of(records, "kernels"):
        _table(f"{name}: slowest first", *_kernel_rows(record))
    arm, words = "queries first over keys first", ("forward", BOTH)
    rows = [
        [name.removeprefix("keys first "), *(ratio_text(r, f"{word}, {arm}") for word in words)]
        + [_mib(r, f"{way} first {BOTH}") for way in ("queries", "keys")]
        + [r["derived"]["auto"]]
        for name, r in _of(records, "keys first")
    ]
    head = ["case", *words, "queries first MiB", "keys first MiB", "auto"]
    _table(f"selected branch, {arm} (above 1: keys first is faster)", head, rows)
    names = [f"{n}{mode}" for mode in ("", " graph") for n in ("nsa", "matmul", *RIVALS)]
    rows = [
        [name.removeprefix("decode "), *(_ms(r, n) for n in names)]
        + [ratio_text(r, f"{n} graph over nsa graph") for n in ("matmul", *RIVALS)]
        for name, r in _of(records, "decode")
    ]
    head = ["step", *names, *(f"{n} / nsa, graphs" for n in ("matmul", *RIVALS))]
    _table("decoding: ms", head, rows)
    for rival in ("xunhao", "fla"):
        words = ("forward", BOTH)
        rows = [
            [f"{r['shapes']['tokens']:,}", *(_ms(r, f"{n} {BOTH}") for n in ("nsa", rival))]
            + [ratio_text(r, f"{word}, {rival} over nsa") for word in words]
            + [_mib(r, f"{n} {BOTH}") for n in ("nsa", rival)]
            for _, r in _of(records, rival)
        ]
        head = ["tokens", "ours, both", f"{rival}, both", *words, "our MiB", f"{rival} MiB"]
        _table(f"{rival} over ours, without window", head, rows)
    for name, record in _of(records, "compiled"):
        print(f"{name}: eager over compiled {ratio_text(record, 'eager over compiled')}")
    aims = [
        ratio["median"] >= ratio["target"]
        for record in records.values()
        for ratio in record.get("ratios", {}).values()
        if "target" in ratio
    ]
    if aims:
        print(f"targets: {sum(aims)} of {len(aims)} measured ones reached")


def _kernel_rows(record: Record) -> tuple[list[str], list[list[str]]]:
    timed = {n: a for n, a in record["arms"].items() if a["status"] == "timed"}
    rows = []
    for name in sorted(timed, key=lambda n: -timed[n]["ms"]["median"]):
        found = record["derived"].get(name)
        limits = [MISSING] * 5
        if found is not None:
            limits = [f"{found['tflops']:,.1f}", f"{found['tbs']:.2f} ({found['of']})"]
            limits += [f"{found['floor_ms']:.3f} ({found['bound']})", f"{found['reached']:.0%}"]
            limits += [f"{found['sustained_ms']:.3f} ({found['sustained_reached']:.0%})"]
        rows.append([name, _ms(record, name), *limits])
    sustained = f"at {SUSTAINED_FLOPS_PER_S / 1e12:.0f} TFLOP/s"
    return ["kernel", "ms", "TFLOP/s", "TB/s", "roofline ms", "reached", sustained], rows
