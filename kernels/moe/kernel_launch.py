"""Tile sizes and launch sizes: chosen on the host, from shapes and dtypes alone."""

from typing import NamedTuple

import torch
import triton

MANY_TOKENS = 4096
"""From here on tiles have 128 rows: experts then have enough of them to fill most."""

PROGRAMS_PER_PROCESSOR = 64
"""Work is handed out in this many programs for each multiprocessor, and each takes every so-manieth
tile. Few enough that those which find no tile cost little (buffers are sized for all pairs, and
only the device knows how many there are), many enough that the hardware balances the load."""

INTERPRETED_PROGRAMS = 4
"""Few, so that tests see a program take several tiles."""


class Tiling(NamedTuple):
    """Rows and columns of the tile that a program computes, and the part of the sum it reads at a
    time."""

    rows: int
    columns: int
    inner: int
    num_warps: int

    @property
    def options(self) -> dict[str, int]:
        """Stages fill 96 KiB of shared memory at most."""
        return {"num_warps": self.num_warps, "num_stages": 3}


def block_rows(num_tokens: int) -> int:
    """Rows of a tile of pairs; all kernels of a call share it, and with it the tile map."""
    if num_tokens >= MANY_TOKENS:
        return 128
    return 64 if num_tokens > 32 else 16


def _block(width: int, most: int) -> int:
    """A power of two from 16 (what a matrix unit needs) to ``most``, no wider than it must be."""
    return min(most, max(16, triton.next_power_of_2(width)))


def tiling(rows: int, width: int, inner: int, dtype: torch.dtype, accumulators: int = 1) -> Tiling:
    """For a product of ``inner`` by ``width`` with so many accumulators of one tile's size.

    From three on eight warps share even a small tile: four spill (make kernels-compile).
    """
    most = 32 if accumulators > 3 else 64
    if rows == 128 and width % 128 == 0 and accumulators == 1:
        most = 128
    num_warps = 8 if rows == 128 or (rows == 64 and accumulators > 2) else 4
    return Tiling(rows, _block(width, most), _block(inner, 128 // dtype.itemsize), num_warps)


def num_programs(work: int, device: torch.device) -> int:
    """Programs for at most ``work`` tiles; at least one, which may find nothing to do."""
    limit = INTERPRETED_PROGRAMS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        limit = PROGRAMS_PER_PROCESSOR * processors
    return max(1, min(work, limit))
