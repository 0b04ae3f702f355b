"""Compiles every NSA kernel, in each shape that presets and benchmarks use, for sm_80 and sm_90.

    python exp/bench/compile_nsa.py [--quick]

Needs triton and no GPU. Prints registers, bytes spilled and shared memory of each, and fails on
more than SPILL_LIMIT bytes spilled, or on shared memory that a program cannot have.
"""

from __future__ import annotations

import argparse
import sys

import torch

from tiny_onn_kernels import kernel_compile
from tiny_onn_kernels.nsa import kernel as nsa

SPILL_LIMIT = 256
TOKENS = 512
SHAPES = (
    # heads, kv_heads, width, dtype, (block, stride, select_block, count, window)
    (12, 12, 64, torch.bfloat16, (32, 16, 32, 8, 128)),  # preset base, network sparse
    (12, 12, 64, torch.bfloat16, (32, 16, 64, 16, 512)),  # network sparse_long
    (16, 2, 64, torch.bfloat16, (32, 16, 32, 8, 128)),  # ARC's shape of the benchmark
    (64, 4, 128, torch.bfloat16, (32, 16, 64, 16, 512)),  # the paper's
    (5, 5, 32, torch.float32, (32, 16, 32, 8, 128)),  # preset nano in float32
    (8, 1, 256, torch.float16, (32, 16, 64, 16, 512)),  # the widest head
)


def call_everything(heads, kv_heads, width, dtype, sizes) -> None:
    """All launches of a training step's attention and of a decoding step."""
    block, stride, select_block, count, window = sizes
    names = {"block": block, "stride": stride, "select_block": select_block, "window": window}
    layout = nsa.lay_out(torch.tensor([0, TOKENS]), **names)
    rows = len(layout.compressed_rows_ML)

    def leaf(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    q, k, v = leaf(TOKENS, heads, width), *(leaf(TOKENS, kv_heads, width) for _ in range(2))
    kc, vc = (leaf(rows, kv_heads, width) for _ in range(2))
    index = torch.arange(count).expand(TOKENS, kv_heads, count)
    compressed, _ = nsa.attend_compressed_and_choose(q, kc, vc, layout, count)
    selected = nsa.selected_attention(q, k, v, index, layout)
    out = compressed + selected + nsa.window_attention(q, k, v, layout)
    torch.autograd.grad(out, (q, k, v, kc, vc), torch.zeros_like(out))
    with torch.no_grad():
        caches = [torch.zeros(2, kv_heads, TOKENS, width, dtype=dtype) for _ in range(2)]
        time_B = torch.tensor([TOKENS - 1, 7])
        nsa.decode_compressed(q[:2], *caches, time_B)
        nsa.decode_selected(q[:2], *caches, index[:2], time_B, select_block)
        nsa.decode_window(q[:2], *caches, time_B, window)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, sm_90 only")
    args = parser.parse_args()
    if nsa.INTERPRETED:
        print("error: got TRITON_INTERPRET=1, expected it unset; nothing compiles in there")
        return 2
    failures = 0
    print(f"{'kernel':28} {'shape':24} sm regs spill  shared  cores  seconds")
    for shape in SHAPES[:1] if args.quick else SHAPES:
        heads, kv_heads, width, dtype, _ = shape
        label = f"{heads}/{kv_heads} x {width} {str(dtype).removeprefix('torch.')}"
        with kernel_compile.recorded_launches() as launches:
            call_everything(*shape)
        for launch in launches:
            for capability in (90,) if args.quick else (80, 90):
                found = kernel_compile.compile_for(launch, capability)
                fits = found.shared_bytes <= kernel_compile.SHARED_BYTES[capability]
                fails = found.spilled_bytes > SPILL_LIMIT or not fits
                failures += fails
                print(
                    f"{found.name:28} {label:24} {capability} {found.registers:4} "
                    f"{found.spilled_bytes:5} {found.shared_bytes:7}  {found.tensor_cores:5} "
                    f"{found.seconds:6.1f}{'  FAILS' if fails else ''}",
                    flush=True,
                )
    print(f"{failures} of these fail (spill limit {SPILL_LIMIT} bytes)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
