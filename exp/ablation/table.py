"""Result files to one table: means over seeds, their spread, and the distance from dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arms import ARMS, label_of

from tiny_onn.sweep import tables
from tiny_onn.sweep.tables import Result, differences, markdown, spread

EXPERIMENT = "sparse_parts"

HEAD = (
    "budget",
    "threads x jobs",
    "arm",
    "seeds",
    "hold-out NLL",
    "against dense",
    "exact match",
    "tokens/s",
    "Mtokens",
    "minutes",
    "parameters",
    "active",
    "mean experts",
    "dead experts",
)

Group = tuple[str, str, str, str]
"""Budget, threads x jobs, arm, tag."""


def read_results(folder: Path) -> list[Result]:
    """All results of this experiment that lie in ``folder``, by file name.

    Raises:
        UserError: a file that is none.
    """
    return tables.read_results(folder, "ablation_*.json", EXPERIMENT)


def share_of(result: Result) -> str:
    """ "1 x 2": one thread a run, two runs at once."""
    return f"{result['threads']} x {result['jobs']}"


def grouped(results: Sequence[Result]) -> dict[Group, list[Result]]:
    """Results of one arm under one budget and one share of the machine, by seed; minutes before
    tokens, arms as in ARMS."""
    groups: dict[Group, list[Result]] = {}
    for result in sorted(results, key=_rank):
        key = (result["budget"], share_of(result), result["arm"], result["tag"])
        groups.setdefault(key, []).append(result)
    return groups


def _rank(result: Result) -> tuple[Any, ...]:
    names = list(ARMS)
    place = names.index(result["arm"]) if result["arm"] in ARMS else len(names)
    minutes, tokens = result["budget_minutes"], result["budget_tokens"]
    share = (result["threads"], result["jobs"])
    return minutes is None, minutes or tokens, share, place, result["tag"], result["seed"]


def against_dense(group: Sequence[Result], dense: Sequence[Result]) -> list[float]:
    """NLL above that of dense, seed by seed, for the seeds that both have."""
    return differences(group, dense, "nll_per_output_token")


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of the table, a line for each arm under each budget."""
    groups = grouped(results)
    return [_row(key, group, _dense_of(key, groups)) for key, group in groups.items()]


def _dense_of(key: Group, groups: Mapping[Group, list[Result]]) -> list[Result]:
    """What an arm is compared with: dense under the same tag if it was run, else the preset's."""
    budget, share, arm, tag = key
    own = [] if arm == "dense" else groups.get((budget, share, "dense", tag), [])
    return own or groups.get((budget, share, "dense", ""), [])


def _row(key: Group, group: Sequence[Result], dense: Sequence[Result]) -> list[str]:
    budget, share, arm, tag = key

    def column(name: str, show: Callable[[float], str]) -> str:
        return spread([result[name] for result in group if result[name] is not None], show)

    experts = {result["experts"] for result in group if result["experts"]}
    dead = column("dead_experts", lambda x: f"{x:.3g}")
    is_dense = (arm, tag) == ("dense", "")
    return [
        budget,
        share,
        label_of(arm, tag),
        ", ".join(str(result["seed"]) for result in group),
        column("nll_per_output_token", lambda x: f"{x:.3f}"),
        "" if is_dense else spread(against_dense(group, dense), lambda x: f"{x:+.3f}"),
        column("exact_match", lambda x: f"{100 * x:.1f}%"),
        column("tokens_per_s", lambda x: f"{x:,.0f}"),
        column("tokens", lambda x: f"{x / 1e6:.2f}"),
        column("minutes", lambda x: f"{x:.1f}"),
        column("parameters", lambda x: f"{x / 1e6:.3f}M"),
        column("active_parameters", lambda x: f"{x / 1e6:.3f}M"),
        column("mean_active_experts", lambda x: f"{x:.2f}"),
        f"{dead} of {'/'.join(map(str, sorted(experts)))}" if experts else "",
    ]


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
        "threads x jobs: threads of a run x runs at once; only runs of equal ones are compared.",
        f"commit {several('commit')}",
        f"device {several('device')}; torch {several('torch')}",
    ]


def render(results: Sequence[Result]) -> str:
    """The table and its notes as Markdown."""
    if not results:
        return "no results yet"
    lines = [list(HEAD), *rows(results)]
    return "\n".join([markdown(lines), "", *notes(results)])
