"""The selected branch as one differentiable operation: which kernels run, in which order.

Queries first for groups of many heads, keys first for small ones; the gradients of keys and values
go keys first always. No launch waits for the device: sizes follow from shapes and from the longest
document, whatever was chosen.

Shapes: N tokens, H query heads in K groups of G, D head width, E value width, n chosen blocks, P =
N * K * n pairs, J selectable blocks of all documents, Z = K * J blocks of all groups, L = l' tokens
of one.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import number_types, sum_dtype
from tiny_onn_kernels.nsa.kernel_keys_first import (
    add_pairs,
    add_parts,
    merge_pairs,
    pairs_backward,
    pairs_forward,
)
from tiny_onn_kernels.nsa.kernel_launch import NARROW_DOT, padded, tile_sizes, unit_stride
from tiny_onn_kernels.nsa.kernel_queries_first import selected_backward_queries, selected_forward

KEYS_FIRST_BELOW = 8
"""Heads of a group from which its rows fill enough of a product to go queries first."""

MOST_KEY_BYTES = 2**16
"""Of a block's keys and values, for a program to hold all of them."""

KEYS = 64
"""Keys of a tile, unless a program must hold the whole block."""


def goes_keys_first(q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, select_block: int) -> bool:
    """Whether outputs are computed block by block, and merged, rather than token by token."""
    row_bytes = (padded(q_NHD.shape[2]) + padded(v_NKE.shape[2])) * q_NHD.dtype.itemsize
    fits = padded(select_block) * row_bytes <= MOST_KEY_BYTES
    return fits and q_NHD.shape[1] // k_NKD.shape[1] < KEYS_FIRST_BELOW


def pairs_of_a_part(num_tokens: int, count: int, select_block: int) -> int:
    """Pairs that one program walks: as many as a block has on average, n l', so that the first
    block of a document keeps nobody waiting; more for long batches, so that slots of parts stay
    within some times the gradients themselves."""
    return max(64, count * select_block) * max(1, num_tokens // 16384)


def _shape(q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, select_block: int) -> dict:
    """What all kernels are told of widths, groups and numbers."""
    width, value_width = q_NHD.shape[2], v_NKE.shape[2]
    return {
        "SELECT_BLOCK": select_block,
        "G": q_NHD.shape[1] // k_NKD.shape[1],
        "D": width,
        "E": value_width,
        "SCALE2": width**-0.5 / math.log(2),
        "BLOCK_D": padded(width),
        "BLOCK_E": padded(value_width),
        **number_types(q_NHD.dtype),
    }


def _by_query(options: dict, count: int) -> dict:
    """Options of kernels that go queries first."""
    rows, keys = padded(options["G"]), min(KEYS, padded(options["SELECT_BLOCK"]))
    light = rows == NARROW_DOT and options["BLOCK_D"] + options["BLOCK_E"] <= 256
    return options | {
        "COUNT": count,
        "PIECES": triton.cdiv(options["SELECT_BLOCK"], keys),
        "BLOCK_R": rows,
        "BLOCK_C": keys,
        "num_warps": 1 if light else 4,
        "num_stages": 2,
    }


def _by_key(options: dict, dtype: torch.dtype, rows: int, whole: bool) -> dict:
    """Options of kernels that go keys first; whole: a program holds all keys of a block."""
    sizes = tile_sizes(options["D"], options["E"], dtype)
    keys = padded(options["SELECT_BLOCK"])
    sizes["BLOCK_C"] = keys if whole else min(keys, sizes["BLOCK_C"])
    sizes["BLOCK_R"] = min(padded(rows), sizes["BLOCK_R"])
    return options | sizes


def _merge_rows(options: dict) -> dict:
    """Options of kernels that merge what a token's pairs gave."""
    return {"G": options["G"], "BLOCK_R": 32, "SUM": options["SUM"]}


@torch.library.custom_op("tiny_onn::nsa_selected", mutates_args=())
def selected(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKE: Tensor,
    index_NKn: Tensor,
    pair_P: Tensor | None,
    offset_Z1: Tensor | None,
    time_N: Tensor,
    end_N: Tensor,
    block_row_J: Tensor,
    select_block: int,
    longest: int,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Attention to the visible tokens of the chosen blocks, (N, H, E), and log-sum-exps (N, H).

    pair_P, offset_Z1: the inverse index (:class:`selected.InverseIndex`), needed for gradients and
    where :func:`goes_keys_first`; block_row_J: first row of every selectable block; longest: most
    tokens of a document; tile: most query rows that meet a block at once.
    """
    q_NHD, k_NKD, v_NKE = (unit_stride(t) for t in (q_NHD, k_NKD, v_NKE))
    (num_tokens, num_heads), (kv_heads, count) = q_NHD.shape[:2], index_NKn.shape[1:]
    out_NHE = q_NHD.new_empty(num_tokens, num_heads, v_NKE.shape[2])
    lse_NH = q_NHD.new_empty(num_tokens, num_heads, dtype=sum_dtype(q_NHD.dtype))
    index_NKn = index_NKn.contiguous()
    options = _shape(q_NHD, k_NKD, v_NKE, select_block)
    strides = [s for t in (q_NHD, k_NKD, v_NKE) for s in t.stride()[:2]]
    if not goes_keys_first(q_NHD, k_NKD, v_NKE, select_block):
        selected_forward[(num_tokens, kv_heads)](
            *(q_NHD, k_NKD, v_NKE, index_NKn, time_N, end_N, out_NHE, lse_NH),
            *strides,
            num_heads,
            **_by_query(options, count),
        )
        return out_NHE, lse_NH
    groups, part = options["G"], pairs_of_a_part(num_tokens, count, select_block)
    part_out_PGE = q_NHD.new_empty(len(pair_P), groups, v_NKE.shape[2])
    part_lse_PG = lse_NH.new_empty(len(pair_P), groups)
    parts = triton.cdiv(longest, part)
    pairs_forward[((len(offset_Z1) - 1) * parts,)](
        *(q_NHD, k_NKD, v_NKE, pair_P, offset_Z1, block_row_J, time_N, end_N),
        *(part_out_PGE, part_lse_PG),
        *strides,
        *(num_tokens, len(block_row_J), kv_heads * count, part),
        PARTS=parts,
        **_by_key(options, q_NHD.dtype, tile, whole=True),
    )
    rows = _merge_rows(options)
    merge_pairs[(triton.cdiv(lse_NH.numel(), rows["BLOCK_R"]),)](
        *(index_NKn, part_out_PGE, part_lse_PG, out_NHE, lse_NH, lse_NH.numel()),
        COUNT=count,
        E=options["E"],
        BLOCK_E=options["BLOCK_E"],
        **rows,
    )
    return out_NHE, lse_NH


@selected.register_fake
def _(
    q_NHD, k_NKD, v_NKE, index_NKn, pair_P, offset_Z1, time_N, end_N, block_row_J,
    select_block, longest, tile,
):  # fmt: skip
    shape = q_NHD.shape[:2]
    return q_NHD.new_empty(*shape, v_NKE.shape[2]), q_NHD.new_empty(
        shape, dtype=sum_dtype(q_NHD.dtype)
    )


@torch.library.custom_op("tiny_onn::nsa_selected_backward", mutates_args=())
def selected_backward(
    grad_NHE: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKE: Tensor,
    index_NKn: Tensor,
    pair_P: Tensor,
    offset_Z1: Tensor,
    time_N: Tensor,
    end_N: Tensor,
    block_row_J: Tensor,
    out_NHE: Tensor,
    lse_NH: Tensor,
    select_block: int,
    longest: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values. The same bits every time: no sum depends on order."""
    grad_NHE, q_NHD, k_NKD, v_NKE = (unit_stride(t) for t in (grad_NHE, q_NHD, k_NKD, v_NKE))
    (num_tokens, num_heads), (kv_heads, count) = q_NHD.shape[:2], index_NKn.shape[1:]
    index_NKn = index_NKn.contiguous()
    grads = tuple(t.new_empty(t.shape) for t in (q_NHD, k_NKD, v_NKE))
    options = _shape(q_NHD, k_NKD, v_NKE, select_block)
    strides = [s for t in (q_NHD, k_NKD, v_NKE, grad_NHE) for s in t.stride()[:2]]
    whole = goes_keys_first(q_NHD, k_NKD, v_NKE, select_block)
    if whole:
        delta_NH = (grad_NHE.to(lse_NH.dtype) * out_NHE.to(lse_NH.dtype)).sum(dim=-1)
        part_q_PGD = q_NHD.new_empty(len(pair_P), options["G"], q_NHD.shape[2])
    else:
        delta_NH, part_q_PGD = torch.empty_like(lse_NH), None
        selected_backward_queries[(num_tokens, kv_heads)](
            *(q_NHD, k_NKD, v_NKE, index_NKn, time_N, end_N, out_NHE, lse_NH, grad_NHE),
            *(delta_NH, grads[0]),
            *strides,
            num_heads,
            SCALE=q_NHD.shape[2] ** -0.5,
            **_by_query(options, count),
        )
    part = pairs_of_a_part(num_tokens, count, select_block)
    parts, num_blocks = triton.cdiv(longest, part), len(block_row_J)
    num_slots = 2 * len(pair_P) // part if parts > 1 else 0
    slot_Z, slots = _slots(q_NHD, v_NKE, offset_Z1, part, num_slots, select_block)
    by_key = _by_key(options, q_NHD.dtype, tile, whole)
    pieces = triton.cdiv(select_block, by_key["BLOCK_C"])
    pairs_backward[(len(slot_Z) * parts, pieces)](
        *(q_NHD, k_NKD, v_NKE, pair_P, offset_Z1, slot_Z, block_row_J, time_N, end_N),
        *(lse_NH, grad_NHE, delta_NH, *grads[1:], *slots, part_q_PGD),
        *strides,
        *(num_tokens, num_heads, num_blocks, kv_heads * count, part),
        PARTS=parts,
        WITH_QUERIES=whole,
        SCALE=q_NHD.shape[2] ** -0.5,
        **by_key,
    )
    if parts > 1:
        names = ("SELECT_BLOCK", "D", "E", "BLOCK_C", "BLOCK_D", "BLOCK_E", "SUM")
        add_parts[(len(slot_Z), pieces)](
            *(offset_Z1, slot_Z, block_row_J, time_N, *grads[1:], *slots),
            *(num_tokens, num_blocks, kv_heads, part),
            **{name: by_key[name] for name in names},
        )
    if whole:
        rows = _merge_rows(options)
        add_pairs[(triton.cdiv(lse_NH.numel(), rows["BLOCK_R"]),)](
            *(index_NKn, part_q_PGD, grads[0], lse_NH.numel()),
            COUNT=count,
            D=options["D"],
            BLOCK_D=options["BLOCK_D"],
            **rows,
        )
    return grads


def _slots(
    q_NHD: Tensor, v_NKE: Tensor, offset_Z1: Tensor, part: int, num_slots: int, select_block: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """First slot of each block of several parts, and room for the gradients of all slots.

    A block of c > part pairs has fewer than 2 c / part parts: so all have at most 2 P / part.
    """
    parts_Z = (offset_Z1.diff() + part - 1) // part
    slots_Z = torch.where(parts_Z > 1, parts_Z, 0)
    room = (num_slots, select_block)
    kind = sum_dtype(q_NHD.dtype)
    widths = (q_NHD.shape[2], v_NKE.shape[2])
    return slots_Z.cumsum(0) - slots_Z, tuple(
        q_NHD.new_empty(*room, width, dtype=kind) for width in widths
    )


@selected_backward.register_fake
def _(grad_NHE, q_NHD, k_NKD, v_NKE, *_):
    return tuple(t.new_empty(t.shape) for t in (q_NHD, k_NKD, v_NKE))


def _remember(ctx, inputs, output):
    *tensors, select_block, longest, tile = inputs
    ctx.sizes = (select_block, longest, tile)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_NHE, _):
    grads = selected_backward(grad_NHE, *ctx.saved_tensors, *ctx.sizes)
    return *grads, *(None,) * 9


selected.register_autograd(_backward, setup_context=_remember)
