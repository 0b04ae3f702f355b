"""A small causal language model with 2:4 activations against dense ones. README.md tells more.

    python exp/act24_lm/run.py --threads 1            (all arms; those that are there are kept)
    python exp/act24_lm/run.py --arms act24,relu2 --seeds 0,1,2 --steps 300
    python exp/act24_lm/run.py --quick                (20 steps of the main arms, nothing kept)
    python exp/act24_lm/run.py --table

A cut call goes on with the arms that are missing when it is given again.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from arms import ARMS, MAIN
from text import load_text
from train_lm import train

from tiny_onn.errors import UserError, run_cli
from tiny_onn.files import atomic_write_text
from tiny_onn.sweep.choices import choose_arms, choose_seeds

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "exp" / "results"

QUICK_STEPS = 20


def result_path(arm: str, seed: int, steps: int) -> Path:
    """Where a run is written down."""
    return RESULTS / f"act24_lm_{arm}_{steps}steps_seed{seed}.json"


def run_all(arms: list[str], seeds: list[int], steps: int, keep: bool = True) -> None:
    """Train what is missing, arm by arm; seeds are the outer loop."""
    text = load_text()
    for seed in seeds:
        for arm in arms:
            path = result_path(arm, seed, steps)
            if keep and path.exists():
                print(f"{path.name}: there already")
                continue
            found = train(arm, seed, steps, text) | {
                "text_sha256": text.sha256,
                "train_characters": len(text.train_N),
                "validation_characters": len(text.validation_N),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
            }
            if keep:
                RESULTS.mkdir(parents=True, exist_ok=True)
                atomic_write_text(path, json.dumps(found, indent=1))
            loss, seconds = found["validation_loss"], found["seconds"]
            print(f"{arm} seed {seed}: validation {loss:.4f} nats, {seconds:.0f} s", flush=True)


def load_results(steps: int) -> dict[str, list[dict[str, Any]]]:
    """Arm -> its runs by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in ARMS:
        paths = sorted(RESULTS.glob(f"act24_lm_{arm}_{steps}steps_seed*.json"))
        if paths:
            found[arm] = [json.loads(path.read_text()) for path in paths]
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown. Differences are to dense ReLU² at the same seeds."""
    base = {run["seed"]: run["validation_loss"] for run in results.get("relu2", [])}
    lines = [
        "| arm | seeds | validation, nats a character | over dense ReLU² | s a step | "
        "nonzero, last | dropped, first to last | dropped along tokens, last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        losses = [run["validation_loss"] for run in runs]
        over = [run["validation_loss"] - base[run["seed"]] for run in runs if run["seed"] in base]
        spread = "" if len(over) < 2 else f" ({min(over):+.3f} to {max(over):+.3f})"
        step = mean(run["seconds"] / run["steps"] for run in runs)
        cells = [ARMS[arm].label, str(len(runs)), f"{mean(losses):.4f}"]
        cells += [f"{mean(over):+.4f}{spread}" if over and arm != "relu2" else "", f"{step:.3f}"]
        cells += _drops(runs)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _drops(runs: list[dict[str, Any]]) -> list[str]:
    if not runs[0]["drops"] or not runs[0]["drops"][0]["nonzero"]:
        return ["", "", ""]

    def over_runs(place: int, what: str) -> float:
        return mean(mean(run["drops"][place][what]) for run in runs)

    return [
        f"{over_runs(-1, 'nonzero'):.1%}",
        f"{over_runs(0, 'dropped'):.1%} to {over_runs(-1, 'dropped'):.1%}",
        f"{over_runs(-1, 'feature_dropped'):.1%}",
    ]


def fidelity_table(runs: list[dict[str, Any]]) -> str:
    """Markdown: relative errors of gradients, means over the seeds."""
    lines = ["| backward | dW1 | dW2 | embedding, through dX |", "|---|---|---|---|"]
    for label in runs[0]["fidelity"]:
        errors = [run["fidelity"][label] for run in runs]
        cells = [f"{mean(e[name] for e in errors):.4f}" for name in ("dU", "dD", "dX")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_table(run: dict[str, Any]) -> str:
    """Markdown: dropped nonzeros by layer and step of one run."""
    layers = len(run["drops"][0]["dropped"])
    names = " | ".join(f"layer {layer}" for layer in range(layers))
    lines = [f"| until step | {names} |", "|---" * (layers + 1) + "|"]
    rows = run["drops"]
    for row in [*rows[: len(rows) - 1 : max(1, len(rows) // 6)], rows[-1]]:
        cells = [f"{d:.1%} of {n:.1%}" for d, n in zip(row["dropped"], row["nonzero"], strict=True)]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS), help="some of the arms, a,b")
    parser.add_argument("--seeds", default="0", help="0,1,2")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="try the main arms, keep nothing")
    parser.add_argument("--table", action="store_true", help="tables of what there is")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError(f"got --steps {args.steps}; expected at least 1; change it")
    torch.set_num_threads(args.threads)
    if args.quick:
        run_all(list(MAIN), [0], QUICK_STEPS, keep=False)
        return
    if not args.table:
        run_all(choose_arms(args.arms, ARMS), choose_seeds(args.seeds), args.steps)
    results = load_results(args.steps)
    if not results:
        raise UserError(f"no results of {args.steps} steps yet; run it without --table first")
    print(table(results))
    if "act24" in results:
        print("\n" + fidelity_table(results["act24"]))
        print("\n" + layer_table(results["act24"][0]))


if __name__ == "__main__":
    run_cli(main)
