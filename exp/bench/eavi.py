"""EAVI's step: what the excursion costs, and what going back through the generation would.

    python exp/bench/eavi.py [--quick] [--device cpu|cuda] [--threads N] [--network sparse|dense]
                             [--step-only] (section 1, written as eavi_step)

1. Preset nano as stage eavi runs it (compiled where a compiler is), real batches: seconds of the
   excursion (feed=soft, true geometry), of the alignment's forward and of its backward; the
   excursion's share, and over the backward. With excursions of all documents, with the default
   share of them, and four batches' in one excursion.
2. Outputs of 56, 110 and 210 tokens, dense network, each arm in a process of its own:
   - decoupled: excursion without gradient, one parallel alignment, one backward;
   - through the cache: the same outputs written with gradient, keys and values kept with their
     graph, one backward through all steps (the cheapest way to go back through the generation);
   - recomputed: every step a whole forward of all tokens so far, with its graph;
   - excursion: the writing alone, after inputs of 3 x 3 cells, whose peak is to be the cache's and
     nothing that grows beside it.
   In float64 all arms' loss on the self-fed prefix must be the same number first.
3. Excursion against writing the same tokens without a cache (no gradient).
"""

from __future__ import annotations

import json
import time
from typing import Any

from processes import peak_mib, run_child

GRIDS = {56: (7, 7), 110: (10, 10), 210: (14, 14)}
"""Tokens of an output (END not counted): height and width of input and output."""

BATCHES = {
    "decoupled": 8,
    "through the cache": 8,
    "decoupled, 2": 2,
    "recomputed": 2,
    "excursion": 8,
    "excursion, 64": 64,
}
"""Arm -> documents; recomputed graphs of 8 do not fit."""

TARGET = 10.0


def child(args: Any, arm: str, tokens: int) -> dict[str, Any]:
    """Seconds of every repeat and the peak memory of one arm, in this process alone."""
    from generation import Way
    from timing import prepare, wait_for  # before torch

    device = prepare(args)
    asked = (3, 3) if arm.startswith("excursion") else None
    way = Way(device, BATCHES[arm], GRIDS[tokens], double=False, asked=asked)
    run = way.arms()[arm.split(",")[0]]
    on_gpu = device.type == "cuda"
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats(device)

    def peak() -> float:
        return torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else peak_mib()

    began = peak()
    seconds = []
    for _ in range(1 if args.quick else 3 if BATCHES[arm] == 2 else 4):  # compared pair by pair
        start = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[1:] or seconds,
        "peak_mib": peak(),
        "before_mib": began,
        "cache_mib": way.cache_mib(),
    }


def print_step(args: Any, step: dict[str, Any], some: dict[str, Any]) -> None:
    """Section 1, of excursions of all documents and of the default share."""
    from timing import print_table, text

    print(f"preset nano, network {args.network}: milliseconds a step of one batch")
    print_table(
        ["excursions of", *step["milliseconds"], "excursion / step", "excursion / backward"],
        [
            [
                f"{one['share']:.0%}",
                *(text(values, 0) for values in one["milliseconds"].values()),
                text(one["excursion_share"]),
                text(one["excursion_over_backward"]),
            ]
            for one in (step, some)
        ],
    )
    print(
        f"all documents: {step['excursion_tokens_per_s']:,} tokens/s, "
        f"{text(step['four_batches_at_once'])} times as many with four batches at once"
    )


def main() -> None:
    args = read_arguments()
    if args.child:
        arm, tokens = args.child.split(":")
        print(json.dumps(child(args, arm, int(tokens))))
        return
    if args.step_only:
        from eavi_step import own_step
        from timing import prepare, write_result  # before torch

        device = prepare(args)
        step, some = own_step(args, device, 1.0), own_step(args, device, None)
        print_step(args, step, some)
        write_result("eavi_step", args, device, step=step, step_with_the_default_share=some)
        return
    lengths = [56] if args.quick else list(GRIDS)
    found = {
        arm: {n: json.loads(run_child("--child", f"{arm}:{n}")) for n in lengths} for arm in BATCHES
    }
    from eavi_step import own_step, without_cache
    from generation import check
    from timing import prepare, print_table, ratios, spread, text, write_result  # before torch

    device = prepare(args)
    check()
    step, some = own_step(args, device, 1.0), own_step(args, device, None)
    cache = without_cache(args, device)
    gains = {
        f"{slow} over {fast}": {
            n: ratios(found[slow][n]["seconds"], found[fast][n]["seconds"]) for n in lengths
        }
        for slow, fast in (("through the cache", "decoupled"), ("recomputed", "decoupled, 2"))
    }

    def more(arm: str, tokens: int) -> float:
        """MiB of the arm's peak beyond what it began with."""
        one = found[arm][tokens]
        return one["peak_mib"] - one["before_mib"]

    print_step(args, step, some)
    print(f"cached over uncached writing {text(cache['gain'])}")
    print_table(
        ["output tokens", *(f"{arm}: s, MiB" for arm in BATCHES), *gains],
        [
            [
                str(n),
                *(
                    f"{spread(found[arm][n]['seconds'])['median']:.2f}, {more(arm, n):,.0f}"
                    for arm in BATCHES
                ),
                *(text(gains[name][n], 1) for name in gains),
            ]
            for n in lengths
        ],
    )
    growth = {
        arm: more(arm, lengths[-1])
        - found[arm][lengths[-1]]["cache_mib"]
        - (more(arm, lengths[0]) - found[arm][lengths[0]]["cache_mib"])
        for arm in ("excursion", "excursion, 64")
    }
    print(
        f"from {lengths[0]} to {lengths[-1]} tokens the excursion's peak grows by "
        + ", ".join(f"{mib:.1f} MiB ({arm})" for arm, mib in growth.items())
        + " beyond its cache"
    )
    reached = {name: gain[lengths[-1]]["median"] >= TARGET for name, gain in gains.items()}
    print_table(
        ["output tokens", "excursion of 8, of 64: MiB of the cache, MiB more than that"],
        [
            [
                str(n),
                "; ".join(
                    f"{found[arm][n]['cache_mib']:.1f}, "
                    f"{more(arm, n) - found[arm][n]['cache_mib']:,.1f}"
                    for arm in ("excursion", "excursion, 64")
                ),
            ]
            for n in lengths
        ],
    )
    print(f"target {TARGET:g}x at {lengths[-1]} tokens reached: {reached}")
    write_result(
        "eavi",
        args,
        device,
        step=step,
        step_with_the_default_share=some,
        cached_over_uncached=cache,
        outputs=found,
        gains=gains,
        target_over_generation=TARGET,
        target_reached=reached,
        peak_growth_beyond_cache_mib=growth,
    )


def read_arguments() -> Any:
    """The children import torch through ``timing`` here; the parent must not."""
    import argparse

    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="smoke test: tiny, not written")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, default=0, help="0: torch's default")
    made.add_argument("--network", default="sparse", choices=("sparse", "dense"))
    made.add_argument("--eager", action="store_true", help="section 1 uncompiled")
    made.add_argument("--step-only", action="store_true", help="section 1 alone")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    main()
