"""Which settings of the training step are fastest on a CPU, start-up included.

    python exp/bench/settings.py [--quick] [--threads N] [key=value ...]

The base is preset nano as train.py runs it; every other arm differs from it in one thing. An arm
is a process of its own (threads, environment and patches are a process's), started after the
previous one is ready. Start-up: seconds from the start of the process until its first training
step is complete, imports and data included, torch.compile cold (an empty inductor cache each);
once an arm, so arms that compile the same code show its spread. Then all stay alive and train
stretches of about as many tokens in turn, to and fro, the base in the middle: a slow minute hits
all alike, and every rate is set against the base's of the same round. Those who wait do not spin
(OMP_WAIT_POLICY=PASSIVE unless the environment says otherwise). A step is the bare loop of
training_step.py, batches made on the way. Before anything is timed, the losses of the first steps
must agree with the base's. The rates are of tokens, not of learning: batch size and Muon change
that too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from timing import STARTED, parser, prepare, print_table, require, spread, text, wake, write_result

# isort: split
import torch
import training_step
from torch import Tensor
from training_step import Setup

from tiny_onn.config.load import load_config
from tiny_onn.config.schema import Config
from tiny_onn.training import datamodule, optim
from tiny_onn.training.hardware import with_precision
from tiny_onn.training.optim import build_optimizer

LIMIT_S = 345.0
CHECKED_LOSSES = 4  # before any update, and after 1, 2 and 3
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest relative difference of a loss from the base's; the coarser of two precisions counts."""


@dataclass(frozen=True)
class Arm:
    """One change of the base.

    batch: factor of data.batch_tokens; checked: how many losses must agree with the base's.
    """

    words: tuple[str, ...] = ()
    batch: float = 1.0
    threads: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    fused: bool = True
    rounded: bool = True
    checked: int = CHECKED_LOSSES
    quick: bool = True


ARMS = {
    "base": Arm(),
    "fp32": Arm(("trainer.precision=fp32",)),
    "eager": Arm(("trainer.compile=false",)),  # so is a smoke test's base
    "batch / 2": Arm(batch=0.5, checked=0, quick=False),  # other batches, other losses
    "batch x 2": Arm(batch=2.0, checked=0),
    "1 thread": Arm(threads=1, quick=False),
    "AdamW not fused": Arm(fused=False),
    "huge pages": Arm(environment={"THP_MEM_ALLOC_ENABLE": "1"}, quick=False),
    "shapes not rounded": Arm(rounded=False),
    "AdamW for Muon": Arm(("optim.matrices=adamw",), checked=1),  # the same until its first step
}


def configure(args: Namespace, arm: Arm) -> Config:
    quick = ["trainer.compile=false", "data.batch_tokens=512", "model.layers=1"]
    words = ["preset=nano", "network=dense", "trainer.accelerator=cpu"]
    words += [*(quick if args.quick else []), *args.overrides, *arm.words]
    tokens = load_config(words).data.batch_tokens
    return with_precision(load_config([*words, f"data.batch_tokens={round(arm.batch * tokens)}"]))


# The child: one arm.


def patch(arm: Arm) -> list[Tensor]:
    """Switch what no key switches. Filled with the summed NLL of every step from then on."""
    if not arm.rounded:
        datamodule.CPU_ROUNDING = 1
    if not arm.fused:
        adamw = optim.adamw

        def for_each(*tensors: Any, **options: Any) -> None:
            adamw(*tensors, **{**options, "fused": False, "foreach": True})

        optim.adamw = for_each
    plain, kept = training_step.output_nll, []

    def output_nll(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        found = plain(logits_MV, targets_M)
        kept.append(found[0].detach())
        return found

    training_step.output_nll = output_nll
    return kept


def serve(args: Namespace, arm: Arm) -> None:
    """Answer with a line of JSON after the first step, after the warm-up and after every stretch.

    A line on stdin is the number of steps of a stretch; its end is the end.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    device = prepare(args)
    torch.set_num_threads(arm.threads or torch.get_num_threads())
    summed_nll = patch(arm)
    config = configure(args, arm)
    setup = Setup(config, device)
    wake(setup.model).train()
    optimizer, stream = build_optimizer(setup.model, config.optim), setup.stream(0)

    def train(steps: int) -> tuple[int, list[float]]:
        tokens, losses = 0, []
        for _ in range(steps):
            batch = next(stream)
            setup.bare_step(batch, optimizer)
            tokens += batch.num_tokens
            losses.append(float(summed_nll.pop()) / batch.num_targets)
        return tokens, losses

    _, losses = train(1)
    print(json.dumps("first step"), file=answers)
    losses += train(2 * CHECKED_LOSSES - 1)[1]  # half of them to meet more shapes
    print(json.dumps(losses), file=answers)
    for line in sys.stdin:
        began = time.perf_counter()
        tokens, losses = train(int(line))
        seconds = time.perf_counter() - began
        print(json.dumps({"tokens": tokens, "seconds": seconds, "losses": losses}), file=answers)


# The parent.


class Child:
    """The process of one arm: started here, warmed up after ``start``."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.rates, self._stderr = name, [], folder / "stderr"
        folder.mkdir()
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        self._began = time.monotonic()
        with self._stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--arm", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **cache, **ARMS[name].environment},
            )

    def start(self) -> None:
        self._answer()
        self.startup_s = time.monotonic() - self._began
        self.losses: list[float] = self._answer()

    def stretch(self, steps: int) -> None:
        try:
            print(steps, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._died()
        found = self._answer()
        require(all(map(math.isfinite, found["losses"])), f"{self.name}: a loss is not finite")
        self.rates.append(found["tokens"] / found["seconds"])

    def end(self) -> None:
        self._process.kill()  # it holds nothing worth keeping
        self._process.wait()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else self._died()

    def _died(self) -> NoReturn:
        status = self._process.wait()
        last = "\n".join(self._stderr.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"the process of '{self.name}' ended with status {status}:\n{last}")


def check(child: Child, base: Child, *configs: Config) -> float | None:
    """Largest relative difference of the losses that must agree with the base's."""
    require(all(map(math.isfinite, child.losses)), f"{child.name}: a loss is not finite")
    count = ARMS[child.name].checked
    pairs = zip(child.losses[:count], base.losses[:count], strict=True)
    error = max((abs(a / b - 1) for a, b in pairs), default=None)
    limit = max(TOLERANCE[config.trainer.precision] for config in configs)
    wrong = f"losses of '{child.name}' differ by {error}, expected at most {limit:g}"
    require(error is None or error <= limit, wrong)
    return error


def take_turns(children: dict[str, Child], rounds: int, steps: int) -> None:
    """Stretches of as many tokens as ``steps`` of the base have, the base in the middle.

    No further round begins when it would end after LIMIT_S, but there are two.
    """
    others = [name for name in children if name != "base"]
    order = [*others[: len(others) // 2], "base", *others[len(others) // 2 :]]
    round_s = 0.0
    for number in range(rounds):
        began = time.monotonic()
        if number >= 2 and began - STARTED + round_s > LIMIT_S:
            break
        for name in order if number % 2 == 0 else order[::-1]:
            children[name].stretch(round(steps / ARMS[name].batch))
        round_s = time.monotonic() - began


def paid_after(extra_startup_s: float, rate_of_the_other: float) -> float | None:
    """Minutes the other one trains until both have trained on as many tokens; None: never."""
    if rate_of_the_other >= 1:
        return None
    return round(max(0.0, extra_startup_s) / (1 - rate_of_the_other) / 60, 2)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--arm", help=argparse.SUPPRESS)
    arguments.add_argument("overrides", nargs="*", help="key=value for the configuration")
    args = arguments.parse_args()
    require(args.device != "cuda", "these settings are a CPU's, but got --device cuda")
    args.device = "cpu"
    if args.arm:
        return serve(args, ARMS[args.arm])
    prepare(args)
    names = [name for name, arm in ARMS.items() if arm.quick or not args.quick]
    configs = {name: configure(args, ARMS[name]) for name in names}
    children: dict[str, Child] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for number, name in enumerate(names):
                child = children[name] = Child(name, Path(folder) / str(number))
                child.start()
                print(f"{name}: first step after {child.startup_s:.1f} s", flush=True)
            errors = {
                name: check(child, children["base"], configs[name], configs["base"])
                for name, child in children.items()
            }
            take_turns(children, *((2, 4) if args.quick else (6, 8)))
        finally:
            for child in children.values():
                child.end()
    report(args, configs["base"], children, errors)


def report(
    args: Namespace, config: Config, children: dict[str, Child], errors: dict[str, float | None]
) -> None:
    """Table and result file; ``config`` is the base's."""
    base, rows, arms = children["base"], [], {}
    for name, child in children.items():
        ratio = spread([a / b for a, b in zip(child.rates, base.rates, strict=True)])
        found = arms[name] = {
            "startup_s": round(child.startup_s, 1),
            "tokens_per_s": spread(child.rates, digits=1),
            "rate_of_base": ratio,
            "losses": [round(loss, 5) for loss in child.losses[:CHECKED_LOSSES]],
            "losses_relative_difference": errors[name],
        }
        difference = "" if errors[name] is None else f"{errors[name]:.1g}"
        rate = text(found["tokens_per_s"], 0)
        rows.append([name, f"{child.startup_s:.1f}", rate, text(ratio), difference])
    print_table(["arm", "start-up s", "tokens/s", "of base's", "losses differ by"], rows)
    eager = children["eager"].startup_s, arms["eager"]["rate_of_base"]["median"]
    paid = paid_after(base.startup_s - eager[0], eager[1])
    after = "never" if paid is None else f"after {paid:.2f} minutes"
    print(f"torch.compile has paid for its start-up {after} of eager training")
    other = children["AdamW for Muon"].rates
    muon = spread([100 * (1 - a / b) for a, b in zip(base.rates, other, strict=True)], digits=1)
    print(f"Muon instead of AdamW takes {text(muon, 1)} % of a step")
    write_result(
        "settings",
        args,
        torch.device("cpu"),
        precision=config.trainer.precision,
        compile=config.trainer.compile,
        batch_tokens=config.data.batch_tokens,
        model=vars(config.model),
        inductor_cache="empty for every arm",
        checked_losses=CHECKED_LOSSES,
        tolerance=TOLERANCE,
        cpu_rounding=datamodule.CPU_ROUNDING,
        overrides=args.overrides,
        compile_paid_after_minutes=paid,
        muon_percent_of_step=muon,
        arms=arms,
    )


if __name__ == "__main__":
    main()
