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

    float32 is multiplied exactly unless the run allows TF32 (torch.set_float32_matmul_precision),
    as in torch's own products. The interpreter multiplies bfloat16 wrongly, without a word, so
    there it is widened first.
    """
    widen = INTERPRETED and dtype == torch.bfloat16
    return {
        "DOT": tl.float32 if widen else TRITON_TYPES[dtype],
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if _allows_tf32() else "ieee",
    }


def _allows_tf32() -> bool:
    """Whether this run lets float32 products round; read as newer versions of torch set it, whose
    older getter refuses to answer once that was used."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums, log-sum-exps and parts of gradients are stored."""
    return torch.float64 if dtype == torch.float64 else torch.float32
