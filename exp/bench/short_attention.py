"""Our attention over short documents against torch's SDPA, forward and backward.

    python exp/bench/short_attention.py [--quick] [--device cpu|cuda] [--threads N]

On a CPU ours is ``plan_sdpa`` (batched matrix products up to SHORT_TOKENS) and the rival torch's
flash kernel; on CUDA ours is the back-end that ops.backend=auto chooses and the rival whatever
torch's SDPA chooses. Documents of one length, so neither side pads. Both are checked against the
float64 reference, outputs and gradients, before anything is timed.

Shapes: N tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from timing import (
    measure,
    parser,
    prepare,
    print_table,
    ratios,
    relative_error,
    require,
    spread,
    text,
    write_result,
)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiny_onn.model.flash_varlen import flash_varlen
from tiny_onn.model.packed_attention import (
    SHORT_TOKENS,
    Attend,
    DocumentSpans,
    plan_reference,
    plan_sdpa,
    plan_varlen,
    torch_varlen,
)
from tiny_onn.ops import resolve_attention

SHAPES = ((60, 30), (80, 64), (50, 100), (32, 160))
HEADS, HEAD_WIDTH = 4, 32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CALLS = 4
"""Calls in one timed repeat."""


def spans_of(count: int, length: int, prefix: int, device: torch.device) -> DocumentSpans:
    return DocumentSpans(
        torch.arange(count + 1, dtype=torch.int32, device=device) * length,
        torch.full((count,), prefix, device=device),
        (length,) * count,
        (prefix,) * count,
    )


def plan_ours(spans: DocumentSpans, backend: str) -> Attend:
    if backend == "sdpa":
        return plan_sdpa(spans)
    return plan_varlen(spans, flash_varlen() if backend == "flash" else torch_varlen())


def plan_torch(count: int, length: int, prefix: int, device: torch.device) -> Attend:
    """torch's SDPA over the batch; its causal flag where there is no prefix."""
    index = torch.arange(length, device=device)
    mask = (index[None, :] <= index[:, None]) | (
        (index[None, :] < prefix) & (index[:, None] < prefix)
    )
    on_cpu = device.type == "cpu"

    def attend(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, (count, length)).transpose(1, 2) for t in (q_NHD, k_NHD, v_NHD))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_cpu else nullcontext():
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask if prefix else None, is_causal=not prefix
            )
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def both_ways(attend: Attend, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and the three gradients."""
    out = attend(*qkv)
    return [out, *torch.autograd.grad(out, qkv, grad)]


def repeated(attend: Attend, qkv: list[Tensor], grad: Tensor) -> Callable[[], None]:
    def call() -> None:
        for _ in range(CALLS):
            both_ways(attend, qkv, grad)

    return call


def main() -> None:
    args = parser(__doc__).parse_args()
    device = prepare(args)
    backend = resolve_attention("auto", device)
    shapes = SHAPES[:1] if args.quick else SHAPES
    rows, cases = [], []
    for dtype in TOLERANCE:
        for mask in ("causal", "prefix"):
            for count, length in shapes:
                prefix = length // 2 if mask == "prefix" else 0
                spans = spans_of(count, length, prefix, device)
                size = (count * length, HEADS, HEAD_WIDTH)
                qkv = [torch.randn(size, device=device, dtype=dtype) for _ in range(3)]
                qkv = [t.requires_grad_() for t in qkv]
                grad = torch.randn(size, device=device, dtype=dtype)
                arms = {
                    "torch": plan_torch(count, length, prefix, device),
                    "ours": plan_ours(spans, backend),
                }
                exact = [t.detach().double().requires_grad_() for t in qkv]
                expected = both_ways(plan_reference(spans), exact, grad.double())
                # variable-length kernels compute float32 inputs in bfloat16
                rounded = device.type == "cuda" and backend != "sdpa"
                tolerance = TOLERANCE[torch.bfloat16 if rounded else dtype]
                for name, attend in arms.items():
                    pairs = zip(both_ways(attend, qkv, grad), expected, strict=True)
                    error = max(relative_error(got, want) for got, want in pairs)
                    what = f"{name} {dtype} {mask} {count}x{length}: error {error:.2g}"
                    require(error <= tolerance, f"{what}, expected at most {tolerance}")
                seconds = measure(
                    {name: repeated(attend, qkv, grad) for name, attend in arms.items()},
                    device,
                    repeats=2 if args.quick else 9,
                )
                ms = {name: spread(taken, 1e3 / CALLS) for name, taken in seconds.items()}
                gain = ratios(seconds["torch"], seconds["ours"])
                kind = str(dtype).removeprefix("torch.")
                cases.append(
                    {"dtype": kind, "mask": mask, "documents": count, "tokens": length}
                    | {"torch_ms": ms["torch"], "ours_ms": ms["ours"], "gain": gain}
                )
                shape = f"{count} x {length}"
                rows.append([kind, mask, shape, text(ms["torch"]), text(ms["ours"]), text(gain)])
    print_table(["dtype", "mask", "documents x tokens", "torch ms", "ours ms", "gain"], rows)
    shape = {"heads": HEADS, "head_width": HEAD_WIDTH, "short_tokens": SHORT_TOKENS}
    write_result("short_attention", args, device, **shape, backend=backend, cases=cases)


if __name__ == "__main__":
    main()
