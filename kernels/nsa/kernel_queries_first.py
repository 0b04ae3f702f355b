"""The selected branch, queries first: a program holds one token's heads of one group and walks the
n blocks that they chose, each a run of keys. For groups of some size; small ones leave most of a
product's rows empty and go keys first (:mod:`tiny_onn_kernels.nsa.kernel_keys_first`).

Shapes: N tokens, H query heads in K groups of G, D head width, E value width, n chosen blocks, P =
N * K * n pairs (token and group, chosen block); R rows of the group padded to a product, C keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tiny_onn_kernels.nsa.kernel_softmax import (
    add_product,
    load_rows,
    settle,
    store_rows,
    take_in,
    weights_and_adjoint,
)


@triton.jit
def _chosen_keys(
    INDEX, pair, step, start, end,
    SELECT_BLOCK: tl.constexpr, PIECES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of a piece of a chosen block, and which of them the token sees (of -1, no block: none,
    they lie before its document)."""
    block = tl.load(INDEX + pair + step // PIECES)
    offset_C = (step % PIECES) * BLOCK_C + tl.arange(0, BLOCK_C)
    time_C = block * SELECT_BLOCK + offset_C
    return start + time_C, (offset_C < SELECT_BLOCK) & (time_C >= 0) & (time_C <= end)


@triton.jit
def selected_forward(
    Q, K, V, INDEX, TIME, END, OUT, LSE,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, num_heads,
    COUNT: tl.constexpr, SELECT_BLOCK: tl.constexpr, PIECES: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, end = token - tl.load(TIME + token), tl.load(END + token)
    pair = (token * tl.num_programs(1) + group) * COUNT
    place_R = tl.arange(0, BLOCK_R)
    real_R = place_R < G
    head_R = group * G + place_R
    q_RD = load_rows(Q, token * stride_qn + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
    peak_R = tl.full([BLOCK_R], float("-inf"), SUM)
    total_R = tl.zeros([BLOCK_R], SUM)
    sum_RE = tl.zeros([BLOCK_R, BLOCK_E], SUM)
    for step in range(COUNT * PIECES):
        row_C, seen_C = _chosen_keys(INDEX, pair, step, start, end, SELECT_BLOCK, PIECES, BLOCK_C)
        k_CD = load_rows(K, row_C * stride_kn + group * stride_kh, seen_C, D, BLOCK_D, DOT)
        v_CE = load_rows(V, row_C * stride_vn + group * stride_vh, seen_C, E, BLOCK_E, DOT)
        peak_R, total_R, sum_RE = take_in(
            q_RD, k_CD, v_CE, seen_C[None, :], peak_R, total_R, sum_RE, SCALE2, PRECISION
        )
    out_RE, lse_R = settle(peak_R, total_R, sum_RE)
    query_R = token * num_heads + head_R
    store_rows(OUT, query_R * E, real_R, out_RE, E, BLOCK_E)
    tl.store(LSE + query_R, lse_R, mask=real_R)


@triton.jit
def selected_backward_queries(
    Q, K, V, INDEX, TIME, END, OUT, LSE, GRAD, DELTA, GRAD_Q,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    num_heads,
    COUNT: tl.constexpr, SELECT_BLOCK: tl.constexpr, PIECES: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and DELTA = sum(output * gradient) for the keys' kernel."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, end = token - tl.load(TIME + token), tl.load(END + token)
    pair = (token * tl.num_programs(1) + group) * COUNT
    place_R = tl.arange(0, BLOCK_R)
    real_R = place_R < G
    head_R = group * G + place_R
    query_R = token * num_heads + head_R
    q_RD = load_rows(Q, token * stride_qn + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
    grad_RE = load_rows(GRAD, token * stride_gn + head_R * stride_gh, real_R, E, BLOCK_E, DOT)
    out_RE = load_rows(OUT, query_R * E, real_R, E, BLOCK_E, SUM)
    delta_R = tl.sum(out_RE * grad_RE.to(SUM), 1)
    tl.store(DELTA + query_R, delta_R, mask=real_R)
    lse_R = tl.load(LSE + query_R, mask=real_R, other=float("inf"))
    grad_q_RD = tl.zeros([BLOCK_R, BLOCK_D], SUM)
    for step in range(COUNT * PIECES):
        row_C, seen_C = _chosen_keys(INDEX, pair, step, start, end, SELECT_BLOCK, PIECES, BLOCK_C)
        k_CD = load_rows(K, row_C * stride_kn + group * stride_kh, seen_C, D, BLOCK_D, DOT)
        v_CE = load_rows(V, row_C * stride_vn + group * stride_vh, seen_C, E, BLOCK_E, DOT)
        _, grad_s_RC = weights_and_adjoint(
            q_RD, k_CD, grad_RE, v_CE, seen_C[None, :], lse_R[:, None], delta_R[:, None],
            SCALE2, PRECISION,
        )  # fmt: skip
        grad_q_RD = add_product(grad_s_RC.to(DOT), k_CD, grad_q_RD, PRECISION)
    store_rows(GRAD_Q, query_R * D, real_R, grad_q_RD * SCALE, D, BLOCK_D)
