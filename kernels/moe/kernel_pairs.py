"""Where the active pairs of a mask stand, found on the device, and the sum of each token's rows.

A pair (token, expert) has a row in buffers of N * E rows, the most there can be: only the device
knows how many are active, so no shape depends on it and nothing waits. Rows are expert by expert,
tokens ascending; those from begin_E[E] on are unused and never read.

Shapes: N tokens, E experts, C columns of a row, P = N * E rows, T tiles of rows, K chunks of
tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import number_types
from tiny_onn_kernels.moe.kernel_launch import block_rows

MASK_ELEMENTS = 2048
"""Of the mask in one program."""

SUM_ELEMENTS = 1024
"""Of the output in one program."""


class PairLayout(NamedTuple):
    """Expert-major rows, and each token's rows among them. All int32.

    token_P: the token of every row. row_P: the rows token by token, experts ascending. begin_N:
    (N + 1,) each token's first place in row_P. begin_E: (E + 1,) each expert's first row. tile_T2:
    expert and first row of each tile. tiles_1: how many tiles there are.
    """

    token_P: Tensor
    row_P: Tensor
    begin_N: Tensor
    begin_E: Tensor
    tile_T2: Tensor
    tiles_1: Tensor


def empty_layout(mask_NE: Tensor) -> PairLayout:
    """Buffers for any number of active pairs; fewer tokens a tile than 16 there never are."""
    num_tokens, num_experts = mask_NE.shape
    most_tiles = num_experts * triton.cdiv(num_tokens, 16)
    sizes = (
        (num_tokens * num_experts,),
        (num_tokens * num_experts,),
        (num_tokens + 1,),
        (num_experts + 1,),
        (most_tiles, 2),
        (1,),
    )
    return PairLayout(*(mask_NE.new_empty(size, dtype=torch.int32) for size in sizes))


@triton.jit
def _load_mask(mask_ptr, N, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    token_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert_E = tl.arange(0, BLOCK_E)
    place_NE = token_N.to(tl.int64)[:, None] * E + expert_E[None, :]
    inside_NE = (token_N < N)[:, None] & (expert_E < E)[None, :]
    active_NE = tl.load(mask_ptr + place_NE, mask=inside_NE, other=0).to(tl.int32)
    return token_N, expert_E, active_NE


@triton.jit(do_not_specialize=["N", "K"])
def count_pairs(
    mask_ptr,
    count_ptr,
    N,
    K,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """count (E + 1, K): pairs of each expert in each chunk of tokens; the last row: of all."""
    chunk = tl.program_id(0)
    _, expert_E, active_NE = _load_mask(mask_ptr, N, E, BLOCK_N, BLOCK_E)
    count_E = tl.sum(active_NE, axis=0)
    tl.store(count_ptr + expert_E * K + chunk, count_E, mask=expert_E < E)
    tl.store(count_ptr + E * K + chunk, tl.sum(count_E, axis=0))


@triton.jit(do_not_specialize=["N", "K"])
def place_pairs(
    mask_ptr,
    end_ptr,
    token_ptr,
    row_ptr,
    begin_ptr,
    N,
    K,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """token_P, row_P and begin_N of one chunk, from the running sums of the counts over chunks."""
    chunk = tl.program_id(0)
    token_N, expert_E, active_NE = _load_mask(mask_ptr, N, E, BLOCK_N, BLOCK_E)
    inside_E = expert_E < E
    total_E = tl.load(end_ptr + expert_E * K + K - 1, mask=inside_E, other=0)
    end_E = tl.load(end_ptr + expert_E * K + chunk, mask=inside_E, other=0)
    first_E = tl.cumsum(total_E, axis=0) - total_E + end_E - tl.sum(active_NE, axis=0)
    row_NE = first_E[None, :] + tl.cumsum(active_NE, axis=0) - active_NE

    active_N = tl.sum(active_NE, axis=1)
    end = tl.load(end_ptr + E * K + chunk)
    begin_N = end - tl.sum(active_N, axis=0) + tl.cumsum(active_N, axis=0) - active_N
    place_NE = begin_N[:, None] + tl.cumsum(active_NE, axis=1) - active_NE

    is_active_NE = active_NE > 0
    token_NE = tl.broadcast_to(token_N[:, None], (BLOCK_N, BLOCK_E))
    tl.store(token_ptr + row_NE, token_NE, mask=is_active_NE)
    tl.store(row_ptr + place_NE, row_NE, mask=is_active_NE)
    tl.store(begin_ptr + token_N, begin_N, mask=token_N < N)
    tl.store(begin_ptr + N, end, mask=chunk == K - 1)


@triton.jit(do_not_specialize=["K"])
def map_tiles(
    end_ptr,
    begin_ptr,
    tile_ptr,
    tiles_ptr,
    K,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """begin_E and tile_T2 of one expert: no tile spans two, an expert's last may be short."""
    own = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    rows_E = tl.load(end_ptr + expert_E * K + K - 1, mask=expert_E < E, other=0)
    tiles_E = (rows_E + BLOCK_P - 1) // BLOCK_P
    first_row = tl.sum(tl.where(expert_E < own, rows_E, 0), axis=0)
    first_tile = tl.sum(tl.where(expert_E < own, tiles_E, 0), axis=0)
    num_tiles = tl.sum(tl.where(expert_E == own, tiles_E, 0), axis=0)
    tl.store(begin_ptr + own, first_row)
    is_last = own == E - 1
    tl.store(begin_ptr + E, tl.sum(rows_E, axis=0), mask=is_last)
    tl.store(tiles_ptr, tl.sum(tiles_E, axis=0), mask=is_last)
    start = 0
    while start < num_tiles:
        tile_T = start + tl.arange(0, BLOCK_T)
        inside_T = tile_T < num_tiles
        place_T = tile_ptr + 2 * (first_tile + tile_T)
        tl.store(place_T, tl.zeros((BLOCK_T,), dtype=tl.int32) + own, mask=inside_T)
        tl.store(place_T + 1, first_row + tile_T * BLOCK_P, mask=inside_T)
        start += BLOCK_T


@triton.jit(do_not_specialize=["N"])
def sum_rows(
    rows_ptr,
    row_ptr,
    begin_ptr,
    out_ptr,
    N,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM: tl.constexpr,
):
    """out (N, C): each token's rows, added in the order of the experts; zeros where it has none."""
    token_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_N, inside_C = token_N < N, column_C < C
    begin_N = tl.load(begin_ptr + token_N, mask=inside_N, other=0)
    count_N = tl.load(begin_ptr + token_N + 1, mask=inside_N, other=0) - begin_N
    most = tl.max(count_N, axis=0)
    total_NC = tl.zeros((BLOCK_N, BLOCK_C), dtype=SUM)
    step = 0
    while step < most:
        has_N = step < count_N
        row_N = tl.load(row_ptr + begin_N + step, mask=has_N, other=0).to(tl.int64)
        place_NC = row_N[:, None] * C + column_C[None, :]
        has_NC = has_N[:, None] & inside_C[None, :]
        total_NC += tl.load(rows_ptr + place_NC, mask=has_NC, other=0.0).to(SUM)
        step += 1
    place_NC = token_N.to(tl.int64)[:, None] * C + column_C[None, :]
    out_NC = total_NC.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place_NC, out_NC, mask=inside_N[:, None] & inside_C[None, :])


def lay_out_pairs(mask_NE: Tensor) -> PairLayout:
    """Rows for the active pairs of a boolean mask (N, E); three kernels and a running sum."""
    num_tokens, num_experts = mask_NE.shape
    assert num_tokens * num_experts < 2**31, f"rows are int32, got a mask of {mask_NE.shape}"
    layout = empty_layout(mask_NE)
    mask_NE = mask_NE.contiguous().view(torch.uint8)
    block_experts = triton.next_power_of_2(num_experts)
    block_tokens = max(1, MASK_ELEMENTS // block_experts)
    num_chunks = max(1, triton.cdiv(num_tokens, block_tokens))
    sizes = {"E": num_experts, "BLOCK_N": block_tokens, "BLOCK_E": block_experts}
    count_XK = mask_NE.new_empty((num_experts + 1, num_chunks), dtype=torch.int32)
    count_pairs[(num_chunks,)](mask_NE, count_XK, num_tokens, num_chunks, **sizes)
    end_XK = count_XK.cumsum(dim=1, dtype=torch.int32)
    place_pairs[(num_chunks,)](
        mask_NE, end_XK, layout.token_P, layout.row_P, layout.begin_N,
        num_tokens, num_chunks, **sizes,
    )  # fmt: skip
    map_tiles[(num_experts,)](
        end_XK, layout.begin_E, layout.tile_T2, layout.tiles_1, num_chunks,
        E=num_experts, BLOCK_E=block_experts, BLOCK_P=block_rows(num_tokens), BLOCK_T=64,
    )  # fmt: skip
    return layout


def sum_by_token(rows_PC: Tensor, layout: PairLayout) -> Tensor:
    """(N, C): the sum of each token's rows."""
    num_tokens, width = len(layout.begin_N) - 1, rows_PC.shape[1]
    out_NC = rows_PC.new_empty(num_tokens, width)
    block_columns = min(256, triton.next_power_of_2(width))
    block_tokens = max(1, SUM_ELEMENTS // block_columns)
    grid = (max(1, triton.cdiv(num_tokens, block_tokens)), triton.cdiv(width, block_columns))
    sum_rows[grid](
        rows_PC, layout.row_P, layout.begin_N, out_NC, num_tokens, C=width,
        BLOCK_N=block_tokens, BLOCK_C=block_columns, SUM=number_types(rows_PC.dtype)["SUM"],
    )  # fmt: skip
    return out_NC
