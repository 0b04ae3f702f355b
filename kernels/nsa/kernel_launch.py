"""What every launch of NSA's kernels needs: one dtype, paddings, tile sizes."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import TRITON_TYPES

NARROW_DOT = 16
"""Fewest rows, columns and terms of a product of tensor cores."""


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


def keys_beside_few_rows(width: int, value_width: int, dtype: torch.dtype) -> int:
    """Keys of a tile whose query rows are the heads of one group: at most 32 KiB of them, 16 of
    float32 (no matrix unit, most registers)."""
    row_bytes = (padded(width) + padded(value_width)) * dtype.itemsize
    most_bytes = 2**15 if dtype.itemsize == 2 else 2**14
    return min(64, max(NARROW_DOT, most_bytes // row_bytes))


def tile_sizes(
    width: int, value_width: int, dtype: torch.dtype, adjoint: bool = False
) -> dict[str, int]:
    """BLOCK_R query rows and BLOCK_C keys of a tile, num_warps and num_stages; adjoint: of a
    backward kernel, which keeps two tiles of scores and two sums.

    The largest that spill nothing worth naming on sm_80 and sm_90 (make kernels-compile): a row of
    keys and values of W bytes costs W each time it is staged, and 4 E bytes of a query row are
    summed in registers. float32 that is multiplied exactly uses no matrix unit and most registers.
    """
    row_bytes = (padded(width) + padded(value_width)) * dtype.itemsize
    if dtype.itemsize > 2:
        rows = 64 if row_bytes <= (256 if adjoint else 512) else 32
        keys = 32 if row_bytes <= 512 else 16
        return {"BLOCK_R": rows, "BLOCK_C": keys, "num_warps": 8, "num_stages": 2}
    if row_bytes <= 256 and not adjoint:
        return {"BLOCK_R": 128, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3}
    if row_bytes <= 128:
        return {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3}
    if row_bytes <= 512:
        return {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 8 if adjoint else 4, "num_stages": 2}
    if row_bytes <= 1024:
        rows = 32 if adjoint else 64  # what sm_86, sm_89 and sm_120 have room for
        return {"BLOCK_R": rows, "BLOCK_C": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 8, "num_stages": 1}
