"""The selected branch as one differentiable operation: which kernels run, in which order.

Keys first unless a group has so many heads that its parts are more to move than its keys; the
gradients of keys and values go keys first always. No launch waits for the device: sizes follow from
shapes and from the longest document, whatever was chosen.

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
from tiny_onn_kernels.kernel_operation import operation
from tiny_onn_kernels.nsa.kernel_keys_first import (
    add_pairs,
    add_parts,
    merge_pairs,
    pairs_backward,
    pairs_forward,
    row_products,
)
from tiny_onn_kernels.nsa.kernel_launch import (
    NARROW_DOT,
    keys_beside_few_rows,
    padded,
    tile_sizes,
    unit_stride,
)
from tiny_onn_kernels.nsa.kernel_queries_first import selected_backward_queries, selected_forward
from tiny_onn_kernels.nsa.kernel_selected_plan import (
    cut_into_slices,
    goes_keys_first,
    pairs_of_a_part,
    room_for_slots,
    slots_of_parts,
    tokens_of_a_slice,
)


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


def _by_query(options: dict, count: int, dtype: torch.dtype) -> dict:
    """Options of kernels that go queries first: one warp where its registers hold a group's sums
    and a tile of keys (make kernels-compile), so that many programs wait for keys at once."""
    rows, width = padded(options["G"]), options["BLOCK_D"] + options["BLOCK_E"]
    light = rows == NARROW_DOT and width * dtype.itemsize <= 512
    keys = keys_beside_few_rows(options["D"], options["E"], dtype)
    keys = keys // 2 if light and width * dtype.itemsize > 256 else keys
    keys = min(keys, padded(options["SELECT_BLOCK"]))
    return options | {
        "COUNT": count,
        "PIECES": triton.cdiv(options["SELECT_BLOCK"], keys),
        "BLOCK_R": rows,
        "BLOCK_C": keys,
        "num_warps": 1 if light else 4,
        "num_stages": 2,
    }


def _by_key(options: dict, dtype: torch.dtype, rows: int, whole: bool, adjoint: bool) -> dict:
    """Options of kernels that go keys first; whole: a program holds all keys of a block."""
    sizes = tile_sizes(options["D"], options["E"], dtype, adjoint)
    keys = padded(options["SELECT_BLOCK"])
    sizes["BLOCK_C"] = keys if whole else min(keys, sizes["BLOCK_C"])
    sizes["BLOCK_R"] = min(padded(rows), sizes["BLOCK_R"])
    if dtype.itemsize > 2:  # no matrix unit: as many scores as tile_sizes has for them
        sizes["BLOCK_R"] = min(sizes["BLOCK_R"], max(NARROW_DOT, 2048 // keys))
    return options | sizes


def _merge_rows(options: dict) -> dict:
    """Options of kernels that merge what a token's pairs gave."""
    return {"G": options["G"], "BLOCK_R": 32, "SUM": options["SUM"]}


@operation("tiny_onn::nsa_selected")
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
            **_by_query(options, count, q_NHD.dtype),
        )
        return out_NHE, lse_NH
    inverse = (pair_P, offset_Z1)
    blocks = (time_N, end_N, block_row_J, longest)
    _forward_by_key(
        q_NHD, k_NKD, v_NKE, index_NKn, inverse, blocks, (out_NHE, lse_NH), options, tile
    )
    return out_NHE, lse_NH


def _forward_by_key(q_NHD, k_NKD, v_NKE, index_NKn, inverse, blocks, outputs, options, tile):
    """Fills ``outputs``, out_NHE and lse_NH, keys first: pairs, then their merging, by slices."""
    num_tokens, kv_heads, count = index_NKn.shape
    (pair_P, offset_Z1), (time_N, end_N, block_row_J, longest) = inverse, blocks
    size = tokens_of_a_slice(q_NHD, v_NKE, count)
    part = pairs_of_a_part(size, count, options["SELECT_BLOCK"])
    parts, num_runs = triton.cdiv(min(longest, size), part), len(offset_Z1) - 1
    room = (min(size, num_tokens) * kv_heads * count, options["G"])
    part_out_PGE = q_NHD.new_empty(*room, v_NKE.shape[2])
    part_lse_PG = outputs[1].new_empty(room)
    strides = [s for t in (q_NHD, k_NKD, v_NKE) for s in t.stride()[:2]]
    for piece in cut_into_slices(pair_P, offset_Z1, num_tokens, size):
        pairs_forward[(num_runs * parts,)](
            *(q_NHD, k_NKD, v_NKE, pair_P, piece.bound_2Z, block_row_J, time_N, end_N),
            *(part_out_PGE, part_lse_PG),
            *strides,
            *(num_tokens, num_runs, len(block_row_J), kv_heads * count, parts, part),
            piece.first_pair,
            **_by_key(options, q_NHD.dtype, tile, whole=True, adjoint=False),
        )
        index_SKn, out_SHE, lse_SH = (t[piece.tokens] for t in (index_NKn, *outputs))
        rows = _merge_rows(options)
        merge_pairs[(triton.cdiv(lse_SH.numel(), rows["BLOCK_R"]),)](
            *(index_SKn, part_out_PGE, part_lse_PG, out_SHE, lse_SH, lse_SH.numel()),
            COUNT=count,
            E=options["E"],
            BLOCK_E=options["BLOCK_E"],
            **rows,
        )


@selected.register_fake
def _(
    q_NHD, k_NKD, v_NKE, index_NKn, pair_P, offset_Z1, time_N, end_N, block_row_J,
    select_block, longest, tile,
):  # fmt: skip
    shape = q_NHD.shape[:2]
    return q_NHD.new_empty(*shape, v_NKE.shape[2]), q_NHD.new_empty(
        shape, dtype=sum_dtype(q_NHD.dtype)
    )


@operation("tiny_onn::nsa_selected_backward")
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
    whole, delta_NH = goes_keys_first(q_NHD, k_NKD, v_NKE, select_block), torch.empty_like(lse_NH)
    if whole:
        rows = _merge_rows(options)
        row_products[(triton.cdiv(lse_NH.numel(), rows["BLOCK_R"]),)](
            *(grad_NHE, out_NHE, delta_NH, *grad_NHE.stride()[:2], lse_NH.numel(), num_heads),
            E=options["E"],
            BLOCK_E=options["BLOCK_E"],
            BLOCK_R=rows["BLOCK_R"],
            SUM=options["SUM"],
        )
    else:
        selected_backward_queries[(num_tokens, kv_heads)](
            *(q_NHD, k_NKD, v_NKE, index_NKn, time_N, end_N, out_NHE, lse_NH, grad_NHE),
            *(delta_NH, grads[0]),
            *strides,
            num_heads,
            SCALE=q_NHD.shape[2] ** -0.5,
            **_by_query(options, count, q_NHD.dtype),
        )
    options |= _by_key(options, q_NHD.dtype, tile, whole, adjoint=True)
    options |= {"SCALE": q_NHD.shape[2] ** -0.5, "WITH_QUERIES": whole}
    tensors = (q_NHD, k_NKD, v_NKE, index_NKn, lse_NH, grad_NHE, delta_NH)
    blocks = (time_N, end_N, block_row_J, longest)
    return _backward_by_key(*tensors, (pair_P, offset_Z1), blocks, grads, options)


def _backward_by_key(
    q_NHD, k_NKD, v_NKE, index_NKn, lse_NH, grad_NHE, delta_NH, inverse, blocks, grads, options
):
    """Gradients of keys and values, and of queries if WITH_QUERIES; ``grads``: where they belong.

    Of several slices each adds to float32 sums, one launch after the other.
    """
    num_tokens, kv_heads, count = index_NKn.shape
    (pair_P, offset_Z1), (time_N, end_N, block_row_J, longest) = inverse, blocks
    select_block, with_queries = options["SELECT_BLOCK"], options["WITH_QUERIES"]
    size = tokens_of_a_slice(q_NHD, v_NKE, count) if with_queries else num_tokens
    slices = cut_into_slices(pair_P, offset_Z1, num_tokens, size)
    part = pairs_of_a_part(size, count, select_block)
    parts, num_runs = triton.cdiv(min(longest, size), part), len(offset_Z1) - 1
    pieces = triton.cdiv(select_block, options["BLOCK_C"])
    sizes = (num_runs, len(block_row_J))
    num_pairs = min(size, num_tokens) * kv_heads * count
    part_q_PGD = q_NHD.new_empty(num_pairs, options["G"], q_NHD.shape[2]) if with_queries else None
    slots = room_for_slots(q_NHD, v_NKE, 2 * num_pairs // part if parts > 1 else 0, select_block)
    strides = [s for t in (q_NHD, k_NKD, v_NKE, grad_NHE) for s in t.stride()[:2]]
    sums = grads[1:]
    if len(slices) > 1:
        sums = tuple(torch.zeros_like(t, dtype=sum_dtype(t.dtype)) for t in sums)
    adds = {"ADD": len(slices) > 1}
    for piece in slices:
        slot_Z = slots_of_parts(piece.bound_2Z, part)
        pairs_backward[(num_runs * parts, pieces)](
            *(q_NHD, k_NKD, v_NKE, pair_P, piece.bound_2Z, slot_Z, block_row_J, time_N, end_N),
            *(lse_NH, grad_NHE, delta_NH, *sums, *slots, part_q_PGD),
            *strides,
            *(num_tokens, q_NHD.shape[1], *sizes, kv_heads * count, parts, part),
            piece.first_pair,
            **adds,
            **options,
        )
        if parts > 1:
            names = ("SELECT_BLOCK", "D", "E", "BLOCK_C", "BLOCK_D", "BLOCK_E", "SUM")
            add_parts[(num_runs, pieces)](
                *(piece.bound_2Z, slot_Z, block_row_J, time_N, *sums, *slots),
                *(num_tokens, *sizes, kv_heads, part),
                **{name: options[name] for name in names},
                **adds,
            )
        if with_queries:
            index_SKn, grad_q_SHD = (t[piece.tokens] for t in (index_NKn, grads[0]))
            rows, num_rows = _merge_rows(options), index_SKn.shape[0] * q_NHD.shape[1]
            add_pairs[(triton.cdiv(num_rows, rows["BLOCK_R"]),)](
                *(index_SKn, part_q_PGD, grad_q_SHD, num_rows),
                COUNT=count,
                D=options["D"],
                BLOCK_D=options["BLOCK_D"],
                **rows,
            )
    return grads[0], *(t.to(grad.dtype) for t, grad in zip(sums, grads[1:], strict=True))


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
