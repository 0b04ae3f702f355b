"""Number formats of the Triton kernels: of factors, of sums, and how float32 is multiplied."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on any device."""

TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def number_types(dtype: torch.dtype) -> dict[str, Any]:
    """DOT: dtype of what is multiplied; SUM: of sums; PRECISION of float32 products.

    float32 is multiplied exactly unless torch.set_float32_matmul_precision allows TF32, as in
    torch's own products. The interpreter multiplies bfloat16 wrongly, without a word, so there it
    is widened first.
    """
    widen = INTERPRETED and dtype == torch.bfloat16
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "DOT": tl.float32 if widen else TRITON_TYPES[dtype],
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
    }


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums, log-sum-exps and parts of gradients are stored."""
    return torch.float64 if dtype == torch.float64 else torch.float32
