"""Which way the selected branch goes, and how much of it at once: from shapes alone.

Shapes: N tokens, H query heads in K groups of G, D head width, E value width, n chosen blocks, P =
N * K * n pairs, Z blocks of all groups, S slices of the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import sum_dtype
from tiny_onn_kernels.nsa.kernel_keys_first import find_slices
from tiny_onn_kernels.nsa.kernel_launch import padded

KEYS_FIRST_SHARE = 0.75
"""Of what queries first reads of keys, the most that keys first may move of queries and parts: it
comes from memory, the keys mostly from L2 (by the roofline in README.md; bench-gpu measures it)."""

MOST_KEYS = 64
"""Of a block, likewise: the product of a tile of queries with all of them stays in registers."""

MOST_PART_BYTES = 2**30
"""Of the parts that pairs leave to be merged; a longer batch goes slice by slice."""

MOST_KEY_BYTES = 2**15
"""Of a block's keys and values, for a program to hold all of them."""


def goes_keys_first(q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, select_block: int) -> bool:
    """Whether outputs are computed block by block, and merged, rather than token by token.

    Of each pair, queries first reads l' (D + E) numbers; keys first reads G D, writes G E and reads
    them again.
    """
    width, value_width = q_NHD.shape[2], v_NKE.shape[2]
    row_bytes = (padded(width) + padded(value_width)) * q_NHD.dtype.itemsize
    keys = padded(select_block)
    fits = keys <= MOST_KEYS and keys * row_bytes <= MOST_KEY_BYTES
    moved = q_NHD.shape[1] // k_NKD.shape[1] * (width + 2 * value_width)
    return fits and moved <= KEYS_FIRST_SHARE * select_block * (width + value_width)


def tokens_of_a_slice(q_NHD: Tensor, v_NKE: Tensor, count: int) -> int:
    """Tokens whose parts (N, H, n, D or E) are stored at once: all of a short batch."""
    widest = max(q_NHD.shape[2], v_NKE.shape[2])
    token_bytes = q_NHD.shape[1] * count * widest * q_NHD.dtype.itemsize
    return max(64, min(len(q_NHD), MOST_PART_BYTES // token_bytes))


def bounds_of_slices(
    pair_P: Tensor, offset_Z1: Tensor, num_slices: int, slice_pairs: int
) -> Tensor:
    """int64 (slices + 1, Z): row s and s + 1 are where each block's pairs of slice s begin and end.

    pair_P, offset_Z1: the inverse index; a block's pairs ascend.
    """
    if num_slices == 1:
        return torch.stack([offset_Z1[:-1], offset_Z1[1:]])
    num_runs = len(offset_Z1) - 1
    bound_SZ = offset_Z1.new_empty(num_slices + 1, num_runs)
    find_slices[(triton.cdiv(bound_SZ.numel(), SEARCHES),)](
        *(pair_P, offset_Z1, bound_SZ, num_runs, num_slices + 1, slice_pairs),
        len(pair_P).bit_length(),
        BLOCK=SEARCHES,
    )
    return bound_SZ


def pairs_of_a_part(num_tokens: int, count: int, select_block: int) -> int:
    """Pairs that one program walks: as many as a block has on average, n l', so that the first
    block of a document keeps nobody waiting; more for long batches, so that slots of parts stay
    within some times the gradients themselves."""
    return max(64, count * select_block) * max(1, num_tokens // 16384)


SEARCHES = 256
"""Bounds that one program looks for."""


class Slice(NamedTuple):
    """Some consecutive tokens; their first pair; bound_2Z: where each block's pairs of them begin
    and end, among all pairs sorted by block."""

    tokens: slice
    first_pair: int
    bound_2Z: Tensor


def cut_into_slices(
    pair_P: Tensor, offset_Z1: Tensor, num_tokens: int, slice_tokens: int
) -> list[Slice]:
    """The slices of a batch, in order."""
    firsts = range(0, num_tokens, slice_tokens)
    token_pairs = len(pair_P) // max(1, num_tokens)
    bound_SZ = bounds_of_slices(pair_P, offset_Z1, len(firsts), slice_tokens * token_pairs)
    return [
        Slice(slice(first, first + slice_tokens), first * token_pairs, bound_SZ[n : n + 2])
        for n, first in enumerate(firsts)
    ]


def slots_of_parts(bound_2Z: Tensor, part: int) -> Tensor:
    """(Z,) first slot of each block that has several parts of ``part`` pairs.

    A block of c > part pairs has fewer than 2 c / part parts: so all have at most 2 P / part.
    """
    parts_Z = (bound_2Z[1] - bound_2Z[0] + part - 1) // part
    slots_Z = torch.where(parts_Z > 1, parts_Z, 0)
    return slots_Z.cumsum(0) - slots_Z


def room_for_slots(q_NHD: Tensor, v_NKE: Tensor, slots: int, select_block: int) -> list[Tensor]:
    """Buffers for the gradients of the keys and of the values of so many parts."""
    kind = sum_dtype(q_NHD.dtype)
    widths = (q_NHD.shape[2], v_NKE.shape[2])
    return [q_NHD.new_empty(slots, select_block, width, dtype=kind) for width in widths]
