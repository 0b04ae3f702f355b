"""Our Triton experts on a GPU, against other programs for the same function.

    python exp/bench/moe_gpu.py [--quick] [--minutes M] [--only TEXT] [--list] [--third-party DIR]

The same tokens, experts and choice of pairs for

- ours: kernels/moe/kernel.py; and recorded in a CUDA graph, which it allows (it never waits),
- grouped_mm: our reference on CUDA, a fixed order of sums, products by torch's grouped_mm,
- grouped_mm, plain: the same products with index_select, activation and index_add of torch,
- ScatterMoE: where --third-party names a clone of it (facts and sentinels: moe_gpu_arms.py),
- all experts: dense einsums over every expert; in a CUDA graph too,
- index_add loop: expert after expert.

Each is compared with a loop in float64, outputs and gradients, before it is timed, graphs' replays
too; ours gives the same bits twice, or the case fails. Beside the times: useful TFLOP/s (active
pairs only), shares of the roofline, launches and waits for the device, peak memory, first call,
first call with another number of tokens (nothing may be compiled), and for two sizes each kernel
beside its bound.

Goals: never slower than either grouped_mm, and 1.3 times faster at (8192, 512, 128, 64, k = 8); in
bfloat16, the only dtype for which torch's grouped_mm is one kernel (others loop over experts). At
ARC's sizes the table of winners is what ops.experts=auto ought to choose by.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_cases import Case

# isort: split
import torch
from gpu_run import run
from moe_gpu_case import AT_SMALL, Spec, make_case
from moe_gpu_report import report

LIMIT_S = 2.5
"""Of the timed rounds of a case."""

SMALL = Spec("small", 8192, 512, 128, 64, 8)
ARC = Spec("ARC, k = 8", 2048, 128, 128, 16, 8, graph=True)
H200 = Spec("H200", 16384, 1024, 128, 64, 8)

SPECS = (
    SMALL._replace(goal=AT_SMALL, graph=True, kernels=True),
    ARC,
    Spec("preset base", 24576, 768, 1536, 8, 2, kernels=True),
    Spec("preset nano", 4096, 160, 112, 8, 1, graph=True),
    ARC._replace(name="ARC, k = 2", active=2),
    ARC._replace(name="ARC, k = 12", active=12),
    H200._replace(name="H200, 64 of 128"),
    H200._replace(name="H200, 64 of 512", hidden=512),
    SMALL._replace(name="small, skewed", load="zipf"),
    SMALL._replace(name="small, half dead", load="dead"),
    SMALL._replace(name="small, exactly 8", load="exact"),
    SMALL._replace(name="small, float16", dtype=torch.float16, goal=None),
    H200._replace(name="H200, 256 of 128", experts=256),
    H200._replace(name="H200, 256 of 512", hidden=512, experts=256),
)
"""dynmoe.md, section 7, and the presets; the most important first."""

TINY = Spec("tiny", 50, 32, 16, 4, 2, dtype=torch.float16, goal=None, graph=True, kernels=True)
QUICK = (
    TINY,
    TINY._replace(name="tiny, skewed", load="zipf"),
    TINY._replace(name="tiny, half dead", load="dead"),
    TINY._replace(name="tiny, exactly 2", load="exact"),
)
"""float16: the interpreter multiplies bfloat16 only in our kernels, which widen it."""


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--third-party",
        type=Path,
        metavar="DIR",
        help="a clone of github.com/shawntan/scattermoe (read at commit 47b5e15), or its folder",
    )


def make_cases(args: argparse.Namespace) -> Sequence[Case]:
    specs = QUICK if args.quick else SPECS
    return [make_case(spec, args.third_party, LIMIT_S) for spec in specs]


if __name__ == "__main__":
    sources = ("kernels/*.py", "kernels/moe/*.py", "exp/bench/moe*.py")
    sys.exit(
        run(
            "moe_gpu",
            __doc__,
            make_cases,
            report,
            minutes=3.5,
            sources=sources,
            add_options=add_options,
        )
    )
