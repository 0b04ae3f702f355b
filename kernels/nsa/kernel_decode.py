"""One decoding step: every branch is attention of a row's query to a list of places in its cache.

The list is split over programs, so that a single sequence fills a GPU too; each gives an output and
a log-sum-exp over its part, and a second, small launch merges them. How long a row's list is stands
on the device only: shapes, grids and launches stay the same from step to step, and nothing waits,
so a step can be recorded in a CUDA graph.

Shapes: B rows, H query heads in K groups of G, T tokens (or compressed blocks) of room, D head
width, E value width, n chosen blocks, X places in the list, S splits; R rows of the group padded to
a product, C places of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import number_types, sum_dtype
from tiny_onn_kernels.kernel_operation import operation
from tiny_onn_kernels.nsa.kernel_launch import keys_beside_few_rows, padded, same_dtype, unit_stride
from tiny_onn_kernels.nsa.kernel_softmax import load_rows, store_rows, take_in

ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of a large GPU."""

MOST_SPLITS = 128
"""Parts of a row that one program merges."""


@triton.jit(do_not_specialize=["num_places", "tiles_of_split", "num_batch"])
def _attend(
    Q, K, V, INDEX, FIRST, STOP, OUT, LSE,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    num_places, tiles_of_split, num_batch,
    SELECT_BLOCK: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (S, B, H, E) and log-sum-exp (S, B, H; -inf where a part sees nothing) of each part.

    Place x is token FIRST[b] + x, or, with chosen blocks (COUNT > 0), token x % l' of the chosen
    block x // l'; it is seen if it lies before STOP[b].
    """
    split = tl.program_id(0)
    batch, group = (tl.program_id(1) // GROUPS).to(tl.int64), (tl.program_id(1) % GROUPS)
    place_R = tl.arange(0, BLOCK_R)
    real_R = place_R < G
    head_R = (group * G + place_R).to(tl.int64)
    stop = tl.load(STOP + batch)
    first = tl.load(FIRST + batch)
    q_RD = load_rows(Q, batch * stride_qb + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
    k_base = K + batch * stride_kb + group.to(tl.int64) * stride_kh
    v_base = V + batch * stride_vb + group.to(tl.int64) * stride_vh
    peak_R = tl.full([BLOCK_R], float("-inf"), SUM)
    total_R = tl.zeros([BLOCK_R], SUM)
    sum_RE = tl.zeros([BLOCK_R, BLOCK_E], SUM)
    begin = split * tiles_of_split * BLOCK_C
    if COUNT == 0:  # the places past the row's last are none
        last = tl.minimum(begin + tiles_of_split * BLOCK_C, (stop - first).to(tl.int32))
        last = tl.minimum(last, num_places)
    else:
        last = tl.minimum(begin + tiles_of_split * BLOCK_C, num_places)
    for start in range(begin, last, BLOCK_C):
        listed_C = start + tl.arange(0, BLOCK_C)
        inside_C = listed_C < num_places
        if COUNT == 0:
            time_C = first + listed_C
        else:
            chosen = INDEX + (batch * GROUPS + group) * COUNT
            block_C = tl.load(chosen + listed_C // SELECT_BLOCK, mask=inside_C, other=-1)
            inside_C = inside_C & (block_C >= 0)
            time_C = block_C * SELECT_BLOCK + listed_C % SELECT_BLOCK
        seen_C = inside_C & (time_C < stop)
        k_CD = load_rows(k_base, time_C * stride_kt, seen_C, D, BLOCK_D, DOT)
        v_CE = load_rows(v_base, time_C * stride_vt, seen_C, E, BLOCK_E, DOT)
        peak_R, total_R, sum_RE = take_in(
            q_RD, k_CD, v_CE, seen_C[None, :], peak_R, total_R, sum_RE, SCALE2, PRECISION
        )
    safe_R = tl.where(total_R == 0.0, 1.0, total_R)
    query_R = (split * num_batch + batch) * (GROUPS * G) + head_R
    store_rows(OUT, query_R * E, real_R, sum_RE / safe_R[:, None], E, BLOCK_E)
    tl.store(LSE + query_R, peak_R + tl.log2(safe_R), mask=real_R)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge(
    PART_OUT, PART_LSE, OUT, LSE, num_rows, num_splits,
    E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Parts weighted by their log-sum-exps; a program for each query (row and head)."""
    query = tl.program_id(0).to(tl.int64)
    split_S = tl.arange(0, BLOCK_S)
    real_S = split_S < num_splits
    place_S = split_S.to(tl.int64) * num_rows + query
    lse_S = tl.load(PART_LSE + place_S, mask=real_S, other=float("-inf"))
    peak = tl.max(lse_S, 0)
    weight_S = tl.exp2(lse_S - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight_S, 0)
    safe = tl.where(total == 0.0, 1.0, total)
    part_SE = load_rows(PART_OUT, place_S * E, real_S, E, BLOCK_E, SUM)
    column_E = tl.arange(0, BLOCK_E)
    out_E = tl.sum(part_SE * weight_S[:, None], 0) / safe
    tl.store(OUT + query * E + column_E, out_E.to(OUT.dtype.element_ty), mask=column_E < E)
    tl.store(LSE + query, peak + tl.log2(safe))


@triton.jit(do_not_specialize=["room"])
def _share(
    Q, K, STOP, LSE, SHARE,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, room,
    GROUPS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of the keys before STOP[b], summed over each group: (B, K, room), 0 beyond."""
    batch, group = (tl.program_id(1) // GROUPS).to(tl.int64), tl.program_id(1) % GROUPS
    place_R = tl.arange(0, BLOCK_R)
    real_R = place_R < G
    head_R = (group * G + place_R).to(tl.int64)
    q_RD = load_rows(Q, batch * stride_qb + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
    lse_R = tl.load(LSE + batch * (GROUPS * G) + head_R, mask=real_R, other=float("inf"))
    time_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    seen_C = (time_C < tl.load(STOP + batch)) & (time_C < room)
    k_base = K + batch * stride_kb + group.to(tl.int64) * stride_kh
    k_CD = load_rows(k_base, time_C.to(tl.int64) * stride_kt, seen_C, D, BLOCK_D, DOT)
    score_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION) * SCALE2
    weight_RC = tl.exp2(score_RC - lse_R[:, None])
    share_C = tl.sum(tl.where(real_R[:, None] & seen_C[None, :], weight_RC, 0.0), 0)
    row = (batch * GROUPS + group) * room
    tl.store(SHARE + row + time_C, share_C, mask=time_C < room)


def _shape(q_BHD: Tensor, kv_heads: int, value_width: int) -> dict:
    """What the attending kernels are told."""
    groups, width = q_BHD.shape[1] // kv_heads, q_BHD.shape[2]
    return {
        "GROUPS": kv_heads,
        "G": groups,
        "D": width,
        "SCALE2": width**-0.5 / math.log(2),
        "BLOCK_R": padded(groups),
        "BLOCK_C": keys_beside_few_rows(width, value_width, q_BHD.dtype),
        "BLOCK_D": padded(width),
        "num_warps": 4,
        "num_stages": 2,
        **number_types(q_BHD.dtype),
    }


@operation("tiny_onn::nsa_decode")
def attend(
    q_BHD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    index_BKn: Tensor | None,
    first_B: Tensor,
    stop_B: Tensor,
    num_places: int,
    select_block: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, E) and log-sum-exp (B, H; -inf for a row that sees nothing).

    A row sees tokens first_B to stop_B - 1, at most ``num_places``; or, with ``index_BKn``, those
    before stop_B of its chosen blocks (first_B is not looked at).
    """
    q_BHD, k_BKTD, v_BKTE = (unit_stride(t) for t in (q_BHD, k_BKTD, v_BKTE))
    (batch, num_heads), kv_heads, value_width = q_BHD.shape[:2], k_BKTD.shape[1], v_BKTE.shape[3]
    options = _shape(q_BHD, kv_heads, value_width)
    tiles = triton.cdiv(num_places, options["BLOCK_C"])
    wanted = min(tiles, MOST_SPLITS, max(1, ENOUGH_PROGRAMS // (batch * kv_heads)))
    tiles_of_split = triton.cdiv(tiles, wanted)
    splits = triton.cdiv(tiles, tiles_of_split)
    kind = sum_dtype(q_BHD.dtype)
    part_SBHE = q_BHD.new_empty(
        splits, batch, num_heads, value_width, dtype=q_BHD.dtype if splits == 1 else kind
    )
    lse_SBH = q_BHD.new_empty(splits, batch, num_heads, dtype=kind)
    _attend[(splits, batch * kv_heads)](
        *(q_BHD, k_BKTD, v_BKTE, index_BKn, first_B, stop_B, part_SBHE, lse_SBH),
        *(*q_BHD.stride()[:2], *k_BKTD.stride()[:3], *v_BKTE.stride()[:3]),
        *(num_places, tiles_of_split, batch),
        SELECT_BLOCK=select_block,
        COUNT=0 if index_BKn is None else index_BKn.shape[2],
        E=value_width,
        BLOCK_E=padded(value_width),
        **options,
    )
    if splits == 1:
        return part_SBHE.squeeze(0), lse_SBH.squeeze(0)
    out_BHE = q_BHD.new_empty(batch, num_heads, value_width)
    lse_BH = lse_SBH.new_empty(batch, num_heads)
    _merge[(batch * num_heads,)](
        *(part_SBHE, lse_SBH, out_BHE, lse_BH, batch * num_heads, splits),
        E=value_width,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_E=padded(value_width),
        SUM=options["SUM"],
    )
    return out_BHE, lse_BH


@attend.register_fake
def _(q_BHD, k_BKTD, v_BKTE, index_BKn, first_B, stop_B, num_places, select_block):
    shape = q_BHD.shape[:2]
    return q_BHD.new_empty(*shape, v_BKTE.shape[3]), q_BHD.new_empty(
        shape, dtype=sum_dtype(q_BHD.dtype)
    )


@operation("tiny_onn::nsa_decode_share")
def share(q_BHD: Tensor, k_BKCD: Tensor, stop_B: Tensor, lse_BH: Tensor) -> Tensor:
    """Weights of the first stop_B keys of each row, summed over its groups: (B, K, C)."""
    q_BHD, k_BKCD = unit_stride(q_BHD), unit_stride(k_BKCD)
    batch, (kv_heads, room) = len(q_BHD), k_BKCD.shape[1:3]
    options = _shape(q_BHD, kv_heads, q_BHD.shape[2])
    options.pop("SUM")
    share_BKC = lse_BH.new_empty(batch, kv_heads, room)
    _share[(triton.cdiv(room, options["BLOCK_C"]), batch * kv_heads)](
        *(q_BHD, k_BKCD, stop_B, lse_BH, share_BKC),
        *(*q_BHD.stride()[:2], *k_BKCD.stride()[:3], room),
        **options,
    )
    return share_BKC


@share.register_fake
def _(q_BHD, k_BKCD, stop_B, lse_BH):
    return lse_BH.new_empty(*q_BHD.shape[:1], *k_BKCD.shape[1:3])


def decode_compressed(
    q_BHD: Tensor, k_BKCD: Tensor, v_BKCE: Tensor, count_B: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`decode.decode_compressed`."""
    same_dtype(q_BHD, k_BKCD, v_BKCE)
    none_B = torch.zeros_like(count_B)
    out_BHE, lse_BH = attend(q_BHD, k_BKCD, v_BKCE, None, none_B, count_B, k_BKCD.shape[2], 1)
    return out_BHE, share(q_BHD, k_BKCD, count_B, lse_BH)


def decode_selected(
    q_BHD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    index_BKn: Tensor,
    time_B: Tensor,
    select_block: int,
) -> Tensor:
    """As :func:`decode.decode_selected`."""
    same_dtype(q_BHD, k_BKTD, v_BKTE)
    places = index_BKn.shape[2] * select_block
    index_BKn = index_BKn.contiguous()
    stop_B = time_B + 1
    return attend(q_BHD, k_BKTD, v_BKTE, index_BKn, time_B, stop_B, places, select_block)[0]


def decode_window(
    q_BHD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, time_B: Tensor, window: int
) -> Tensor:
    """As :func:`decode.decode_window`."""
    same_dtype(q_BHD, k_BKTD, v_BKTE)
    first_B = (time_B - window + 1).clamp(min=0)
    return attend(q_BHD, k_BKTD, v_BKTE, None, first_B, time_B + 1, window, 1)[0]
