"""Selection without p_cmp in memory: scores from the log-sum-exp, ranked while still in registers.

A program holds all heads of a group for some consecutive tokens of one document. It goes through
the selectable blocks in tiles; the score of a block is summed over equation 9's taps, each tap a
product with every (l'/d)-th compressed key, so that compressed blocks fold onto selectable ones
without leaving their place. In a decoding step p_cmp is one row and stands in memory; only folding
and ranking are left.

Shapes: N tokens, X compressed rows, H query heads in K groups of G, D head width, n chosen blocks;
B tokens of a program (or rows of a step), M their query rows (heads padded to a power of two), J
selectable blocks of a tile, C compressed blocks of a tile, or of room.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import number_types
from tiny_onn_kernels.kernel_operation import operation
from tiny_onn_kernels.nsa.kernel_launch import NARROW_DOT, padded, unit_stride
from tiny_onn_kernels.nsa.kernel_rank import keep_best, store_best
from tiny_onn_kernels.nsa.kernel_softmax import load_rows
from tiny_onn_kernels.nsa.select import NUM_LOCAL, overlap_taps

ROWS = 64
"""Query rows of a program, and most blocks of a tile."""


@triton.jit
def _tokens(TILE_FIRST, TIME, SUBTILES: tl.constexpr, BLOCK_B: tl.constexpr):
    """This program's first token and the first row of its document."""
    tile_first = tl.load(TILE_FIRST + tl.program_id(0) // SUBTILES)
    start = tile_first - tl.load(TIME + tile_first)
    return tile_first + (tl.program_id(0) % SUBTILES) * BLOCK_B, start


@triton.jit
def _times(TIME, token_B, start, num_tokens):
    """Numbers of these tokens in their documents, and whether they are of the one at ``start``."""
    inside_B = token_B < num_tokens
    time_B = tl.load(TIME + token_B, mask=inside_B, other=0)
    return time_B, inside_B & (token_B - time_B == start)


@triton.jit
def _query_rows(
    Q, LSE, TIME, FIRST, STOP, first, start, stride_qn, stride_qh, num_tokens, num_heads,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Queries, log-sum-exps and numbers of visible compressed blocks of this program's rows."""
    row_M = tl.arange(0, BLOCK_B * GROUP)
    token_M = first + row_M // GROUP
    _, real_M = _times(TIME, token_M, start, num_tokens)
    real_M = real_M & (row_M % GROUP < G)
    head_M = tl.program_id(1).to(tl.int64) * G + row_M % GROUP
    q_MD = load_rows(Q, token_M * stride_qn + head_M * stride_qh, real_M, D, BLOCK_D, DOT)
    lse_M = tl.load(LSE + token_M * num_heads + head_M, mask=real_M, other=float("inf"))
    first_M = tl.load(FIRST + token_M, mask=real_M, other=0)
    return q_MD, lse_M, tl.load(STOP + token_M, mask=real_M, other=0) - first_M


@triton.jit
def _group_share(
    q_MD, k_CD, lse_M, count_M, number_C, GROUP: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr, SCALE2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p_cmp of the compressed blocks ``number_C``, summed over the group: (B, C)."""
    score_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision=PRECISION) * SCALE2
    seen_MC = (number_C >= 0)[None, :] & (number_C[None, :] < count_M[:, None])
    share_MC = tl.exp2(tl.where(seen_MC, score_MC, float("-inf")) - lse_M[:, None])
    return tl.sum(tl.reshape(share_MC, (BLOCK_B, GROUP, BLOCK_C)), 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _choose(
    Q, K, LSE, TILE_FIRST, TIME, END, FIRST, STOP, INDEX,
    stride_qn, stride_qh, stride_kx, stride_kh, num_tokens, num_heads,
    SUBTILES: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, NUM_LOCAL: tl.constexpr,
    SELECT_BLOCK: tl.constexpr, STEP: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr,
    PLATEAU: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    SCALE2: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, start = _tokens(TILE_FIRST, TIME, SUBTILES, BLOCK_B)
    token_B = first + tl.arange(0, BLOCK_B)
    time_B, real_B = _times(TIME, token_B, start, num_tokens)
    group = tl.program_id(1).to(tl.int64)
    end_B = tl.load(END + token_B, mask=real_B, other=-1)
    own_B = time_B // SELECT_BLOCK
    q_MD, lse_M, count_M = _query_rows(
        Q, LSE, TIME, FIRST, STOP, first, start, stride_qn, stride_qh, num_tokens, num_heads,
        G, GROUP, D, BLOCK_B, BLOCK_D, DOT,
    )  # fmt: skip
    base = tl.load(FIRST + start).to(tl.int64)
    most = tl.max(count_M, 0)
    num_blocks = ((tl.max(end_B, 0) + SELECT_BLOCK) // SELECT_BLOCK).to(tl.int32)
    best_BN = tl.full([BLOCK_B, BLOCK_N], -1, tl.int64)
    for first_block in range(0, num_blocks, BLOCK_J):
        block_J = first_block + tl.arange(0, BLOCK_J)
        score_BJ = tl.zeros([BLOCK_B, BLOCK_J], SUM)
        for tap in range(TAPS):
            number_J = block_J * STEP + (TAP + tap)
            offset_J = (base + number_J) * stride_kx + group * stride_kh
            inside_J = (number_J >= 0) & (number_J < most)
            k_JD = load_rows(K, offset_J, inside_J, D, BLOCK_D, DOT)
            share_BJ = _group_share(
                q_MD, k_JD, lse_M, count_M, number_J, GROUP, BLOCK_B, BLOCK_J, SCALE2, PRECISION
            )
            weight = tl.minimum(tl.minimum(tap + 1, TAPS - tap), PLATEAU)
            score_BJ += share_BJ * weight.to(SUM)
        best_BN = keep_best(
            best_BN, score_BJ, block_J, own_B, end_B, NUM_LOCAL, SELECT_BLOCK, BLOCK_B, BLOCK_N
        )
    row_B = token_B * tl.num_programs(1) + group
    store_best(INDEX, row_B, real_B, best_BN, COUNT, BLOCK_N)


@triton.jit(do_not_specialize=["room"])
def _choose_in_step(
    SHARE, TIME, INDEX, stride_sb, stride_sk, room,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, NUM_LOCAL: tl.constexpr,
    SELECT_BLOCK: tl.constexpr, STEP: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr,
    PLATEAU: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A row's token and group: blocks chosen from its p_cmp, 0 where it sees none."""
    batch, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    time = tl.load(TIME + batch)
    share = SHARE + batch * stride_sb + group * stride_sk
    one_B = tl.zeros([1], tl.int64)
    best_BN = tl.full([1, BLOCK_N], -1, tl.int64)
    for first_block in range(0, (time // SELECT_BLOCK + 1).to(tl.int32), BLOCK_J):
        block_J = first_block + tl.arange(0, BLOCK_J)
        score_J = tl.zeros([BLOCK_J], SHARE.dtype.element_ty)
        for tap in range(TAPS):
            number_J = block_J * STEP + (TAP + tap)
            inside_J = (number_J >= 0) & (number_J < room)
            weight = tl.minimum(tl.minimum(tap + 1, TAPS - tap), PLATEAU)
            share_J = tl.load(share + number_J, mask=inside_J, other=0.0)
            score_J += share_J * weight.to(SHARE.dtype.element_ty)
        best_BN = keep_best(
            best_BN, score_J[None, :], block_J, one_B + time // SELECT_BLOCK, one_B + time,
            NUM_LOCAL, SELECT_BLOCK, 1, BLOCK_N,
        )  # fmt: skip
    row_B = one_B + batch * tl.num_programs(1) + group
    store_best(INDEX, row_B, row_B >= 0, best_BN, COUNT, BLOCK_N)


@triton.jit(do_not_specialize=["num_tokens", "room"])
def _share(
    Q, K, LSE, TILE_FIRST, TIME, FIRST, STOP, SHARE,
    stride_qn, stride_qh, stride_kx, stride_kh, num_tokens, num_heads, room,
    SUBTILES: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    SCALE2: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p_cmp summed over each group, written out: (N, K, room)."""
    first, start = _tokens(TILE_FIRST, TIME, SUBTILES, BLOCK_B)
    token_B = first + tl.arange(0, BLOCK_B)
    _, real_B = _times(TIME, token_B, start, num_tokens)
    group = tl.program_id(1).to(tl.int64)
    q_MD, lse_M, count_M = _query_rows(
        Q, LSE, TIME, FIRST, STOP, first, start, stride_qn, stride_qh, num_tokens, num_heads,
        G, GROUP, D, BLOCK_B, BLOCK_D, DOT,
    )  # fmt: skip
    base = tl.load(FIRST + start).to(tl.int64)
    most = tl.max(count_M, 0)
    row_B = (token_B * tl.num_programs(1) + group) * room
    for first_number in range(0, room, BLOCK_C):
        number_C = first_number + tl.arange(0, BLOCK_C)
        offset_C = (base + number_C) * stride_kx + group * stride_kh
        k_CD = load_rows(K, offset_C, number_C < most, D, BLOCK_D, DOT)
        share_BC = _group_share(
            q_MD, k_CD, lse_M, count_M, number_C, GROUP, BLOCK_B, BLOCK_C, SCALE2, PRECISION
        )
        mask_BC = real_B[:, None] & (number_C < room)[None, :]
        tl.store(SHARE + row_B[:, None] + number_C[None, :], share_BC, mask=mask_BC)


def _ranking(
    block: int, stride: int, select_block: int, most_blocks: int, count: int, most: int = ROWS
) -> dict:
    """What kernels that choose are told of blocks: most_blocks, selectable ones of any row; most:
    of a tile."""
    tap, weights = overlap_taps(block, stride, select_block)
    kept = triton.next_power_of_2(count)
    return {
        "COUNT": count,
        "BLOCK_N": kept,
        "NUM_LOCAL": NUM_LOCAL,
        "SELECT_BLOCK": select_block,
        "STEP": select_block // stride,
        "TAP": tap,
        "TAPS": len(weights),
        "PLATEAU": max(weights),
        "BLOCK_J": max(NARROW_DOT, kept, min(most, triton.next_power_of_2(most_blocks))),
    }


def _rows(dtype: torch.dtype) -> int:
    """Query rows of a program: float32 that is multiplied exactly uses no matrix unit and most
    registers."""
    return ROWS if dtype.itemsize == 2 else ROWS // 2


def _most_blocks(dtype: torch.dtype) -> int:
    """Of a tile."""
    return ROWS if dtype.itemsize == 2 else NARROW_DOT


def _shape(q_NHD: Tensor, kv_heads: int, tile: int) -> dict:
    """What kernels that recompute p_cmp are told."""
    width, groups = q_NHD.shape[2], q_NHD.shape[1] // kv_heads
    group = triton.next_power_of_2(groups)
    tokens = max(1, _rows(q_NHD.dtype) // group)
    return {
        "SUBTILES": triton.cdiv(tile, tokens),
        "G": groups,
        "GROUP": group,
        "D": width,
        "SCALE2": width**-0.5 / math.log(2),
        "BLOCK_B": tokens,
        "BLOCK_D": padded(width),
        "num_warps": 4 if q_NHD.dtype.itemsize == 2 else 8,
        "num_stages": 2,
        **number_types(q_NHD.dtype),
    }


@operation("tiny_onn::nsa_choose")
def choose(
    q_NHD: Tensor,
    k_XKD: Tensor,
    lse_NH: Tensor,
    tile_first_S: Tensor,
    time_N: Tensor,
    end_N: Tensor,
    first_N: Tensor,
    stop_N: Tensor,
    tile: int,
    block: int,
    stride: int,
    select_block: int,
    most_select_blocks: int,
    count: int,
) -> Tensor:
    """Chosen blocks, int64 (N, K, count), as :func:`select.choose_blocks`.

    lse_NH: of the compressed branch; tile_first_S: first tokens of tiles of ``tile`` tokens, none
    over the end of a document; first_N, stop_N: compressed rows that each token sees.
    """
    q_NHD, k_XKD = unit_stride(q_NHD), unit_stride(k_XKD)
    (num_tokens, num_heads), kv_heads = q_NHD.shape[:2], k_XKD.shape[1]
    options = _shape(q_NHD, kv_heads, tile)
    index_NKn = q_NHD.new_empty(num_tokens, kv_heads, count, dtype=torch.int64)
    _choose[(len(tile_first_S) * options["SUBTILES"], kv_heads)](
        *(q_NHD, k_XKD, lse_NH, tile_first_S, time_N, end_N, first_N, stop_N, index_NKn),
        *(*q_NHD.stride()[:2], *k_XKD.stride()[:2], num_tokens, num_heads),
        **_ranking(
            block, stride, select_block, most_select_blocks, count, _most_blocks(q_NHD.dtype)
        ),
        **options,
    )
    return index_NKn


@choose.register_fake
def _(
    q_NHD, k_XKD, lse_NH, tile_first_S, time_N, end_N, first_N, stop_N, tile, block, stride,
    select_block, most_select_blocks, count,
):  # fmt: skip
    return q_NHD.new_empty(q_NHD.shape[0], k_XKD.shape[1], count, dtype=torch.int64)


@operation("tiny_onn::nsa_share")
def share(
    q_NHD: Tensor,
    k_XKD: Tensor,
    lse_NH: Tensor,
    tile_first_S: Tensor,
    time_N: Tensor,
    first_N: Tensor,
    stop_N: Tensor,
    tile: int,
    room: int,
) -> Tensor:
    """p_cmp summed over each group's heads, float32 or float64 (N, K, room): for inspection."""
    q_NHD, k_XKD = unit_stride(q_NHD), unit_stride(k_XKD)
    (num_tokens, num_heads), kv_heads = q_NHD.shape[:2], k_XKD.shape[1]
    options = _shape(q_NHD, kv_heads, tile)
    share_NKC = lse_NH.new_empty(num_tokens, kv_heads, room)
    _share[(len(tile_first_S) * options["SUBTILES"], kv_heads)](
        *(q_NHD, k_XKD, lse_NH, tile_first_S, time_N, first_N, stop_N, share_NKC),
        *(*q_NHD.stride()[:2], *k_XKD.stride()[:2], num_tokens, num_heads, room),
        BLOCK_C=_rows(q_NHD.dtype),
        **options,
    )
    return share_NKC


@share.register_fake
def _(q_NHD, k_XKD, lse_NH, tile_first_S, time_N, first_N, stop_N, tile, room):
    return lse_NH.new_empty(q_NHD.shape[0], k_XKD.shape[1], room)


@operation("tiny_onn::nsa_choose_in_step")
def choose_from_share(
    share_BKC: Tensor, time_B: Tensor, block: int, stride: int, select_block: int, count: int
) -> Tensor:
    """Blocks, int64 (B, K, count), that the tokens time_B choose from p_cmp, summed over groups."""
    share_BKC = unit_stride(share_BKC)
    batch, kv_heads, room = share_BKC.shape
    index_BKn = share_BKC.new_empty(batch, kv_heads, count, dtype=torch.int64)
    most_blocks = room * stride // select_block + 1
    _choose_in_step[(batch, kv_heads)](
        *(share_BKC, time_B, index_BKn, *share_BKC.stride()[:2], room),
        **_ranking(block, stride, select_block, most_blocks, count),
    )
    return index_BKn


@choose_from_share.register_fake
def _(share_BKC, time_B, block, stride, select_block, count):
    return share_BKC.new_empty(*share_BKC.shape[:2], count, dtype=torch.int64)
