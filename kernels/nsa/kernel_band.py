"""Attention of packed queries, each to one run of rows of the keys: window and compressed branch.

Both branches see runs: a window is a run of tokens, the compressed blocks that lie before a token
are a run of blocks. Neither end of the run ever falls from a token to the next, over documents too,
so the keys of a tile of queries are a run, and so are the queries that see a tile of keys. Nothing
else about documents, prefixes or blocks reaches these kernels.

A tile holds query rows: token times head of the group, so that a key is loaded once for all heads
of its group and no group size wastes any of the tile.

Shapes: N tokens, X rows of keys, H query heads in K groups of G, D head width, E value width, R
query rows of a tile, C keys of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import number_types, sum_dtype
from tiny_onn_kernels.kernel_operation import operation
from tiny_onn_kernels.nsa.kernel_launch import padded, tile_sizes, unit_stride
from tiny_onn_kernels.nsa.kernel_softmax import (
    add_product,
    load_rows,
    settle,
    store_rows,
    take_in,
    weights_and_adjoint,
)

ENOUGH_PROGRAMS = 512
"""Programs that fill a large GPU: keys of fewer tiles are split over their queries too."""


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    Q, K, V, FIRST, STOP, OUT, LSE,
    stride_qn, stride_qh, stride_kx, stride_kh, stride_vx, stride_vh,
    num_rows, num_heads,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest runs first
    group = tl.program_id(1).to(tl.int64)
    row_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < num_rows
    token_R = (row_R // G).to(tl.int64)
    head_R = group * G + row_R % G
    first_R = tl.load(FIRST + token_R, mask=real_R, other=0x7FFFFFFF)
    stop_R = tl.load(STOP + token_R, mask=real_R, other=0)
    first, stop = tl.min(first_R, 0), tl.max(stop_R, 0)
    q_RD = load_rows(Q, token_R * stride_qn + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
    peak_R = tl.full([BLOCK_R], float("-inf"), SUM)
    total_R = tl.zeros([BLOCK_R], SUM)
    sum_RE = tl.zeros([BLOCK_R, BLOCK_E], SUM)
    for start in range(first, stop, BLOCK_C):
        key_C = start + tl.arange(0, BLOCK_C)
        inside_C = key_C < stop
        place_C = key_C.to(tl.int64)
        k_CD = load_rows(K, place_C * stride_kx + group * stride_kh, inside_C, D, BLOCK_D, DOT)
        v_CE = load_rows(V, place_C * stride_vx + group * stride_vh, inside_C, E, BLOCK_E, DOT)
        seen_RC = (key_C[None, :] >= first_R[:, None]) & (key_C[None, :] < stop_R[:, None])
        peak_R, total_R, sum_RE = take_in(
            q_RD, k_CD, v_CE, seen_RC, peak_R, total_R, sum_RE, SCALE2, PRECISION
        )
    out_RE, lse_R = settle(peak_R, total_R, sum_RE)
    query_R = token_R * num_heads + head_R
    store_rows(OUT, query_R * E, real_R, out_RE, E, BLOCK_E)
    tl.store(LSE + query_R, lse_R, mask=real_R)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_queries(
    Q, K, V, FIRST, STOP, OUT, LSE, GRAD, DELTA, GRAD_Q,
    stride_qn, stride_qh, stride_kx, stride_kh, stride_vx, stride_vh, stride_gn, stride_gh,
    num_rows, num_heads,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and DELTA = sum(output * gradient) for the keys' kernel."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    row_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < num_rows
    token_R = (row_R // G).to(tl.int64)
    head_R = group * G + row_R % G
    query_R = token_R * num_heads + head_R
    first_R = tl.load(FIRST + token_R, mask=real_R, other=0x7FFFFFFF)
    stop_R = tl.load(STOP + token_R, mask=real_R, other=0)
    first, stop = tl.min(first_R, 0), tl.max(stop_R, 0)
    q_RD = load_rows(Q, token_R * stride_qn + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
    grad_RE = load_rows(GRAD, token_R * stride_gn + head_R * stride_gh, real_R, E, BLOCK_E, DOT)
    out_RE = load_rows(OUT, query_R * E, real_R, E, BLOCK_E, SUM)
    delta_R = tl.sum(out_RE * grad_RE.to(SUM), 1)
    tl.store(DELTA + query_R, delta_R, mask=real_R)
    lse_R = tl.load(LSE + query_R, mask=real_R, other=float("inf"))
    grad_q_RD = tl.zeros([BLOCK_R, BLOCK_D], SUM)
    for start in range(first, stop, BLOCK_C):
        key_C = start + tl.arange(0, BLOCK_C)
        inside_C = key_C < stop
        place_C = key_C.to(tl.int64)
        k_CD = load_rows(K, place_C * stride_kx + group * stride_kh, inside_C, D, BLOCK_D, DOT)
        v_CE = load_rows(V, place_C * stride_vx + group * stride_vh, inside_C, E, BLOCK_E, DOT)
        seen_RC = (key_C[None, :] >= first_R[:, None]) & (key_C[None, :] < stop_R[:, None])
        _, grad_s_RC = weights_and_adjoint(
            q_RD, k_CD, grad_RE, v_CE, seen_RC, lse_R[:, None], delta_R[:, None], SCALE2, PRECISION
        )
        grad_q_RD = add_product(grad_s_RC.to(DOT), k_CD, grad_q_RD, PRECISION)
    store_rows(GRAD_Q, query_R * D, real_R, grad_q_RD * SCALE, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_keys", "splits"])
def _backward_keys(
    Q, K, V, FIRST, STOP, LSE, GRAD, DELTA, FROM, UNTIL, GRAD_K, GRAD_V,
    stride_qn, stride_qh, stride_kx, stride_kh, stride_vx, stride_vh, stride_gn, stride_gh,
    num_keys, splits, num_heads,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values from one of ``splits`` parts of the tokens that see
    it, FROM to UNTIL: (splits, X, K, D) and (splits, X, K, E)."""
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    group = tl.program_id(1).to(tl.int64)
    num_groups = tl.num_programs(1)
    key_C = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = key_C < num_keys
    place_C = key_C.to(tl.int64)
    k_CD = load_rows(K, place_C * stride_kx + group * stride_kh, inside_C, D, BLOCK_D, DOT)
    v_CE = load_rows(V, place_C * stride_vx + group * stride_vh, inside_C, E, BLOCK_E, DOT)
    first_row = tl.load(FROM + tile).to(tl.int32) * G
    stop_row = tl.load(UNTIL + tile).to(tl.int32) * G
    rows = tl.cdiv(tl.cdiv(tl.maximum(stop_row - first_row, 0), BLOCK_R), splits) * BLOCK_R
    first_row += split * rows
    stop_row = tl.minimum(first_row + rows, stop_row)
    grad_k_CD = tl.zeros([BLOCK_C, BLOCK_D], SUM)
    grad_v_CE = tl.zeros([BLOCK_C, BLOCK_E], SUM)
    for start in range(first_row, stop_row, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        real_R = row_R < stop_row
        token_R = (row_R // G).to(tl.int64)
        head_R = group * G + row_R % G
        query_R = token_R * num_heads + head_R
        q_RD = load_rows(Q, token_R * stride_qn + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
        grad_RE = load_rows(GRAD, token_R * stride_gn + head_R * stride_gh, real_R, E, BLOCK_E, DOT)
        first_R = tl.load(FIRST + token_R, mask=real_R, other=0x7FFFFFFF)
        stop_R = tl.load(STOP + token_R, mask=real_R, other=0)
        lse_R = tl.load(LSE + query_R, mask=real_R, other=float("inf"))
        delta_R = tl.load(DELTA + query_R, mask=real_R, other=0.0)
        seen_CR = (key_C[:, None] >= first_R[None, :]) & (key_C[:, None] < stop_R[None, :])
        weight_CR, grad_s_CR = weights_and_adjoint(
            k_CD, q_RD, v_CE, grad_RE, seen_CR, lse_R[None, :], delta_R[None, :], SCALE2, PRECISION
        )
        grad_v_CE = add_product(weight_CR.to(DOT), grad_RE, grad_v_CE, PRECISION)
        grad_k_CD = add_product(grad_s_CR.to(DOT), q_RD, grad_k_CD, PRECISION)
    out_C = (split.to(tl.int64) * num_keys + place_C) * num_groups + group
    store_rows(GRAD_K, out_C * D, inside_C, grad_k_CD * SCALE, D, BLOCK_D)
    store_rows(GRAD_V, out_C * E, inside_C, grad_v_CE, E, BLOCK_E)


def _shape(q_NHD: Tensor, k_XKD: Tensor, v_XKE: Tensor, adjoint: bool) -> dict:
    """What all three kernels are told of widths, groups, tiles and numbers."""
    width, value_width = q_NHD.shape[2], v_XKE.shape[2]
    return {
        "G": q_NHD.shape[1] // k_XKD.shape[1],
        "D": width,
        "E": value_width,
        "SCALE2": width**-0.5 / math.log(2),
        "BLOCK_D": padded(width),
        "BLOCK_E": padded(value_width),
        **tile_sizes(width, value_width, q_NHD.dtype, adjoint),
        **number_types(q_NHD.dtype),
    }


@operation("tiny_onn::nsa_band")
def band(
    q_NHD: Tensor, k_XKD: Tensor, v_XKE: Tensor, first_N: Tensor, stop_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of token t to the rows first_N[t] to stop_N[t] - 1 of the keys (int32, neither
    falling); (N, H, E), 0 for an empty run, and the log-sum-exp (N, H)."""
    q_NHD, k_XKD, v_XKE = (unit_stride(t) for t in (q_NHD, k_XKD, v_XKE))
    (num_tokens, num_heads), kv_heads = q_NHD.shape[:2], k_XKD.shape[1]
    out_NHE = q_NHD.new_empty(num_tokens, num_heads, v_XKE.shape[2])
    lse_NH = q_NHD.new_empty(num_tokens, num_heads, dtype=sum_dtype(q_NHD.dtype))
    options = _shape(q_NHD, k_XKD, v_XKE, adjoint=False)
    num_rows = num_tokens * options["G"]
    _forward[(triton.cdiv(num_rows, options["BLOCK_R"]), kv_heads)](
        *(q_NHD, k_XKD, v_XKE, first_N, stop_N, out_NHE, lse_NH),
        *(*q_NHD.stride()[:2], *k_XKD.stride()[:2], *v_XKE.stride()[:2]),
        *(num_rows, num_heads),
        **options,
    )
    return out_NHE, lse_NH


@band.register_fake
def _(q_NHD, k_XKD, v_XKE, first_N, stop_N):
    shape = q_NHD.shape[:2]
    return q_NHD.new_empty(*shape, v_XKE.shape[2]), q_NHD.new_empty(
        shape, dtype=sum_dtype(q_NHD.dtype)
    )


@operation("tiny_onn::nsa_band_backward")
def band_backward(
    grad_NHE: Tensor,
    q_NHD: Tensor,
    k_XKD: Tensor,
    v_XKE: Tensor,
    first_N: Tensor,
    stop_N: Tensor,
    out_NHE: Tensor,
    lse_NH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values. The same bits every time: no sum depends on order."""
    grad_NHE, q_NHD, k_XKD, v_XKE = (unit_stride(t) for t in (grad_NHE, q_NHD, k_XKD, v_XKE))
    (num_tokens, num_heads), (num_keys, kv_heads) = q_NHD.shape[:2], k_XKD.shape[:2]
    options = _shape(q_NHD, k_XKD, v_XKE, adjoint=True)
    options["SCALE"] = q_NHD.shape[2] ** -0.5
    strides = [s for t in (q_NHD, k_XKD, v_XKE, grad_NHE) for s in t.stride()[:2]]
    delta_NH = torch.empty_like(lse_NH)
    grad_q_NHD = q_NHD.new_empty(q_NHD.shape)
    num_rows = num_tokens * options["G"]
    _backward_queries[(triton.cdiv(num_rows, options["BLOCK_R"]), kv_heads)](
        *(q_NHD, k_XKD, v_XKE, first_N, stop_N, out_NHE, lse_NH, grad_NHE, delta_NH, grad_q_NHD),
        *strides,
        *(num_rows, num_heads),
        **options,
    )
    num_tiles = triton.cdiv(num_keys, options["BLOCK_C"])
    enough = ENOUGH_PROGRAMS // (num_tiles * kv_heads)
    splits = max(1, min(16, enough, triton.cdiv(num_rows, 4 * options["BLOCK_R"])))
    edge_S = torch.arange(num_tiles, device=q_NHD.device, dtype=torch.int32) * options["BLOCK_C"]
    from_S = torch.searchsorted(stop_N, edge_S, right=True, out_int32=True)
    until_S = torch.searchsorted(first_N, edge_S + options["BLOCK_C"], out_int32=True)
    kind = sum_dtype(q_NHD.dtype) if splits > 1 else q_NHD.dtype
    grad_k_SXKD = k_XKD.new_empty(splits, *k_XKD.shape, dtype=kind)
    grad_v_SXKE = v_XKE.new_empty(splits, *v_XKE.shape, dtype=kind)
    _backward_keys[(num_tiles * splits, kv_heads)](
        *(q_NHD, k_XKD, v_XKE, first_N, stop_N, lse_NH, grad_NHE, delta_NH, from_S, until_S),
        *(grad_k_SXKD, grad_v_SXKE),
        *strides,
        *(num_keys, splits, num_heads),
        **options,
    )
    grads = (grad_k_SXKD, grad_v_SXKE)
    if splits > 1:
        return grad_q_NHD, *(g.sum(dim=0).to(q_NHD.dtype) for g in grads)
    return grad_q_NHD, *(g.squeeze(0) for g in grads)


@band_backward.register_fake
def _(grad_NHE, q_NHD, k_XKD, v_XKE, first_N, stop_N, out_NHE, lse_NH):
    return tuple(t.new_empty(t.shape) for t in (q_NHD, k_XKD, v_XKE))


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_NHE, _):
    return *band_backward(grad_NHE, *ctx.saved_tensors), None, None


band.register_autograd(_backward, setup_context=_remember)
