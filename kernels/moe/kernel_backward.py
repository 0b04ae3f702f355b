"""The gradients of the experts, over tiles of pairs; no atomics, so they repeat bit for bit.

With g_t the gradient of a token's output, a = [gate, up] and h = silu(gate) up of a pair:

    dh = down^T g_t,   dweight = <dh, h>,   da = weight (dh o dh/da),
    ddown_e = sum over its pairs of g_t (weight h)^T,   dgate_up_e = sum of da x_t^T,
    dx_t = sum over its pairs of gate_up_e^T da                 (expert_product, then sum_by_token)

hidden_gradient recomputes the up-projection where the forward pass did not keep it. What is summed
over a row of the hidden width (dweight, and the norms) is left in one number for each block of
columns and added by add_parts.

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F, P rows of pairs, S sums
of each pair, B blocks of hidden columns; J and K are the sides of a matrix.
"""

import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import number_types, sum_dtype
from tiny_onn_kernels.moe.kernel_forward import (
    find_rows,
    gate_and_up,
    most_work,
    multiply_rows,
)
from tiny_onn_kernels.moe.kernel_launch import block_rows, num_programs, tiling
from tiny_onn_kernels.moe.kernel_pairs import PairLayout, sum_by_token


@triton.jit
def hidden_gradient(
    x_ptr,
    weight_ptr,
    gate_up_ptr,
    down_ptr,
    grad_ptr,
    inner_ptr,
    grad_inner_ptr,
    hidden_ptr,
    part_ptr,
    token_ptr,
    begin_ptr,
    tile_ptr,
    tiles_ptr,
    E: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVED: tl.constexpr,
    NORMS: tl.constexpr,
):
    """grad_inner (P, H) = da; hidden (P, F) = weight h; part (P, S, B): a block's share of
    <dh, h> and, if NORMS, of |h|^2 and |da / weight|^2."""
    columns: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    work = tl.program_id(0)
    end = tl.load(tiles_ptr) * columns
    while work < end:
        expert, row_P, inside_P = find_rows(work // columns, begin_ptr, tile_ptr, BLOCK_P)
        token_P = tl.load(token_ptr + row_P, mask=inside_P, other=0).to(tl.int64)
        block = work % columns
        column_F = block * BLOCK_F + tl.arange(0, BLOCK_F)
        inside_F = column_F < F
        inside_PF = inside_P[:, None] & inside_F[None, :]
        place_PH = row_P[:, None] * (2 * F) + column_F[None, :]
        if SAVED:
            gate_PF = tl.load(inner_ptr + place_PH, mask=inside_PF, other=0.0).to(SUM)
            up_PF = tl.load(inner_ptr + place_PH + F, mask=inside_PF, other=0.0).to(SUM)
        else:
            gate_PF, up_PF = gate_and_up(
                x_ptr, gate_up_ptr, token_P, inside_P, expert, column_F,
                C, F, BLOCK_P, BLOCK_F, BLOCK_C, DOT, SUM, PRECISION,
            )  # fmt: skip

        grad_PF = tl.zeros((BLOCK_P, BLOCK_F), dtype=SUM)
        grad_row_P = grad_ptr + token_P * C
        matrix_F = down_ptr + expert * C * F + column_F
        for start in range(0, C, BLOCK_C):
            inner_C = start + tl.arange(0, BLOCK_C)
            inside_C = inner_C < C
            inside_PC = inside_P[:, None] & inside_C[None, :]
            inside_CF = inside_C[:, None] & inside_F[None, :]
            grad_PC = tl.load(grad_row_P[:, None] + inner_C[None, :], mask=inside_PC, other=0.0).to(
                DOT
            )
            down_CF = tl.load(
                matrix_F[None, :] + inner_C[:, None] * F, mask=inside_CF, other=0.0
            ).to(DOT)
            grad_PF = tl.dot(grad_PC, down_CF, grad_PF, input_precision=PRECISION, out_dtype=SUM)

        sigmoid_PF = tl.sigmoid(gate_PF)
        silu_PF = gate_PF * sigmoid_PF
        hidden_PF = silu_PF * up_PF
        grad_gate_PF = grad_PF * up_PF * (sigmoid_PF + silu_PF * (1 - sigmoid_PF))
        grad_up_PF = grad_PF * silu_PF

        sums: tl.constexpr = 3 if NORMS else 1
        part_P = part_ptr + row_P * (sums * columns) + block
        tl.store(part_P, tl.sum(grad_PF * hidden_PF, axis=1), mask=inside_P)
        if NORMS:
            square_PF = grad_gate_PF * grad_gate_PF + grad_up_PF * grad_up_PF
            tl.store(part_P + columns, tl.sum(hidden_PF * hidden_PF, axis=1), mask=inside_P)
            tl.store(part_P + 2 * columns, tl.sum(square_PF, axis=1), mask=inside_P)

        weight_P = tl.load(weight_ptr + token_P * E + expert, mask=inside_P, other=0.0).to(SUM)
        weight_P1 = weight_P[:, None]
        number = hidden_ptr.dtype.element_ty
        place_PF = row_P[:, None] * F + column_F[None, :]
        tl.store(hidden_ptr + place_PF, (weight_P1 * hidden_PF).to(number), mask=inside_PF)
        grad_place_PH = grad_inner_ptr + place_PH
        tl.store(grad_place_PH, (weight_P1 * grad_gate_PF).to(number), mask=inside_PF)
        tl.store(grad_place_PH + F, (weight_P1 * grad_up_PF).to(number), mask=inside_PF)
        work += tl.num_programs(0)


@triton.jit(do_not_specialize=["N"])
def add_parts(
    part_ptr,
    out_ptr,
    token_ptr,
    begin_ptr,
    tile_ptr,
    tiles_ptr,
    N,
    E: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """out (S, N, E) at the active pairs: the sums over blocks of part (P, S, B)."""
    work = tl.program_id(0)
    end = tl.load(tiles_ptr)
    block_B = tl.arange(0, BLOCK_B)
    while work < end:
        expert, row_P, inside_P = find_rows(work, begin_ptr, tile_ptr, BLOCK_P)
        token_P = tl.load(token_ptr + row_P, mask=inside_P, other=0).to(tl.int64)
        inside_PB = inside_P[:, None] & (block_B < B)[None, :]
        for kind in tl.static_range(S):
            place_PB = (row_P * S + kind)[:, None] * B + block_B[None, :]
            part_PB = tl.load(part_ptr + place_PB, mask=inside_PB, other=0.0)
            place_P = out_ptr + (token_P + kind * N) * E + expert
            tl.store(place_P, tl.sum(part_PB, axis=1), mask=inside_P)
        work += tl.num_programs(0)


@triton.jit
def matrix_gradient(
    left_ptr,
    right_ptr,
    out_ptr,
    token_ptr,
    begin_ptr,
    J: tl.constexpr,
    K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
):
    """out (E, J, K): the sum over an expert's pairs of left^T right; zeros if it has none.

    One of the two, left (., J) or right (., K), has a row for each token, the other for each pair.
    """
    blocks_J: tl.constexpr = (J + BLOCK_J - 1) // BLOCK_J
    blocks_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    work = tl.program_id(0)
    expert = work // (blocks_J * blocks_K)
    column_J = (work // blocks_K) % blocks_J * BLOCK_J + tl.arange(0, BLOCK_J)
    column_K = work % blocks_K * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_J, inside_K = column_J < J, column_K < K
    begin = tl.load(begin_ptr + expert)
    end = tl.load(begin_ptr + expert + 1)
    out_JK = tl.zeros((BLOCK_J, BLOCK_K), dtype=SUM)
    for start in range(begin, end, BLOCK_P):
        row_P = start + tl.arange(0, BLOCK_P)
        inside_P = row_P < end
        token_P = tl.load(token_ptr + row_P, mask=inside_P, other=0).to(tl.int64)
        row_P = row_P.to(tl.int64)
        if LEFT_BY_TOKEN:
            left_P, right_P = token_P, row_P
        else:
            left_P, right_P = row_P, token_P
        inside_JP = inside_J[:, None] & inside_P[None, :]
        inside_PK = inside_P[:, None] & inside_K[None, :]
        place_JP = left_ptr + left_P[None, :] * J + column_J[:, None]
        place_PK = right_ptr + right_P[:, None] * K + column_K[None, :]
        left_JP = tl.load(place_JP, mask=inside_JP, other=0.0).to(DOT)
        right_PK = tl.load(place_PK, mask=inside_PK, other=0.0).to(DOT)
        out_JK = tl.dot(left_JP, right_PK, out_JK, input_precision=PRECISION, out_dtype=SUM)
    place_JK = expert.to(tl.int64) * J * K + column_J[:, None] * K + column_K[None, :]
    inside_JK = inside_J[:, None] & inside_K[None, :]
    tl.store(out_ptr + place_JK, out_JK.to(out_ptr.dtype.element_ty), mask=inside_JK)


def sum_outer_products(
    left: Tensor, right: Tensor, layout: PairLayout, left_by_token: bool
) -> Tensor:
    """(E, J, K), as :func:`matrix_gradient` says."""
    num_experts, num_left, num_right = len(layout.begin_E) - 1, left.shape[1], right.shape[1]
    wide = 128 if num_left % 128 == 0 else 64
    tile = tiling(wide, num_right, wide, left.dtype)
    out_EJK = left.new_empty(num_experts, num_left, num_right)
    grid = num_experts * triton.cdiv(num_left, wide) * triton.cdiv(num_right, tile.columns)
    matrix_gradient[(grid,)](
        left, right, out_EJK, layout.token_P, layout.begin_E,
        J=num_left, K=num_right, LEFT_BY_TOKEN=left_by_token,
        BLOCK_J=wide, BLOCK_K=tile.columns, BLOCK_P=tile.inner,
        **number_types(left.dtype), **tile.options,
    )  # fmt: skip
    return out_EJK


def differentiate_hidden(
    grad_NC: Tensor,
    x_NC: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
    inner_PH: Tensor,
    layout: PairLayout,
    norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the two halves (P, H); weighted hidden (P, F); sums (S, N, E), 0 if inactive.

    The sums: <dh, h>, and with ``norms`` |h|^2 and |da / weight|^2 too. inner_PH may be empty.
    """
    num_tokens, num_experts = weight_NE.shape
    _, width, hidden = down_ECF.shape
    num_rows, rows = len(layout.token_P), block_rows(num_tokens)
    tile = tiling(rows, hidden, width, x_NC.dtype, accumulators=4 if norms else 3)
    num_blocks, num_sums = triton.cdiv(hidden, tile.columns), 3 if norms else 1
    wide = sum_dtype(x_NC.dtype)
    grad_inner_PH = x_NC.new_empty(num_rows, 2 * hidden)
    hidden_PF = x_NC.new_empty(num_rows, hidden)
    part_PSB = x_NC.new_empty((num_rows, num_sums, num_blocks), dtype=wide)
    sum_SNE = x_NC.new_zeros((num_sums, num_tokens, num_experts), dtype=wide)
    places = (layout.token_P, layout.begin_E, layout.tile_T2, layout.tiles_1)
    programs = num_programs(most_work(layout, rows, num_blocks), x_NC.device)
    hidden_gradient[(programs,)](
        x_NC, weight_NE, gate_up_EHC, down_ECF, grad_NC, inner_PH,
        grad_inner_PH, hidden_PF, part_PSB, *places,
        E=num_experts, C=width, F=hidden, SAVED=len(inner_PH) > 0, NORMS=norms,
        BLOCK_P=rows, BLOCK_F=tile.columns, BLOCK_C=tile.inner,
        **number_types(x_NC.dtype), **tile.options,
    )  # fmt: skip
    programs = num_programs(most_work(layout, rows, 1), x_NC.device)
    add_parts[(programs,)](
        part_PSB, sum_SNE, *places, num_tokens, E=num_experts, S=num_sums, B=num_blocks,
        BLOCK_P=rows, BLOCK_B=triton.next_power_of_2(num_blocks),
    )  # fmt: skip
    return grad_inner_PH, hidden_PF, sum_SNE


def run_backward(
    grad_NC: Tensor,
    x_NC: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
    inner_PH: Tensor,
    layout: PairLayout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate_up and down. All contiguous; inner_PH may be empty."""
    grad_inner_PH, hidden_PF, sum_SNE = differentiate_hidden(
        grad_NC, x_NC, weight_NE, gate_up_EHC, down_ECF, inner_PH, layout, norms=False
    )
    grad_down_ECF = sum_outer_products(grad_NC, hidden_PF, layout, left_by_token=True)
    grad_gate_up_EHC = sum_outer_products(grad_inner_PH, x_NC, layout, left_by_token=False)
    grad_x_NC = sum_by_token(multiply_rows(grad_inner_PH, gate_up_EHC, layout), layout)
    return grad_x_NC, sum_SNE[0].to(weight_NE.dtype), grad_gate_up_EHC, grad_down_ECF
