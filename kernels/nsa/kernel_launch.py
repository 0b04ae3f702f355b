"""What every launch of NSA's kernels needs: dtypes, paddings, tile sizes, precision of products."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on any device."""

NARROW_DOT = 16
"""Fewest rows, columns and terms of a product of tensor cores."""

TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def padded(size: int) -> int:
    """The power of two that holds ``size`` numbers in a product."""
    return max(NARROW_DOT, triton.next_power_of_2(size))


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with neighbours in its last dimension side by side; a view if they are."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def same_dtype(*tensors: Tensor) -> None:
    """Raises ValueError unless all have one dtype that the kernels know."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= TRITON_TYPES.keys():
        raise ValueError(
            f"got {sorted(map(str, dtypes))}; expected queries, keys and values of one of "
            f"{sorted(map(str, TRITON_TYPES))}; cast them, or use ops.nsa=reference"
        )


def number_types(dtype: torch.dtype) -> dict[str, Any]:
    """DOT: dtype of what is multiplied; SUM: of sums and softmax; PRECISION of float32 products.

    float32 is multiplied exactly unless torch.set_float32_matmul_precision allows less. The
    interpreter multiplies bfloat16 wrongly, without a word, so there it is widened first.
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


def tile_sizes(width: int, value_width: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_R query rows and BLOCK_C keys of a tile, num_warps and num_stages.

    Held to about 160 KiB of shared memory and 255 registers: a row of keys and values of W bytes
    costs W each time it is staged, and 4 E bytes of a query row are summed in registers.
    """
    row_bytes = (padded(width) + padded(value_width)) * dtype.itemsize
    if row_bytes <= 256:
        return {"BLOCK_R": 128, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3}
    if row_bytes <= 512:
        return {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}
    if row_bytes <= 1024:
        return {"BLOCK_R": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 8, "num_stages": 1}
