"""Time and memory of a training step as documents grow, at a constant number of tokens.

    python exp/bench/length.py [--quick] [--device cpu|cuda] [--threads N] [key=value ...]

Documents of 192 to 1,863 tokens (the longest pair there is), the nano preset's network, eager.
Every length runs in a process of its own, whose peak is read from ru_maxrss (on CUDA also from
torch's allocator). This process imports torch only after them, because a child's ru_maxrss
begins at what its parent holds. Before anything is timed, the loss of a document of every length
must equal the reference attention's.
"""

from __future__ import annotations

import json
import time
from typing import Any

from processes import peak_mib, run_child

GRIDS = {  # tokens of the document: height and width of the input and of the output
    192: ((9, 9), (9, 10)),
    367: ((13, 13), (13, 13)),
    763: ((19, 19), (19, 19)),
    1203: ((24, 24), (24, 24)),
    1863: ((30, 30), (30, 30)),
}
BUDGET_TOKENS = 7500
"""Four of the longest documents."""


def make_batch(length: int, budget: int) -> Any:
    """As many random documents of ``length`` tokens as fit, packed."""
    import numpy as np

    from tiny_onn.arc.packing import pack
    from tiny_onn.arc.task import Pair
    from tiny_onn.arc.tokens import encode_pair

    rng = np.random.default_rng(length)
    documents = []
    for _ in range(max(1, budget // length)):
        grids = [rng.integers(0, 10, shape, dtype=np.uint8) for shape in GRIDS[length]]
        documents.append(encode_pair(Pair(*grids), 0))
        assert len(documents[-1].tokens) == length, (len(documents[-1].tokens), length)
    return pack(documents)


def make_model(args: Any) -> tuple[Any, Any, Any]:
    """(model, configuration, device)."""
    from timing import prepare, wake

    from tiny_onn.config.load import load_config
    from tiny_onn.model.tiny_onn import build_model
    from tiny_onn.training.hardware import with_precision

    device = prepare(args)
    config = with_precision(load_config(["preset=nano", "network=dense", *args.overrides]))
    model = wake(build_model(config.model, 1, config.moe, config.nsa)).to(device).train()
    return model.use_backend(config.ops.backend, device), config, device


def check(args: Any, lengths: list[int]) -> None:
    """Logits of one document of every length against the reference attention, in fp32."""
    import torch
    from timing import relative_error, require

    model, config, device = make_model(args)
    chosen = model.attention_backend
    limit = 1e-4 if chosen in ("sdpa", "reference") else 5e-2  # varlen kernels round to bfloat16
    for length in lengths:
        batch = make_batch(length, length).to(device)
        with torch.no_grad():
            logits = []
            for backend in (chosen, "reference"):
                model.attention_backend = backend
                logits.append(model(batch).logits_MV)
        error = relative_error(*logits)
        require(error <= limit, f"{length} tokens: error {error:.2g}, expected at most {limit}")


def child(args: Any, length: int) -> dict[str, Any]:
    """Step times and peaks of one length, in this process."""
    import torch
    from timing import optimizer_step, wait_for

    from tiny_onn.arc.tokens import IGNORE
    from tiny_onn.inference.excursion import autocast
    from tiny_onn.losses.language import output_nll
    from tiny_onn.training.optim import build_optimizer

    model, config, device = make_model(args)
    optimizer = build_optimizer(model, config.optim)
    batch = make_batch(length, 1 if args.quick else BUDGET_TOKENS).to(device)
    rows_M = (batch.targets_N != IGNORE).nonzero().squeeze(1)
    targets_M = batch.targets_N[rows_M]
    before = peak_mib()
    seconds, losses = [], []
    for _ in range(2 if args.quick else 5):
        wait_for(device)
        start = time.perf_counter()
        with autocast(device, config.trainer.precision):
            nll, _ = output_nll(model(batch, rows_M).logits_MV, targets_M)
        optimizer_step(model, optimizer, nll / len(targets_M), config.optim.clip_norm)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(nll.detach()) / len(targets_M))
    cuda = device.type == "cuda"
    return {
        "documents": len(batch.order),
        "tokens": batch.num_tokens,
        "seconds": seconds[1:],
        "finite": all(loss == loss and abs(loss) < 1e9 for loss in losses),
        "peak_mib": round(peak_mib(), 1),
        "before_mib": round(before, 1),
        "cuda_peak_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1) if cuda else None,
    }


def read_arguments() -> Any:
    """The children import torch through ``timing`` here; the parent must not."""
    import argparse

    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="smoke test: tiny, not written")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, default=0, help="0: torch's default")
    made.add_argument("--child", type=int, help=argparse.SUPPRESS)
    made.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("overrides", nargs="*", help="key=value for the configuration")
    return made.parse_args()


def main() -> None:
    began, args = time.monotonic(), read_arguments()
    lengths = [192] if args.quick else list(GRIDS)
    if args.check:
        return check(args, lengths)
    if args.child is not None:
        return print(json.dumps(child(args, args.child)))
    run_child("--check")
    found = {length: json.loads(run_child("--child", str(length))) for length in lengths}

    from timing import prepare, print_table, require, spread, text, write_result

    device = prepare(args)
    rows, cases = [], []
    for length, case in found.items():
        require(case.pop("finite"), f"the loss of {length} tokens is not finite")
        seconds = case.pop("seconds")
        case["step_ms"] = spread(seconds, 1e3, 1)
        case["tokens_per_s"] = spread([case["tokens"] / s for s in seconds], digits=1)
        cases.append({"length": length, **case})
        memory = f"{case['peak_mib']:.0f}"
        if case["cuda_peak_mib"] is not None:
            memory += f" (device {case['cuda_peak_mib']:.0f})"
        rows.append(
            [f"{case['documents']} x {length}", text(case["step_ms"], 0)]
            + [text(case["tokens_per_s"], 0), memory, f"{case['before_mib']:.0f}"]
        )
    head = ["documents x tokens", "step ms", "tokens/s", "peak MiB", "before steps MiB"]
    print_table(head, rows)
    write_result(
        "length",
        args,
        device,
        budget_tokens=BUDGET_TOKENS,
        overrides=args.overrides,
        cases=cases,
        seconds_total=round(time.monotonic() - began, 1),
    )


if __name__ == "__main__":
    main()
