"""Result files to tables: the arms, their masks over training, dropped activations by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import ARMS, DENSE, label_of

from tiny_onn.sweep import tables
from tiny_onn.sweep.tables import Result, differences, markdown, spread

EXPERIMENT = "k24"

HEAD = (
    "budget",
    "threads x jobs",
    "arm",
    "seeds",
    "hold-out NLL",
    "against dense",
    "exact match",
    "FFN kB",
    "steps",
    "s a step",
    "tokens/s",
    "Mtokens",
    "PFLOP",
    "trained parameters",
    "flips, last",
    "from start",
    "agreement",
)

Group = tuple[str, str, str, str]
"""Budget, threads x jobs, arm, tag."""


def read_results(folder: Path) -> list[Result]:
    """All results of this experiment that lie in ``folder``, by file name.

    Raises:
        UserError: a file that is none.
    """
    return tables.read_results(folder, "k24_*.json", EXPERIMENT)


def grouped(results: Sequence[Result]) -> dict[Group, list[Result]]:
    """Results of one arm under one budget and one share of the machine, by seed."""
    groups: dict[Group, list[Result]] = {}
    for result in sorted(results, key=_rank):
        share = f"{result['threads']} x {result['jobs']}"
        key = (result["budget"], share, result["arm"], result["tag"])
        groups.setdefault(key, []).append(result)
    return groups


def _rank(result: Result) -> tuple[Any, ...]:
    names = list(ARMS)
    place = names.index(result["arm"]) if result["arm"] in ARMS else len(names)
    minutes, steps = result["budget_minutes"], result["budget_steps"]
    share = (result["threads"], result["jobs"])
    return minutes is not None, minutes or steps, share, place, result["tag"], result["seed"]


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of the table, a line for each arm under each budget."""
    groups = grouped(results)
    return [_row(key, group, _dense_of(key, groups)) for key, group in groups.items()]


def _dense_of(key: Group, groups: Mapping[Group, list[Result]]) -> list[Result]:
    """What an arm is compared with: dense under the same tag if it was run, else the preset's."""
    budget, share, arm, tag = key
    own = [] if arm == DENSE else groups.get((budget, share, DENSE, tag), [])
    return own or groups.get((budget, share, DENSE, ""), [])


def _row(key: Group, group: Sequence[Result], dense: Sequence[Result]) -> list[str]:
    budget, share, arm, tag = key

    def column(value: Callable[[Result], float | None], show: str, scale: float = 1.0) -> str:
        found = [x for x in map(value, group) if x is not None]
        return spread(found, lambda x: format(scale * x, show))

    def last(series: str, name: str) -> Callable[[Result], float | None]:
        return lambda r: r[series][-1].get(name) if r[series] else None

    is_dense = (arm, tag) == (DENSE, "")
    above = [] if is_dense else differences(group, dense, "nll_per_output_token")
    return [
        budget,
        share,
        label_of(arm, tag),
        ", ".join(str(result["seed"]) for result in group),
        column(lambda r: r["nll_per_output_token"], ".3f"),
        spread(above, lambda x: f"{x:+.3f}"),
        column(lambda r: r["exact_match"], ".1%"),
        f"{group[0]['ffn_bytes'] / 1000:,.1f}",
        column(lambda r: r["steps"], ",.0f"),
        column(seconds_a_step, ".3f"),
        column(lambda r: r["tokens_per_s"], ",.0f"),
        column(lambda r: r["tokens"], ".2f", 1e-6),
        column(lambda r: r["train_flops"], ".2f", 1e-15),
        column(lambda r: r["parameters"], ".3f", 1e-6) + "M",
        column(last("flips", "flipped"), ".2%"),
        column(last("flips", "from_start"), ".1%"),
        column(last("masks", "agreement"), ".1%"),
    ]


def seconds_a_step(result: Result) -> float | None:
    """Of training alone, by its steady rate."""
    rate = result["tokens_per_s"]
    return result["tokens"] / result["steps"] / rate if rate else None


def mask_table(results: Sequence[Result]) -> str:
    """Flip rate, agreement, kappa and tau over training, means over seeds; "" without masks."""
    lines = []
    for key, group in grouped(results).items():
        series = [r["flips"] for r in group if r["flips"]]
        if not series or len({tuple(p["step"] for p in s) for s in series}) > 1:
            continue  # none, or of different lengths: under minutes each run has its own
        for place, point in enumerate(series[0]):
            shares = [
                f"{fmean(s[place][name] for s in series):.2%}" for name in ("flipped", "from_start")
            ]
            near = [_nearest(r["masks"], point["step"]) for r in group]
            lines.append([key[0], label_of(*key[2:]), str(point["step"]), *shares, *_means(near)])
    head = ["budget", "arm", "step", "flips", "from start", "agreement", "kappa", "tau"]
    return markdown([head, *lines]) if lines else ""


def _nearest(series: Sequence[Mapping[str, float]], step: int) -> Mapping[str, float]:
    return min(series, key=lambda point: abs(point["step"] - step), default={})


def _means(points: Sequence[Mapping[str, float]]) -> list[str]:
    cells = []
    for name, show in (("agreement", ".1%"), ("kappa", ".2f"), ("tau", ".2f")):
        found = [point[name] for point in points if name in point]
        cells.append(format(fmean(found), show) if found else "")
    return cells


def drop_table(result: Result) -> str:
    """Dropped non-zeros by layer and step of one run."""
    layers = len(result["drops"][0]["dropped"])
    head = ["until step", *(f"layer {layer}" for layer in range(layers))]
    lines = [
        [
            f"{row['step']}" + (" (dense)" if not row["sparse"] else ""),
            *(f"{d:.1%} of {n:.1%}" for d, n in zip(row["dropped"], row["nonzero"], strict=True)),
        ]
        for row in result["drops"]
    ]
    return markdown([head, *lines])


def notes(results: Sequence[Result]) -> list[str]:
    """What the table does not show, and where its lines are not alike."""

    def several(name: str) -> str:
        return "; ".join(sorted({str(result[name]) for result in results}))

    decoded = sorted({(result["num_decoded"], result["num_outputs"]) for result in results})
    shares = "; ".join(f"{a} of {b}" for a, b in decoded)
    return [
        f"{len(results)} runs; mean (smallest..largest) over seeds; NLL in nats a token.",
        f"exact match: hold-out outputs decoded freely, one try ({shares}).",
        "against dense: seed by seed; an arm with a tag, against dense of that tag if it was run.",
        "FFN kB: matrices of FFNs or experts as they are kept once trained, bf16; masks included.",
        "flips, last: weights whose evaluation mask changed between the last two looks.",
        f"commit {several('commit')}",
        f"device {several('device')}; torch {several('torch')}",
    ]


def render(results: Sequence[Result]) -> str:
    """All tables and the notes as Markdown."""
    if not results:
        return "no results yet"
    parts = [markdown([list(HEAD), *rows(results)]), "\n".join(notes(results))]
    if masks := mask_table(results):
        parts.append(masks)
    for result in sorted(results, key=_rank):
        if result["drops"]:
            label = label_of(result["arm"], result["tag"])
            what = "dropped non-zeros, of the share that is not zero, by layer"
            title = f"{label}, {result['budget']}, seed {result['seed']}: {what}"
            parts.append(f"{title}\n\n{drop_table(result)}")
    return "\n\n".join(parts)
